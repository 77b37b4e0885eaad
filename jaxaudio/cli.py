"""The `jaxaudio` command: parameters out of a checkpoint, and what a checkpoint holds.

Nothing heavy is imported before a subcommand runs, so that --help and --version answer at once.
"""

import argparse
import ctypes
import json
import logging
import math
import os
import sys
from collections.abc import Sequence

from jaxaudio import __version__

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
    """Runs the command; returns its exit status: 0, or 1 after one line on standard error (argparse exits with 2)."""
    arguments = _parser().parse_args(argv)
    raise_malloc_thresholds()
    # An accelerator of this machine may belong to the run whose checkpoint is read.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxaudio.convert.export import ExportError

    if argv is None:
        _silence_threads()
    try:
        arguments.run(arguments)
    except (ExportError, OSError) as error:
        print(f"jaxaudio {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _silence_threads() -> None:
    """Drops, to the end of the process, the pages that Orbax's threads print about a damaged checkpoint.

    They come from logging and from tasks that outlive their event loop; ExportError says the same in one line.
    """
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxaudio", description="Tools around the runs and checkpoints of jaxaudio.")
    parser.add_argument("--version", action="version", version=f"jaxaudio {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    export = commands.add_parser(
        "export",
        help="write a checkpoint's parameters to one file",
        description="Writes a checkpoint's parameters to OUT, and beside it OUT.json with the shape, dtype, mean, std "
        "and sha256 of each array. Works on CPU, without model code, also for checkpoints of many devices. Stacked "
        "layers are written one by one: a/layers/0/b. In Python, jaxaudio.convert.export.load(OUT) reads it back.",
    )
    _add_checkpoint(export)
    export.add_argument("out", metavar="OUT", help="file to write; its suffix, .safetensors or .npz, is its format")
    export.add_argument("--select", metavar="REGEX", help="only paths in which this regular expression is found")
    export.add_argument("--ema", action="store_true", help="the moving average of the parameters instead of them")
    export.set_defaults(run=_export)

    inspect = commands.add_parser(
        "inspect",
        help="show what a checkpoint holds",
        description="Shows a checkpoint's parameters and config, and the steps of its run; reads no arrays.",
    )
    _add_checkpoint(inspect)
    inspect.set_defaults(run=_inspect)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run's folder or its checkpoints folder, for the newest step; or the folder of one step",
    )


def _export(arguments: argparse.Namespace) -> None:
    from jaxaudio.convert.export import export_checkpoint

    manifest = export_checkpoint(arguments.checkpoint, arguments.out, arguments.select, ema=arguments.ema)
    size = sum(math.prod(entry["shape"]) for entry in manifest["arrays"].values())
    source = manifest["checkpoint"]
    count = len(manifest["arrays"])
    print(f"{arguments.out}: {count} arrays, {size:,} numbers, {source['part']} of step {source['step']}")


def _inspect(arguments: argparse.Namespace) -> None:
    from jaxaudio.convert.export import inspect_checkpoint

    summary = inspect_checkpoint(arguments.checkpoint)
    width = max([len("path"), *map(len, summary.arrays)])
    print(f"{'path':{width}}  {'shape':20}  {'dtype':9}  {'parameters':>13}")
    for name, (shape, dtype) in summary.arrays.items():
        print(f"{name:{width}}  {str(list(shape)):20}  {dtype:9}  {math.prod(shape):13,}")
    total = sum(math.prod(shape) for name, (shape, _) in summary.arrays.items() if not name.startswith("ema_params/"))
    print(f"{'total':{width}}  {'':20}  {'':9}  {total:13,}")
    print(f"\nThe whole train state holds {summary.state_size:,} numbers.")
    print(f"checkpoint  {summary.path}")
    print(f"steps       {', '.join(map(str, summary.steps))}")
    print(f"versions    {', '.join(f'{name} {version}' for name, version in summary.versions.items())}")
    print(f"config      {json.dumps(summary.config, indent=2)}")


if __name__ == "__main__":
    sys.exit(main())
