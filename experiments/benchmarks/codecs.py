"""EnCodec, DAC and Mimi beside transformers: encoding, decoding, and the latency of a frame.

Papers: Defossez et al. 2022, https://arxiv.org/abs/2210.13438; Kumar et al. 2023, https://arxiv.org/abs/2306.06546;
        Defossez et al. 2024, https://arxiv.org/abs/2410.00037
Run:    python -m experiments.benchmarks.codecs --out codecs.json                      # all on one core
        python -m experiments.benchmarks.codecs --codecs mimi --parts latency --cores 2
        python -m experiments.benchmarks.codecs --parts gpu --batch_size 32            # alone on an accelerator

Both have the same random weights, transformers' written as a folder and read by our converter, and run interleaved in
one process, pinned to `--cores` cores before JAX and torch start, all thread pools that size, in float32. EnCodec has
8 codebooks (6 kbps), DAC 9, Mimi 8.

offline  a recording in memory to codes and back, by `generate.codec.Codec` and by transformers' `encode` and `decode`.
         Nothing is timed before the codes are equal but for ties (99 % of them; the share is printed) and the audio of
         the same codes is, to 1e-4 of its rms.
latency  of the causal codecs: samples come a frame at a time to `encode_blocks`, codes a frame at a time to
         `decode_blocks`; the time from a frame's arrival to its output, over all frames of a recording that was coded
         once before. A frame of EnCodec lasts 13.3 ms, one of Mimi 80 ms.
gpu      seconds of audio a second of a batch, without peers, torch or files, against the peak given as a flag. Its
         default is NVIDIA's figure for an H200: 67 TFLOP/s in float32; products in TF32 can pass it. No GPU was at
         hand when this was written: the part is only tested with small shapes on a CPU.

"of limit" is the share of the time that the machine would need for the operations of `codec_limits` at the peak of a
product of matrices, which is measured first (on a GPU: given). "first call" compiles; it is in no other figure. A
comparison ends after `--repeats` rounds, or with the round in which it passes `--seconds`; "calls" says how many.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.whisper import machine, pin
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.data.files import atomic_path

# JAX, torch and whatever starts threads are imported in functions: the process must be pinned before.

PARTS = ("offline", "latency")
CODECS = {"encodec_24khz": 8, "dac_44khz": 9, "mimi": 8}  # codebooks: 6, 7.75 and 1.1 kbps


def main(arguments: argparse.Namespace, models: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs the parts, prints as it goes, and writes what it has to `--out` after each; returns all of it.

    Args:
      arguments: from `parse`.
      models: transformers' models, or for the part gpu configs of ours, by name; the published sizes if None.
    """
    facts = machine()
    results: dict[str, Any] = {"machine": facts, "arguments": vars(arguments)}
    print(f"{facts['cpu']}: {facts['cores']} of {facts['cores_of_machine']} cores; ", end="")
    print(f"load average before this run {facts['load_average']:.1f} (fair figures need a quiet machine)")

    def save() -> None:
        if arguments.out is not None:
            with atomic_path(arguments.out) as path:
                path.write_text(json.dumps(results, indent=1, default=str) + "\n")

    if arguments.parts == ["gpu"]:
        results["gpu"] = _gpu(arguments, models)
    else:
        _cpu(results, arguments, models, save)
    save()
    return results


def _cpu(results, arguments, models, save) -> None:
    import torch

    from experiments.benchmarks import codec_parts, codec_peers
    from experiments.benchmarks.whisper_limits import measure_peaks

    torch.set_num_threads(arguments.cores)
    peaks = measure_peaks(arguments.matmul_side, megabytes=16)
    results["peaks"] = dataclasses.asdict(peaks)
    print(f"float32 products reach {peaks.flops_per_s / 1e9:.0f} GFLOP/s")
    for name in arguments.codecs:
        model = codec_peers.make_model(name) if models is None else models[name]
        peers = codec_peers.make_peers(name, model, arguments.num_codebooks or CODECS[name])
        if "offline" in arguments.parts:
            results.setdefault("offline", []).extend(codec_parts.offline_part(peers, peaks, arguments))
            save()
        if "latency" in arguments.parts and peers.codec.config.causal:
            results.setdefault("latency", []).append(codec_parts.latency_part(peers, arguments))
            save()
        del model, peers  # before the next ones are made


def _gpu(arguments, configs) -> list[dict[str, Any]]:
    import jax  # and never torch

    from experiments.benchmarks import codec_accelerator

    if configs is None and jax.default_backend() == "cpu":
        raise RuntimeError("the part gpu needs an accelerator, but jax.default_backend() is cpu")
    print(f"{jax.devices()[0].device_kind}; its peak is taken to be {arguments.peak_tflops:g} TFLOP/s in float32")
    configs, part = configs or codec_accelerator.PRESETS, codec_accelerator.accelerator_part
    return [part(name, configs[name], arguments.num_codebooks or CODECS[name], arguments) for name in arguments.codecs]


def _names(allowed: Sequence[str]):
    def split(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(allowed):
            raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; one of {', '.join(allowed)}")
        return text.split(",")

    return split


def parse(argv: Sequence[str] | None = None, codecs: Sequence[str] = tuple(CODECS)) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", type=_names([*PARTS, "gpu"]), default=list(PARTS), help=f"of {', '.join(PARTS)}; or gpu alone")
    add("--codecs", type=_names(codecs), default=list(codecs), help=f"of {', '.join(codecs)}")
    add("--num_codebooks", type=int, help="of all codecs (default: 8, 9 and 8)")
    add("--cores", type=int, default=1, help="cores and threads of everything (default 1)")
    add("--duration_s", type=float, default=10, help="of the recording (default 10)")
    add("--repeats", type=int, default=7, help="timed rounds of each comparison at most (default 7)")
    add("--seconds", type=float, default=90, help="after which a comparison begins no further round (default 90)")
    add("--matmul_side", type=int, default=2048, help="of the matrices that measure the peak")
    add("--batch_size", type=int, default=16, help="recordings at once in the part gpu (default 16)")
    add("--peak_tflops", type=float, default=67, help="of the GPU in float32 (default 67, an H200)")
    add("--out", type=pathlib.Path, help="JSON file for all figures, written after each part")
    arguments = parser.parse_args(argv)
    if "gpu" in arguments.parts and len(arguments.parts) > 1:
        parser.error(f"the part gpu runs alone, without the CPU's parts, got {','.join(arguments.parts)}")
    if not arguments.duration_s > 0:
        parser.error(f"--duration_s must be positive, got {arguments.duration_s:g}")
    return arguments


if __name__ == "__main__":
    command_line = parse()
    if command_line.parts != ["gpu"]:
        pin(command_line.cores)
    raise_malloc_thresholds()
    main(command_line)
