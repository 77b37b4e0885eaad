"""The parts of the codecs' benchmark that run on a CPU; see `experiments.benchmarks.codecs`."""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import codec_limits as limits
from experiments.benchmarks import comparison
from experiments.benchmarks.codec_peers import Peers
from experiments.benchmarks.comparison import claim, report
from experiments.benchmarks.timing import interleaved, table
from experiments.benchmarks.whisper_limits import Peaks
from jaxaudio.generate.codec import Encoded

OURS, PEER = "ours", "transformers"
LEAST_EQUAL = 0.99  # of the codes; the rest are ties to the last digits, and what follows them on later levels


def make_audio(config, duration_s: float) -> np.ndarray:
    """Samples (A,): noise whose loudness changes."""
    num_samples = round(duration_s * config.sample_rate)
    seconds = np.arange(num_samples) / config.sample_rate
    loudness = 0.05 + 0.1 * np.sin(2 * np.pi * seconds) ** 2
    return (loudness * np.random.default_rng(0).standard_normal(num_samples)).astype(np.float32)


def offline_part(peers: Peers, peaks: Peaks, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A recording to codes, and the same codes to a recording."""
    codec, duration_s = peers.codec, arguments.duration_s
    waveform = make_audio(codec.config, duration_s)
    codes = np.array(peers.encode(waveform), np.int32)
    num_codebooks, num_frames = codes.shape
    encoded = Encoded(codes, len(waveform))
    equal: dict[str, str] = {}

    def check_codes(outputs):
        for who, found in outputs.items():
            if found.shape != codes.shape:
                raise ValueError(f"{who} gives codes of shape {found.shape}, expected {codes.shape}; nothing is timed")
            share = np.mean(found == codes)
            if share < LEAST_EQUAL:
                raise ValueError(f"{who} gives {share:.1%} of {PEER}'s codes, not {LEAST_EQUAL:.0%}; nothing is timed")
            equal[who] = f"{share:.2%}"

    def check_audio(outputs):
        shortest = min(map(len, outputs.values()))  # transformers' DAC may give less or more than the recording
        cut = {who: found[:shortest] for who, found in outputs.items()}
        comparison.require_close(cut, PEER, tolerance=1e-4)

    def compare(what, functions, check, flops, columns):
        jax.clear_caches()  # so that the first call compiles
        timings = interleaved(functions, arguments.repeats, budget_s=arguments.seconds, check=check)
        title = f"{codec.name}, {what} {duration_s:g} s, {num_codebooks} codebooks"
        title += f" ({len(np.unique(codes))} different codes), {flops / 1e9:.0f} GFLOP"
        amounts, least_s = dict.fromkeys(timings, duration_s), dict.fromkeys(timings, flops / peaks.flops_per_s)
        result = report(title, timings, amounts, "s of audio", least_s, PEER, columns)
        ratio = timings[PEER].median_s / timings[OURS].median_s
        return result | {"claims": [claim(f"{OURS} / {PEER}", ratio, 1.0)]}

    encoders = {
        OURS: lambda: codec.encode(waveform, num_codebooks=num_codebooks).codes,
        PEER: lambda: peers.encode(waveform),
    }
    decoders = {OURS: lambda: codec.decode(encoded).ravel(), PEER: lambda: peers.decode(codes)}
    flops = limits.encode_flops(codec.config, num_frames, num_codebooks)
    encoding = compare("encode", encoders, check_codes, flops, {"codes equal": equal})
    flops = limits.decode_flops(codec.config, num_frames, num_codebooks)
    return [encoding, compare("decode", decoders, check_audio, flops, {})]


def latency_part(peers: Peers, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a frame's arrival to its output."""
    codec, count = peers.codec, peers.num_codebooks
    frame_s, hop = 1 / codec.config.frame_rate, codec.config.hop_length
    waveform = make_audio(codec.config, arguments.duration_s)
    waveform = waveform[: len(waveform) // hop * hop]
    codes = codec.encode(waveform, num_codebooks=count).codes

    def encoder() -> Iterator[Any]:
        blocks = np.split(waveform, len(waveform) // hop)
        return codec.encode_blocks(blocks, num_codebooks=count, chunk_s=frame_s)

    def decoder() -> Iterator[Any]:
        return codec.decode_blocks(((codes[:, [t]], None) for t in range(codes.shape[1])), chunk_s=frame_s)

    result: dict[str, Any] = {"title": f"{codec.name}, a frame of {1000 * frame_s:.1f} ms, {count} codebooks"}
    rows = []
    for what, stream in (("encode", encoder), ("decode", decoder)):
        first_s = sum(_waits(stream))
        waits = np.array(_waits(stream))[1:]  # the first piece of EnCodec is several frames
        found = {"median_s": np.median(waits), "p95_s": np.quantile(waits, 0.95), "max_s": waits.max()}
        result[what] = {name: float(value) for name, value in found.items()} | {"frames": len(waits)}
        result[what]["compile_s"] = first_s - waits.sum()
        cells = [f"{1000 * value:.3g}" for value in found.values()]
        rows.append(
            [what, *cells, f"{found['median_s'] / frame_s:.1%}", len(waits), f"{result[what]['compile_s']:.3g}"]
        )
    header = ["", "median ms", "95 % ms", "max ms", "of a frame", "frames", "compiled s"]
    print(f"\n{result['title']}\n{table(header, rows)}", flush=True)
    return result


def _waits(stream: Callable[[], Iterator[Any]]) -> list[float]:
    """Seconds until each of the pieces."""
    pieces, waits = stream(), []
    start = time.perf_counter()
    for _ in pieces:
        end = time.perf_counter()
        waits.append(end - start)
        start = end
    return waits
