"""The subcommands about files: `convert`, `inspect`, `plot` and `export`."""

import argparse
import dataclasses
import json
import math
import pathlib
import re
from typing import Any

_CODEC_SUFFIXES = (".th", ".pth", ".bin", ".safetensors")


def add_parsers(commands: Any) -> None:
    """Adds the subcommands to those of argparse's `add_subparsers`."""
    convert = commands.add_parser(
        "convert",
        help="rewrite the checkpoint of a Whisper or a codec in another layout",
        description="Rewrites a Whisper checkpoint bit for bit: every tensor keeps its numbers and dtype. A codec's "
        "(EnCodec, DAC, Mimi) weight norm is folded, into float32. The checkpoint appears at OUT whole or not at all.",
    )
    convert.add_argument(
        "source",
        metavar="IN",
        help="a folder of HuggingFace's or ours, a file of OpenAI's (.pt), Meta's (.th, .bin), Descript's (.pth) or "
        "Kyutai's (.safetensors), a hub id, or a size of Whisper or name of a codec",
    )
    convert.add_argument(
        "destination", metavar="OUT", help="a folder to write; or, of a Whisper, a .pt file, which is OpenAI's layout"
    )
    convert.add_argument(
        "--format",
        choices=("hf", "jaxaudio"),
        help="layout of a folder; by default ours if IN is HuggingFace's or a codec's file, else HuggingFace's",
    )
    convert.add_argument("--tokenizer", help="its file or folder, where IN comes without one, as .pt files do")
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    convert.set_defaults(run=_convert, on_cpu=True)

    inspect = commands.add_parser(
        "inspect",
        help="show what a checkpoint or an audio file holds",
        description="Of a run's checkpoint: its parameters and config, and the steps of its run. Of a Whisper or a "
        "codec, a folder or a file: its config and parameters. Of an audio file: its format, its length, and the peak, "
        "clipping and silence of its samples. Of a .jac file: its codec, its length and what is damaged. Reads no "
        "arrays, but all samples and codes.",
    )
    inspect.add_argument(
        "path",
        metavar="CHECKPOINT_OR_AUDIO",
        help="a run's folder or its checkpoints folder, for the newest step; the folder of one step; a folder or "
        "file of a Whisper or a codec; an audio file; or a .jac file",
    )
    inspect.set_defaults(run=_inspect, on_cpu=True)

    plot = commands.add_parser("plot", help="draw a picture of an audio file")
    pictures = plot.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    spectrogram = pictures.add_parser(
        "spectrogram",
        help="waveform, spectrogram, and the log-mel features that Whisper hears",
        description="Draws the waveform, the spectrogram and the log-mel features of a recording of any length.",
    )
    spectrogram.add_argument("file", metavar="FILE", help="an audio file")
    spectrogram.add_argument("--out", help="picture to write: .png, .svg or .pdf (default: FILE's name with .png)")
    spectrogram.add_argument("--start", type=float, default=0.0, metavar="S", help="first second (default: 0)")
    spectrogram.add_argument("--duration", type=float, metavar="S", help="seconds to draw (default: up to the end)")
    spectrogram.set_defaults(run=_plot_spectrogram, on_cpu=True)

    export = commands.add_parser(
        "export",
        help="write a checkpoint's parameters to one file",
        description="Writes a checkpoint's parameters to OUT, and beside it OUT.json with the shape, dtype, mean, std "
        "and sha256 of each array. Works on CPU, without model code, also for checkpoints of many devices. Stacked "
        "layers are written one by one: a/layers/0/b. In Python, jaxaudio.convert.export.load(OUT) reads it back.",
    )
    export.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run's folder or its checkpoints folder, for the newest step; or the folder of one step",
    )
    export.add_argument("out", metavar="OUT", help="file to write; its suffix, .safetensors or .npz, is its format")
    export.add_argument("--select", metavar="REGEX", help="only paths in which this regular expression is found")
    export.add_argument("--ema", action="store_true", help="the moving average of the parameters instead of them")
    export.set_defaults(run=_export, on_cpu=True)


def _convert(arguments: argparse.Namespace) -> None:
    from jaxaudio.convert.codec import convert_codec, is_codec
    from jaxaudio.convert.whisper import convert_whisper

    if is_codec(arguments.source):
        if arguments.tokenizer is not None:
            raise ValueError(f"--tokenizer {arguments.tokenizer}: {arguments.source} is a codec, which has none")
        layout, overwrite = arguments.format, arguments.overwrite
        done = convert_codec(arguments.source, arguments.destination, layout=layout, overwrite=overwrite)
        print(f"{done.destination}: {done.kind}, from the {done.source_layout} to the {done.layout} layout")
        return
    done = convert_whisper(
        arguments.source,
        arguments.destination,
        layout=arguments.format,
        tokenizer=arguments.tokenizer,
        overwrite=arguments.overwrite,
    )
    print(f"{done.destination}: {done.dtype}, from the {done.source_layout} to the {done.layout} layout")


