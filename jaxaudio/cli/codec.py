"""The subcommands `encode` and `decode`: recordings to .jac files and back, one or a folder of them."""

import argparse
import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxaudio.cli.device import CACHE, DEVICES, compilation_cache, use_device

if TYPE_CHECKING:
    from jaxaudio.data.audio import AudioInfo
    from jaxaudio.generate.codec import Codec
    from jaxaudio.generate.compression import Compressed

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4", ".aac", ".aif", ".aiff", ".webm")


def add_parsers(commands: Any) -> None:
    """Adds the subcommands to those of argparse's `add_subparsers`."""
    encode = commands.add_parser(
        "encode",
        help="compress audio files with a neural codec",
        description="Encodes an audio file into a .jac file, or all audio files below a folder into a folder. Audio is "
        "resampled to the codec's rate; stereo is mixed to the mean of its channels for a mono codec, and mono audio "
        "gives both channels of a stereo codec; what was done is printed. Memory is that of some seconds of audio. A "
        "file that cannot be encoded is reported in one line and the others go on; the exit status is 1 then.",
    )
    encode.add_argument("source", metavar="IN", help="audio file (wav, flac, ogg, mp3; m4a, mp4, webm), or a folder")
    encode.add_argument("destination", metavar="OUT", help=".jac file to write, or a folder")
    _add_codec(encode, required=True, help="its folder or file, a HuggingFace Hub id, or")
    rate = encode.add_mutually_exclusive_group()
    rate.add_argument("--kbps", type=float, help="bitrate, one of the codec's (default: all codebooks of the codec)")
    rate.add_argument("--num_codebooks", type=int, metavar="N", help="instead of --kbps, codebooks of each frame")
    encode.add_argument(
        "--entropy",
        action="store_true",
        help="make the file shorter without loss by a language model of codes: much slower, readable on any machine",
    )
    _add_common(encode)
    encode.set_defaults(run=_encode, on_cpu=False, usage_error=encode.error)

    decode = commands.add_parser(
        "decode",
        help="restore audio files from what encode wrote",
        description="Decodes a .jac file into a wav or flac file of 16 bits, or all .jac files below a folder into a "
        "folder. Of a damaged file the chunks of 4 or 5 s that were hit are silence; they are reported with their "
        "seconds, and the exit status is 1. A file that cannot be decoded is reported in one line and the others go "
        "on; the exit status is 1 then, too.",
    )
    decode.add_argument("source", metavar="IN", help=".jac file, or a folder")
    decode.add_argument("destination", metavar="OUT", help="file to write, called .wav or .flac, or a folder")
    _add_codec(decode, required=False, help="needed unless the file names")
    decode.add_argument("--format", choices=("wav", "flac"), default="wav", help="of a folder's files (default: wav)")
    _add_common(decode)
    decode.set_defaults(run=_decode, on_cpu=False)


