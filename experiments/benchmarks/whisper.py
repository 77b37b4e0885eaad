"""Whisper beside openai-whisper, transformers and faster-whisper: log-mel, encoder, decoding, long audio, int8.

Paper: Radford et al. 2022, https://arxiv.org/abs/2212.04356, table 1 (the sizes)
Run:   python -m experiments.benchmarks.whisper --out whisper.json                  # all parts, three sizes, one core
       python -m experiments.benchmarks.whisper --parts encoder,decoding --sizes tiny --cores 2
       python -m experiments.benchmarks.whisper --parts gpu --minutes 60             # alone on an accelerator

All implementations have the same random weights (from openai-whisper's module, through our converter and CTranslate2's)
and run interleaved in one process, pinned to `--cores` cores before JAX and torch start, all thread pools that size.
Everything is float32 unless a row says int8. Nothing is timed before outputs agree: log-mels and encoder outputs by
relative rms, greedy tokens one by one with openai-whisper's (ours must be equal but for ties to 1e-3 of a logit).

Every text has exactly `--tokens` tokens: end-of-text and all ids above it have embeddings near zero, so that they are
never the most likely (`whisper_peers`). Timestamps are off in all: with random weights they have no order, and without
them openai-whisper has fewer rules to apply, so that the comparison favours it.

log_mel   one window of 30 s, 80 and 128 mels.
encoder   one window and a batch. The peers' encoders make no cross keys and values, `encode` does; both are rows.
decoding  from the encoder's output to tokens, cross keys and values included in all; batch sizes in one run.
int8      what 8-bit weights of the decoder save and cost. On a CPU they are expanded to float32 at each call.
long      `--minutes` of audio from samples to text: ours batched and in sequence, openai-whisper's `transcribe`,
          faster-whisper's batched pipeline; the same windows of 30 s, temperature 0, thresholds and prompts off.
          The audio is tones in noise, or the recordings of `--data_dir`.
gpu       large-v3 shapes in bfloat16 without peers, torch or files, against the peaks given as flags. Their defaults
          are NVIDIA's figures for an H200: 989 TFLOP/s in dense bfloat16, 4.8 TB/s. No GPU was at hand when this was
          written: the part is only tested with small shapes on a CPU.

"of limit" is the share of the time that the machine would need for the operations and bytes of `whisper_limits` at the
peaks, which are measured first (on a GPU: given). "first call" compiles; it is in no other figure. A comparison ends
after `--repeats` rounds, or with the round in which it passes `--seconds`; "calls" says how many there were.
More than 100 % says that the machine was slower when it was measured than in the comparison. The peers come with the
extra `test`; faster-whisper, which is optional, with `bench`.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.data.files import atomic_path

# JAX, torch and whatever starts threads are imported in functions: the process must be pinned before.

PARTS = ("log_mel", "encoder", "decoding", "int8", "long")
SIZES = ("tiny", "base", "small")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "openai-whisper", "transformers", "faster-whisper", "ctranslate2")


def pin(cores: int) -> None:
    """Keeps this process on that many cores, its CPU libraries to as many threads, and JAX on the CPU.

    Raises:
      ValueError: more cores than it may use; has both numbers.
      RuntimeError: a library that sizes its threads when it is imported was imported before; names it.
    """
    if started := {"numpy", "jax", "torch"} & sys.modules.keys():
        raise RuntimeError(f"pin must come before {', '.join(sorted(started))}, whose threads are counted at the start")
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(available):
        raise ValueError(f"cores must be in 1..{len(available)}, those that this process may use, got {cores}")
    os.sched_setaffinity(0, available[-cores:])
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(cores)


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, how busy they were, and versions of all that is measured."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cores_of_machine": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _print_machine(facts: dict[str, Any]) -> None:
    print(f"{facts['cpu']}: {facts['cores']} of {facts['cores_of_machine']} cores; ", end="")
    print(f"load average before this run {facts['load_average']:.1f} (fair figures need a quiet machine)")
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    print(f"Python {facts['python']}, {versions}", flush=True)


def main(arguments: argparse.Namespace, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs the parts, prints as it goes, and writes what it has to `--out` after each; returns all of it.

    Args:
      arguments: from `parse`.
      sizes: configs by name; the public ones if None.
    """
    from jaxaudio.models import whisper

    sizes = whisper.SIZES if sizes is None else sizes
    results: dict[str, Any] = {"machine": machine(), "arguments": vars(arguments)}
    _print_machine(results["machine"])

    def save() -> None:
        if arguments.out is not None:
            with atomic_path(arguments.out) as path:
                path.write_text(json.dumps(results, indent=1, default=str) + "\n")

    if arguments.parts == ["gpu"]:
        results["gpu"] = _gpu(sizes["large-v3"], arguments)
    else:
        _cpu(results, sizes, arguments, save)
    save()
    return results