def _export(arguments: argparse.Namespace) -> None:
    from jaxaudio.convert.export import export_checkpoint

    manifest = export_checkpoint(arguments.checkpoint, arguments.out, arguments.select, ema=arguments.ema)
    size = sum(math.prod(entry["shape"]) for entry in manifest["arrays"].values())
    source = manifest["checkpoint"]
    count = len(manifest["arrays"])
    print(f"{arguments.out}: {count} arrays, {size:,} numbers, {source['part']} of step {source['step']}")


def _inspect(arguments: argparse.Namespace) -> None:
    path = pathlib.Path(arguments.path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder; expected a checkpoint or an audio file")
    is_run = (path / "checkpoints").is_dir() or (path / "state").is_dir()
    if path.suffix == ".jac":
        _inspect_codes(path)
        return
    if not is_run and (path.is_dir() or path.suffix in _CODEC_SUFFIXES) and _inspect_codec(path):
        return
    if path.suffix == ".pt" or ((path / "config.json").is_file() and not is_run):
        _inspect_whisper(path)
    elif path.is_dir():
        _inspect_checkpoint(path)
    else:
        _inspect_audio(path)


def _inspect_checkpoint(path: pathlib.Path) -> None:
    from jaxaudio.convert.export import inspect_checkpoint

    summary = inspect_checkpoint(path)
    _print_arrays(summary.arrays)
    total = sum(math.prod(shape) for name, (shape, _) in summary.arrays.items() if not name.startswith("ema_params/"))
    print(f"{'total':{_path_width(summary.arrays)}}  {'':20}  {'':9}  {total:13,}")
    print(f"\nThe whole train state holds {summary.state_size:,} numbers.")
    print(f"checkpoint  {summary.path}")
    print(f"steps       {', '.join(map(str, summary.steps))}")
    print(f"versions    {', '.join(f'{name} {version}' for name, version in summary.versions.items())}")
    print(f"config      {json.dumps(summary.config, indent=2)}")


def _inspect_codec(path: pathlib.Path) -> bool:
    """Whether it is one."""
    from jaxaudio.convert.codec import is_codec, read_codec

    if not is_codec(path):
        return False
    codec = read_codec(path.absolute())
    config = codec.config
    rows = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in codec.tensors.items()}
    _print_arrays(rows)
    for part in (*dict.fromkeys(name.split("/")[0] for name in rows), ""):
        size = sum(math.prod(shape) for name, (shape, _) in rows.items() if not part or name.split("/")[0] == part)
        print(f"{part or 'total':{_path_width(rows)}}  {'':20}  {'':9}  {size:13,}")
    kbps = math.log2(config.codebook_size) * config.frame_rate / 1000
    print(f"\nlayout      {codec.layout}")
    print(f"kind        {codec.kind}")
    print(f"name        {codec.name}")
    print(f"audio       {config.sample_rate} Hz, {config.channels} channel{'s' * (config.channels > 1)}")
    print(f"frames      {config.frame_rate:g} a second, of {config.hop_length} samples")
    print(f"codes       {config.num_codebooks} of {config.codebook_size} a frame, {kbps:g} kbps each")
    print(f"bandwidths  {', '.join(f'{value:g}' for value in config.bandwidths) or 'any number of codes'}")
    print(f"config      {json.dumps(dataclasses.asdict(config), indent=2)}")
    return True


def _inspect_codes(path: pathlib.Path) -> None:
    from jaxaudio.data.codec_files import open_codec_file

    with open_codec_file(path) as file:
        header = file.header
    duration_s = header.num_samples / header.sample_rate
    for name, value in dataclasses.asdict(header).items():
        if value is not None:
            print(f"{name:14}  {value}")
    print(f"{'duration':14}  {duration_s:.3f} s")
    print(f"{'bitrate':14}  {path.stat().st_size * 8 / 1000 / duration_s:.3f} kbit/s, of plain codes {header.kbps:.3f}")
    damage = [f"chunks {lost.first} to {lost.last}: {lost.reason}" for lost in file.lost]
    print(f"{'damage':14}  {'; '.join([*file.notes, *damage]) or 'none'}")


