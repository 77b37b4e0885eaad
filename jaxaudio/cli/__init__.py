"""The `jaxaudio` command: speech to text, audio as codes, piano music, checkpoints in and out, and what files hold.

Nothing heavy is imported before a subcommand runs, so that --help and --version answer at once.
"""

import argparse
import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from jaxaudio import __version__
from jaxaudio.cli import codec, files, music, tokenize, transcribe_arguments

# glibc's mallopt: (parameter, bytes) of M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD.
_MALLOPT = ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28))


def raise_malloc_thresholds() -> bool:
    """Makes glibc keep large blocks instead of returning them to the system; call it before the first large array.

    By default every fresh array above 32 MB is mapped anew and its pages are touched one by one, on each call; without
    that, operations with large outputs run 2-5 times faster on CPU.

    Returns:
      Whether the thresholds were set; False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(parameter, value) == 1 for parameter, value in _MALLOPT])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      Its exit status: 0; 1 after one line on standard error for each thing that failed; 130 if it was interrupted
      (argparse exits with 2).
    """
    arguments = _parser().parse_args(argv)
    raise_malloc_thresholds()
    if arguments.on_cpu:
        # An accelerator of this machine may belong to the run whose checkpoint is read.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxaudio.convert.tensors import ConvertError

    if argv is None and arguments.command in ("export", "inspect"):
        _silence_threads()
    with _warnings_of_one_line(arguments.command):
        try:
            return arguments.run(arguments) or 0
        except (ConvertError, ValueError, OSError, ImportError) as error:
            print(f"jaxaudio {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"jaxaudio {arguments.command}: interrupted", file=sys.stderr)
            return 130


def _silence_threads() -> None:
    """Drops, to the end of the process, the pages that Orbax's threads print about a damaged checkpoint.

    They come from logging and from tasks that outlive their event loop; ExportError says the same in one line.
    """
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


@contextlib.contextmanager
def _warnings_of_one_line(command: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"jaxaudio {command}: {message}", file=sys.stderr)
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxaudio",
        description="Speech to text with Whisper, audio as the codes of neural codecs, piano music with Music "
        "Transformers, and tools around checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"jaxaudio {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    transcribe_arguments.add_parser(commands)
    codec.add_parsers(commands)
    tokenize.add_parser(commands)
    music.add_parser(commands)
    files.add_parsers(commands)
    return parser