def _cpu(results, sizes, arguments, save) -> None:
    import torch

    from experiments.benchmarks import whisper_limits, whisper_parts, whisper_peers

    torch.set_num_threads(arguments.cores)
    functions = {part: getattr(whisper_parts, f"{part}_part") for part in PARTS if part in arguments.parts}
    if "long" in functions:
        audio = whisper_parts.make_audio(60 * arguments.minutes, arguments.data_dir)
        functions["long"] = functools.partial(functions["long"], audio=audio)
    peaks = whisper_limits.measure_peaks(arguments.matmul_side, arguments.read_megabytes)
    results["peaks"] = dataclasses.asdict(peaks)
    print(f"float32 products reach {peaks.flops_per_s / 1e9:.0f} GFLOP/s, reads {peaks.bytes_per_s / 1e9:.1f} GB/s")
    if log_mel := functions.pop("log_mel", None):
        results["log_mel"] = log_mel(peaks, arguments)
        save()
    for name in arguments.sizes if functions else ():
        with tempfile.TemporaryDirectory() as folder:
            peers = whisper_peers.make_peers(sizes[name], pathlib.Path(folder), arguments.cores)
        for part, function in functions.items():
            results.setdefault(part, []).extend(function(name, peers, peaks, arguments))
            save()
        del peers  # before the next one is made


def _gpu(config, arguments) -> list[dict[str, Any]]:
    import jax  # and never torch

    from experiments.benchmarks.whisper_accelerator import accelerator_part
    from experiments.benchmarks.whisper_limits import Peaks

    if jax.default_backend() == "cpu":
        raise RuntimeError("the part gpu needs an accelerator, but jax.default_backend() is cpu")
    device = jax.devices()[0]
    peaks = Peaks(arguments.peak_tflops * 1e12, arguments.bandwidth_tb_s * 1e12)
    print(f"{device.device_kind} ({device.platform}); its peaks are taken to be {arguments.peak_tflops:g} TFLOP/s in ")
    print(f"bfloat16 and {arguments.bandwidth_tb_s:g} TB/s")
    return accelerator_part(dataclasses.replace(config, dtype="bfloat16"), peaks, arguments)


def _names(allowed: Sequence[str]):
    def split(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(allowed):
            raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; one of {', '.join(allowed)}")
        return text.split(",")

    return split


def _counts(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


def parse(argv: Sequence[str] | None = None, sizes: Sequence[str] = SIZES) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", type=_names([*PARTS, "gpu"]), default=list(PARTS), help=f"of {', '.join(PARTS)}; or gpu alone")
    add("--sizes", type=_names(sizes), default=list(sizes), help=f"of {', '.join(sizes)}")
    add("--cores", type=int, default=1, help="cores and threads of everything (default 1)")
    add(
        "--batch_sizes", type=_counts, default=[1, 8], help="of encoder and decoding; long takes the last (default 1,8)"
    )
    add("--tokens", type=int, default=100, help="of each window, at most 224 (default 100, which is usual speech)")
    add("--minutes", type=float, default=10, help="of audio in the parts long and gpu (default 10)")
    add("--data_dir", type=pathlib.Path, help="folder with recordings for the part long; tones in noise if not given")
    add("--windows", type=int, default=8, help="of the part int8 (default 8)")
    add("--repeats", type=int, default=7, help="timed rounds of each comparison at most (default 7)")
    add("--seconds", type=float, default=90, help="after which a comparison begins no further round (default 90)")
    add("--matmul_side", type=int, default=2048, help="of the matrices that measure the peak")
    add("--read_megabytes", type=int, default=512, help="of the array that measures the bandwidth")
    add("--batch_size", type=int, default=32, help="windows at once in the part gpu (default 32)")
    add("--peak_tflops", type=float, default=989, help="of the GPU in dense bfloat16 (default 989, an H200)")
    add("--bandwidth_tb_s", type=float, default=4.8, help="of the GPU's memory (default 4.8, an H200)")
    add("--out", type=pathlib.Path, help="JSON file for all figures, written after each part")
    arguments = parser.parse_args(argv)
    if "gpu" in arguments.parts and len(arguments.parts) > 1:
        parser.error(f"the part gpu runs alone, without the CPU's parts, got {','.join(arguments.parts)}")
    if not 1 <= arguments.tokens <= 224:
        parser.error(f"--tokens must be in 1..224, half the decoder's context, got {arguments.tokens}")
    if min(arguments.batch_sizes) < 1:
        parser.error(f"--batch_sizes must be positive, got {arguments.batch_sizes}")
    return arguments


if __name__ == "__main__":
    command_line = parse()
    if command_line.parts != ["gpu"]:
        pin(command_line.cores)
    raise_malloc_thresholds()
    main(command_line)