def _inspect_whisper(path: pathlib.Path) -> None:
    from jaxaudio.convert.whisper_read import read_checkpoint
    from jaxaudio.models.whisper import SIZES

    checkpoint = read_checkpoint(path.absolute())
    rows: dict[str, tuple[tuple[int, ...], str]] = {}  # the tensors of a stack's layers as one
    for name, tensor in checkpoint.tensors.items():
        stack, is_layer = re.subn(r"/layers/\d+/", "/layers/", name)
        num_layers = rows[stack][0][0] if stack in rows else 0
        rows[stack] = ((num_layers + 1,) * is_layer + tensor.shape, str(tensor.dtype))
    _print_arrays(dict(sorted(rows.items())))
    for part in ("encoder/", "decoder/", ""):
        size = sum(math.prod(shape) for name, (shape, _) in rows.items() if name.startswith(part))
        print(f"{part.removesuffix('/') or 'total':{_path_width(rows)}}  {'':20}  {'':9}  {size:13,}")
    heads = checkpoint.config.alignment_heads

    def shape(config):
        return dataclasses.replace(config, alignment_heads=None)

    sizes = [name for name, config in SIZES.items() if shape(config) == shape(checkpoint.config)]
    print(f"\nlayout      {checkpoint.layout}")
    print(f"size        {' or '.join(sizes) or 'none of the published ones'}")
    print(f"alignment   {'all heads of the last half of the decoder' if heads is None else f'{len(heads)} heads'}")
    print(f"config      {json.dumps(dataclasses.asdict(checkpoint.config), indent=2)}")


def _path_width(arrays: dict) -> int:
    return max([len("path"), *map(len, arrays)])


def _print_arrays(arrays: dict) -> None:
    width = _path_width(arrays)
    print(f"{'path':{width}}  {'shape':20}  {'dtype':9}  {'parameters':>13}")
    for name, (shape, dtype) in arrays.items():
        print(f"{name:{width}}  {str(list(shape)):20}  {dtype:9}  {math.prod(shape):13,}")


def _inspect_audio(path: pathlib.Path) -> None:
    from jaxaudio.data.audio import RESAMPLER, audio_info, scan

    info, found = audio_info(path), scan(path)
    minutes, seconds = divmod(info.duration_s, 60)
    num_all = found.num_samples * info.num_channels

    def level(amplitude):
        return f"{20 * math.log10(amplitude):.2f} dBFS" if amplitude > 0 else "silence"

    rows = {
        "file": info.path,
        "container": info.container,
        "codec": info.codec,
        "channels": f"{info.num_channels}",
        "bit depth": "none, a lossy codec" if info.bit_depth is None else f"{info.bit_depth}",
        "sample rate": f"{info.sample_rate} Hz",
        "heard at": "16000 Hz" + ("" if info.sample_rate == 16000 else f", resampled by {RESAMPLER}"),
        "samples": f"{found.num_samples:,} per channel",
        "duration": f"{info.duration_s:.3f} s ({minutes:.0f} min {seconds:.3f} s)",
        "peak": level(found.peak),
        "RMS": level(found.rms),
        "clipped": f"{found.num_clipped:,} samples of {num_all:,} at full scale",
        "digital silence": f"{100 * found.digital_silence:.2f} % of the time",
        "not finite": f"{found.num_not_finite:,} samples" + (" (no model can hear it)" if found.num_not_finite else ""),
    }
    for name, text in rows.items():
        print(f"{name:16} {text}")


def _plot_spectrogram(arguments: argparse.Namespace) -> None:
    from jaxaudio.data.audio import audio_info, read_blocks
    from jaxaudio.report.spectrogram import plot_spectrogram

    start_s, duration_s = arguments.start, arguments.duration
    info = audio_info(arguments.file)
    if not 0 <= start_s < info.duration_s:
        raise ValueError(f"--start {start_s}: expected a second of {info.path}, from 0 to {info.duration_s:.3f}")
    if duration_s is not None and not duration_s > 0:
        raise ValueError(f"--duration {duration_s}: expected more than 0 s")
    start = round(start_s * info.sample_rate)
    end = math.inf if duration_s is None else start + max(1, round(duration_s * info.sample_rate))

    def wanted():
        done = 0
        for block in read_blocks(info.path, info.sample_rate):
            yield block[max(start - done, 0) : max(min(end, done + len(block)) - done, 0)]
            done += len(block)
            if done >= end:
                return

    out = arguments.out or str(pathlib.Path(info.path).with_suffix(".png"))
    if not out.endswith((".png", ".svg", ".pdf")):
        raise ValueError(f"--out {out}: expected a name that ends in .png, .svg or .pdf")
    plot_spectrogram(wanted(), info.sample_rate, out, start_s=start / info.sample_rate)
    print(out)