def _add_codec(parser: argparse.ArgumentParser, *, required: bool, help: str) -> None:
    published = "a published one: encodec_24khz, encodec_48khz, dac_44khz, mimi, ..."
    parser.add_argument("--codec", required=required, metavar="DIR_OR_ID", help=f"{help} {published}")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--entropy_model", metavar="DIR", help="folder of the language model of codes (default: the codec's)")
    add("--overwrite", action="store_true", help="replace files that exist, which otherwise is an error")
    add("--device", choices=DEVICES, help="where to compute (default: the accelerator if there is one)")
    cache = f"keeps compiled programs for the next run (default: {CACHE}); None keeps none"
    add(
        "--compilation_cache",
        type=lambda text: None if text == "None" else text,
        default=CACHE,
        help=cache,
        metavar="DIR",
    )


def load(source: str) -> "Codec":
    """A codec, its parameters on the device, from whatever `convert.codec.load_codec` takes.

    Raises:
      ConvertError: see `convert.codec.load_codec`.
    """
    import jax

    from jaxaudio.convert.codec import load_codec
    from jaxaudio.convert.codec_read import MODELS
    from jaxaudio.generate.codec import Codec

    checkpoint = load_codec(source)
    return Codec(checkpoint.name, MODELS[checkpoint.kind][1](checkpoint.config), jax.device_put(checkpoint.params))


def num_codebooks_of(arguments: argparse.Namespace, codec: "Codec") -> int:
    """What --kbps or --num_codebooks asks for, unchecked if the latter; all that the codec has without either.

    Raises:
      ValueError: as `Codec.num_codebooks_for`.
    """
    if arguments.kbps is not None:
        return codec.num_codebooks_for(arguments.kbps)
    return codec.config.num_codebooks if arguments.num_codebooks is None else arguments.num_codebooks


def _load_coder(arguments: argparse.Namespace, codec: str) -> Any:
    """The entropy coder in --entropy_model, or beside the codec."""
    from jaxaudio.convert.codec import find_codec
    from jaxaudio.data.entropy_coder import load_entropy_coder

    if arguments.entropy_model is not None:
        return load_entropy_coder(arguments.entropy_model)
    path = find_codec(codec)
    return load_entropy_coder(path if path.is_dir() else path.parent)


def _encode(arguments: argparse.Namespace) -> int:
    from jaxaudio.data.audio import audio_info
    from jaxaudio.generate.compression import encode_file

    if arguments.entropy_model is not None and not arguments.entropy:
        arguments.usage_error("--entropy_model needs --entropy")
    jobs = _jobs(arguments, AUDIO_SUFFIXES, ".jac", (".jac",))
    use_device(arguments.device)
    with compilation_cache(arguments.compilation_cache):
        codec = load(arguments.codec)
        coder = _load_coder(arguments, arguments.codec) if arguments.entropy else None
        num_codebooks = num_codebooks_of(arguments, codec)

        def encode(source: pathlib.Path, destination: pathlib.Path, progress: Callable[[float], None]) -> bool:
            options = {"num_codebooks": num_codebooks, "coder": coder, "overwrite": arguments.overwrite}
            done = encode_file(codec, source, destination, progress=progress, **options)
            _print(f"{destination}: {_encoded(done, audio_info(source))}")
            return True

        return _run(jobs, encode, lambda path: audio_info(path).duration_s, "encode")


def _encoded(done: "Compressed", source: "AudioInfo") -> str:
    """What was done, in one line."""
    header = done.header
    line = f"{header.num_samples / header.sample_rate:.3f} s, {done.num_bytes:,} bytes, {done.kbps:.2f} kbit/s"
    line += f" with {header.num_codebooks} codebooks of {header.codec}"
    if header.entropy is not None:
        line += f", coded by {header.entropy}"
    if source.sample_rate != header.sample_rate:
        line += f"; resampled from {source.sample_rate} to {header.sample_rate} Hz"
    if source.num_channels > header.channels:
        line += f"; mean of {source.num_channels} channels"
    if source.num_channels < header.channels:
        line += f"; {header.channels} channels from one"
    return line


def _decode(arguments: argparse.Namespace) -> int:
    from jaxaudio.convert.codec import REPOSITORIES
    from jaxaudio.data.codec_files import open_codec_file
    from jaxaudio.generate.compression import SUFFIXES, check_codec, decode_file

    jobs = _jobs(arguments, (".jac",), f".{arguments.format}", SUFFIXES)
    use_device(arguments.device)
    find, find_coder = functools.cache(load), functools.cache(lambda codec: _load_coder(arguments, codec))

    def decode(source: pathlib.Path, destination: pathlib.Path, progress: Callable[[float], None]) -> bool:
        with open_codec_file(source) as file:
            header = file.header
        name = arguments.codec or header.codec
        if arguments.codec is None and name not in REPOSITORIES:
            raise ValueError(
                f"{source} was encoded with the codec {name}, config {header.config_hash}; give its folder with --codec"
            )
        codec = find(name)
        check_codec(codec, header, str(source))  # before its entropy model is missed
        coder = None if header.entropy is None else find_coder(name)
        done = decode_file(codec, source, destination, coder=coder, overwrite=arguments.overwrite, progress=progress)
        duration_s = header.num_samples / header.sample_rate
        _print(f"{destination}: {duration_s:.3f} s, from {header.num_codebooks} codebooks of {header.codec}")
        for note in done.notes:
            _say(f"{source}: {note}", "decode")
        for lost in done.lost:
            which = f"chunk {lost.first} is" if lost.first == lost.last else f"chunks {lost.first} to {lost.last} are"
            _say(
                f"{source}: {which} lost, {lost.start_s:.3f} to {lost.end_s:.3f} s are silence: {lost.reason}", "decode"
            )
        if done.num_clipped:
            _say(f"{source}: {done.num_clipped} samples beyond full scale were clipped", "decode")
        return not done.lost

    with compilation_cache(arguments.compilation_cache):
        return _run(jobs, decode, _duration_s, "decode")


def _duration_s(path: pathlib.Path) -> float:
    from jaxaudio.data.codec_files import open_codec_file

    with open_codec_file(path) as file:
        return file.header.num_samples / file.header.sample_rate


def _run(
    jobs: Sequence[tuple[pathlib.Path, pathlib.Path]],
    work: Callable[[pathlib.Path, pathlib.Path, Callable[[float], None]], bool],
    duration_s: Callable[[pathlib.Path], float],
    command: str,
) -> int:
    """Does the files one by one, with a bar of their seconds; returns 1 if one failed or is not whole, else 0."""
    import tqdm

    form = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s of audio [{elapsed}<{remaining}, {rate_fmt}]"
    num_failed = 0
    with tqdm.tqdm(total=0.0, unit="s", disable=None, bar_format=form, file=sys.stderr) as bar:
        if not bar.disable:
            for source, _ in jobs:
                with contextlib.suppress(ValueError, OSError):  # `work` will say why
                    bar.total += duration_s(source)
        for source, destination in jobs:
            try:
                num_failed += not work(source, destination, bar.update)
            except (ValueError, OSError) as error:
                num_failed += 1
                message = " ".join(str(error).split())
                _say(message if str(source) in message else f"{source}: {message}", command)
    if len(jobs) > 1:
        _print(f"{len(jobs) - num_failed} of {len(jobs)} files are whole")
    return 1 if num_failed else 0


def _print(line: str) -> None:
    import tqdm

    tqdm.tqdm.write(line, file=sys.stdout)


def _say(line: str, command: str) -> None:
    import tqdm

    tqdm.tqdm.write(f"jaxaudio {command}: {line}", file=sys.stderr)


def _jobs(
    arguments: argparse.Namespace, suffixes: Sequence[str], new_suffix: str, allowed: Sequence[str]
) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Files to read and to write: one, or those below a folder, whose tree is kept.

    Raises:
      ValueError: there is nothing to do, or two files would become one.
    """
    source, destination = pathlib.Path(arguments.source), pathlib.Path(arguments.destination)
    if not source.is_dir():
        if destination.is_dir():
            raise ValueError(f"{destination} is a folder; {source} needs the name of a file to write")
        if destination.suffix.lower() not in allowed:
            raise ValueError(f"{destination}: expected a name that ends in {' or '.join(allowed)}")
        return [(source, destination)]
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file; the files of the folder {source} need a folder to be written to")
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    chosen = [path for path in paths if path.suffix.lower() in suffixes]
    if not chosen:
        raise ValueError(f"{source}: none of its {len(paths)} files is called {', '.join(suffixes)}")
    jobs: dict[pathlib.Path, pathlib.Path] = {}
    for path in chosen:
        out = destination / path.relative_to(source).with_suffix(new_suffix)
        if out in jobs:
            raise ValueError(f"{jobs[out]} and {path} would both be written to {out}; give one another name")
        jobs[out] = path
    if len(chosen) < len(paths):
        _say(f"{len(paths) - len(chosen)} files below {source} are not called {', '.join(suffixes)}", arguments.command)
    return [(path, out) for out, path in jobs.items()]
