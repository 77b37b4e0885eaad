"""The parts of the Whisper benchmark that compare us with peers on a CPU; see `experiments.benchmarks.whisper`."""

import argparse
import functools
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks import comparison, whisper_peers
from experiments.benchmarks import whisper_limits as limits
from experiments.benchmarks.comparison import claim, report
from experiments.benchmarks.timing import Timing, interleaved, table
from experiments.benchmarks.whisper_limits import Peaks
from experiments.benchmarks.whisper_peers import FASTER, OPENAI, TRANSFORMERS, WINDOW_S, Peers
from jaxaudio.data.audio import load_audio
from jaxaudio.generate.transcribe import transcribe
from jaxaudio.generate.whisper import DecodingOptions, decode, encode, inference_params, teacher_forced
from jaxaudio.models.whisper import SAMPLE_RATE
from jaxaudio.nn.transformer import cross_caches
from jaxaudio.ops.mel import whisper_log_mel

OURS = "ours"
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a")
Results = list[dict[str, Any]]


def make_audio(seconds: float, folder: pathlib.Path | None = None) -> np.ndarray:
    """Samples (A,) at 16 kHz: the recordings in `folder` one after the other, over and over, or tones in noise.

    Raises:
      ValueError: no recording there; names the folder.
    """
    num_samples = round(seconds * SAMPLE_RATE)
    if folder is None:
        rng = np.random.default_rng(0)
        second = np.arange(SAMPLE_RATE) / SAMPLE_RATE
        pitches = rng.uniform(80, 4000, (round(seconds) + 1, 3, 1))
        tones = 0.1 * np.sin(2 * np.pi * pitches * second).sum(1).ravel()[:num_samples]
        return (tones + 0.01 * rng.standard_normal(num_samples)).astype(np.float32)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no file ending in {', '.join(AUDIO_SUFFIXES)}")
    pieces, missing = [], num_samples
    while missing > 0:
        pieces.append(load_audio(files[len(pieces) % len(files)])[:missing])
        missing -= len(pieces[-1])
    return np.concatenate(pieces)


def random_mel(peers: Peers, batch_size: int) -> np.ndarray:
    """(B, M, T), spread like log-mels."""
    shape = (batch_size, peers.config.num_mels, peers.config.num_frames)
    return 0.4 * np.random.default_rng(0).standard_normal(shape, np.float32)


def log_mel_part(peaks: Peaks, arguments: argparse.Namespace) -> Results:
    """Log-mel of one window of 30 s."""
    waveform, results = make_audio(WINDOW_S)[None], []
    for num_mels in (80, 128):
        ours = _blocking(functools.partial(whisper_log_mel, num_mels=num_mels))
        functions = {OURS: ours} | whisper_peers.log_mels(num_mels)
        timings = _interleaved(functions, waveform, arguments, tolerance=1e-4)
        least_s = dict.fromkeys(timings, limits.log_mel_flops(num_mels, WINDOW_S) / peaks.flops_per_s)
        title = f"log-mel, {num_mels} mels, one window of 30 s"
        absent = {"faster-whisper"} - timings.keys()
        results.append(report(title, timings, dict.fromkeys(timings, 1), "windows", least_s, OPENAI, absent=absent))
        ratio = timings[OPENAI].median_s / timings[OURS].median_s
        results[-1]["claims"] = [claim(f"{OURS} / {OPENAI}", ratio, 1.7)]
    return results


def encoder_part(name: str, peers: Peers, peaks: Peaks, arguments: argparse.Namespace) -> Results:
    """From log-mel to the encoder's output; ours also with the decoder's cross keys and values, as `encode` makes them.

    The peers make those in the decoder's first step, so the comparison is without; the row with them is our real path.
    """
    model, config, results = peers.model, peers.config, []
    variables, params = {"params": peers.params}, inference_params(peers.params)
    # One window after the other, as `encode` takes them on a CPU.
    encoder = jax.jit(lambda mel: lax.map(lambda window: model.apply(variables, window[None], method="encode")[0], mel))
    with_cross = f"{OURS}, with cross keys"
    functions = {
        OURS: _blocking(lambda mel: encoder(mel.transpose(0, 2, 1))),
        with_cross: _blocking(lambda mel: encode(model, params, mel.transpose(0, 2, 1))),
        **whisper_peers.encoders(peers),
    }
    for batch_size in arguments.batch_sizes:
        mel = random_mel(peers, batch_size)
        ignore = (with_cross, FASTER["int8"])
        timings = _interleaved(functions, mel, arguments, tolerance=1e-4, ignore=ignore)
        least_s = dict.fromkeys(timings, limits.encoder_s(config, batch_size, peaks))
        least_s[with_cross] = limits.encoder_s(config, batch_size, peaks, cross=True)
        title, amounts = f"{name}, encoder, {batch_size} x 30 s", dict.fromkeys(timings, batch_size)
        results.append(report(title, timings, amounts, "windows", least_s, OPENAI, absent=_absent(timings)))
        floats = {OPENAI, TRANSFORMERS, FASTER["float32"]} & timings.keys()
        fastest = min(floats, key=lambda who: timings[who].median_s)
        ratios = {who: timings[fastest].median_s / timings[who].median_s for who in (OURS, with_cross)}
        results[-1]["claims"] = [
            claim(f"{OURS} / fastest float32 peer ({fastest})", ratios[OURS], 1.0),
            claim(f"{with_cross} / the same, which makes none", ratios[with_cross]),
        ]
    return results


def our_decoder(peers: Peers, num_tokens: int, *, int8: bool = False) -> Callable[[np.ndarray], list[list[int]]]:
    """Encoder's output (B, S, D) -> tokens of each row: cross keys and values (by the float weights), then `decode`."""
    floats, params = (inference_params(peers.params, int8=kind) for kind in (False, int8))
    cross = jax.jit(functools.partial(cross_caches, peers.config.decoder))
    options = DecodingOptions(language="en", sample_len=num_tokens, without_timestamps=True)

    def call(hidden):
        memory = cross(floats["decoder"]["transformer"], hidden)
        rows = [options] * len(hidden)
        results = decode(peers.model, params, peers.tokenizer, memory, jax.random.key(0), rows)
        return [list(result.tokens) for result in results]

    return call


def decoding_part(name: str, peers: Peers, peaks: Peaks, arguments: argparse.Namespace) -> Results:
    """Greedy decoding from the encoder's output, cross keys and values included; all batch sizes interleaved.

    openai-whisper's `transcribe` has one row; more rows are its `decode` given a batch.
    """
    num_tokens, batch_sizes = arguments.tokens, arguments.batch_sizes
    functions = {OURS: our_decoder(peers, num_tokens), f"{OURS}, int8": our_decoder(peers, num_tokens, int8=True)}
    functions |= whisper_peers.decoders(peers, num_tokens)
    hidden = whisper_peers.encoders(peers)[OPENAI](random_mel(peers, max(batch_sizes)))
    rows = {f"{who}, batch {size}": (who, size) for size in batch_sizes for who in functions}
    calls = {row: functools.partial(functions[who], hidden[:size]) for row, (who, size) in rows.items()}
    amounts = {row: size * num_tokens for row, (_, size) in rows.items()}
    least_s = {
        row: limits.decoding_s(peers.config, size, num_tokens, peaks, weight_bytes=1 if "int8" in who else 4)
        for row, (who, size) in rows.items()
    }
    same: dict[str, str] = {}

    def check(outputs: Mapping[str, list[list[int]]]) -> None:
        for row, (who, size) in rows.items():
            comparison.require_lengths(row, outputs[row], num_tokens)
            reference = outputs[f"{OPENAI}, batch {size}"]
            if who == OURS:
                logits = functools.partial(whisper_peers.openai_logits, peers, hidden)
                comparison.require_same_tokens(outputs[row], reference, logits)
            same[row] = f"{comparison.count_same(outputs[row], reference)}/{amounts[row]}"

    jax.clear_caches()  # so that the first call compiles
    timings = interleaved(calls, arguments.repeats, budget_s=arguments.seconds, check=check)
    title = f"{name}, decoding {num_tokens} tokens a row"
    note = f"same: tokens before the first that is not {OPENAI}'s"
    reference = f"{OPENAI}, batch {batch_sizes[0]}"
    result = report(title, timings, amounts, "tokens", least_s, reference, {"same": same}, _absent(functions), note)
    rates = {row: amounts[row] / timing.median_s for row, timing in timings.items()}
    result["claims"] = [
        claim(f"{OURS}, batch {size} / {OPENAI}, batch {of}", rates[f"{OURS}, batch {size}"] / rates[row], wanted)
        for size, of, wanted in ((1, 1, 1.2), (8, 1, 4.0), (8, 8, None))
        if {row := f"{OPENAI}, batch {of}", f"{OURS}, batch {size}"} <= rates.keys()
    ]
    return [result]


def int8_part(name: str, peers: Peers, peaks: Peaks, arguments: argparse.Namespace) -> Results:
    """What 8-bit weights of the decoder save and cost: bytes, logits, tokens. Their speed is in `decoding_part`.

    Random weights are a hard case: their best logits lie closer together than a trained model's.
    """
    model, num_tokens, num_windows = peers.model, arguments.tokens, arguments.windows
    params = [inference_params(peers.params, int8=int8) for int8 in (False, True)]
    mel = random_mel(peers, num_windows).transpose(0, 2, 1)
    options = [DecodingOptions(language="en", sample_len=num_tokens, without_timestamps=True)] * num_windows
    memories = [encode(model, x, mel) for x in params]
    exact, rounded = (
        [list(result.tokens) for result in decode(model, x, peers.tokenizer, memory, jax.random.key(0), options)]
        for x, memory in zip(params, memories, strict=True)
    )
    forced = jnp.asarray(exact, jnp.int32)
    pairs = zip(params, memories, strict=True)
    logits = [np.asarray(teacher_forced(model, x, memory, forced)[0]) for x, memory in pairs]
    best = [x.argmax(-1) for x in logits]
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(x["decoder"])) for x in params]
    result = {
        "title": f"{name}, 8-bit weights of the decoder against float32",
        "decoder_bytes": dict(zip(("float32", "int8"), sizes, strict=True)),
        "logits_relative_rms": comparison.relative_rms(logits[1], logits[0]),
        "tokens": num_windows * num_tokens,
        "same_best_logit": int(np.sum(best[0] == best[1])),
        "same_tokens": comparison.count_same(rounded, exact),
        "same_windows": sum(a == b for a, b in zip(rounded, exact, strict=True)),
    }
    rows = [
        ["MB of the decoder", f"{sizes[0] / 1e6:.1f} -> {sizes[1] / 1e6:.1f} ({sizes[0] / sizes[1]:.2f} times fewer)"],
        ["relative rms error of its logits", f"{result['logits_relative_rms']:.4f}"],
        ["same best logit after the same text", f"{result['same_best_logit']} of {result['tokens']}"],
        ["tokens before the first other one", f"{result['same_tokens']} of {result['tokens']}"],
        ["windows with the same text", f"{result['same_windows']} of {num_windows}"],
    ]
    print(f"\n{table([result['title'], ''], rows)}", flush=True)
    return [result]


def our_transcribers(peers: Peers, num_tokens: int, batch_size: int) -> dict[str, Callable[[np.ndarray], list]]:
    """By name: samples (A,) -> the tokens of each window, the same windows as `whisper_peers.transcribers`."""
    params = inference_params(peers.params)

    def call(audio, **mode):
        result = transcribe(
            peers.model,
            params,
            audio,
            tokenizer=peers.tokenizer,
            language="en",
            temperature=0.0,
            sample_len=num_tokens,
            without_timestamps=True,
            compression_ratio_threshold=None,
            logprob_threshold=None,
            no_speech_threshold=None,
            **mode,
        )
        return [list(segment.tokens) for segment in result.segments]

    def batched(audio):
        spans = whisper_peers.windows(len(audio))
        return call(audio, batched=True, batch_size=batch_size, vad=lambda blocks: spans)

    def in_sequence(audio):
        return call(audio, condition_on_previous_text=False)

    return {f"{OURS}, batched": batched, f"{OURS}, in sequence": in_sequence}


def long_part(name: str, peers: Peers, peaks: Peaks, arguments: argparse.Namespace, *, audio: np.ndarray) -> Results:
    """Samples (A,) to text, in windows of 30 s that hold the same number of tokens in all rows."""
    config, num_tokens, batch_size = peers.config, arguments.tokens, max(arguments.batch_sizes)
    seconds = len(audio) / SAMPLE_RATE
    num_windows = len(whisper_peers.windows(len(audio)))
    functions = our_transcribers(peers, num_tokens, batch_size)
    functions |= whisper_peers.transcribers(peers, num_tokens, batch_size)
    mel_s = limits.log_mel_flops(config.num_mels, seconds) / peaks.flops_per_s

    def least(who: str) -> float:
        size = batch_size if "batched" in who else 1
        weight_bytes = 1 if "int8" in who else 4
        decoding_s = limits.decoding_s(config, size, num_tokens, peaks, weight_bytes=weight_bytes)
        return mel_s + num_windows * (limits.encoder_s(config, 1, peaks) + decoding_s / size)

    same: dict[str, str] = {}

    def check(outputs: Mapping[str, list[list[int]]]) -> None:
        for who, texts in outputs.items():
            if len(texts) != num_windows:
                raise ValueError(f"{who} heard {len(texts)} windows, not {num_windows}; nothing is timed")
            comparison.require_lengths(who, texts, num_tokens)
            equal = sum(a == b for a, b in zip(texts, outputs[OPENAI], strict=True))
            if who.startswith(OURS) and equal < num_windows * 3 / 4:  # a tie of logits may part a few
                raise ValueError(f"{who} gives {OPENAI}'s text in {equal} of {num_windows} windows; nothing is timed")
            same[who] = f"{equal}/{num_windows}"

    jax.clear_caches()
    calls = {who: functools.partial(function, audio) for who, function in functions.items()}
    timings = interleaved(calls, arguments.repeats, budget_s=arguments.seconds, check=check)
    heard = "tones in noise" if arguments.data_dir is None else f"recordings of {arguments.data_dir.name}"
    title = f"{name}, {seconds:g} s of audio ({heard}), {num_windows} windows of {num_tokens} tokens, "
    title += f"batched: {batch_size} at once"
    note = f"same: windows with {OPENAI}'s text"
    least_s = {who: least(who) for who in timings}
    amounts = dict.fromkeys(timings, seconds)
    absent = _absent(timings, suffix=", batched")
    result = report(title, timings, amounts, "s of audio", least_s, OPENAI, {"same": same}, absent, note)
    ours = timings[f"{OURS}, batched"]
    result["claims"] = [claim(f"{OURS}, batched / {OPENAI}", timings[OPENAI].median_s / ours.median_s, 3.0)]
    result["compile_s"] = ours.first_s - ours.median_s
    print(f"{OURS}, batched, compiled for {result['compile_s']:.1f} s before that", flush=True)
    return [result]


def _blocking(function: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    return lambda x: jax.block_until_ready(function(x))


def _absent(found: Collection[str], suffix: str = "") -> list[str]:
    return [who + suffix for who in FASTER.values() if who + suffix not in found]


def _interleaved(
    functions: Mapping[str, Callable], x: np.ndarray, arguments: argparse.Namespace, **tolerance: Any
) -> dict[str, Timing]:
    """Timings of functions of x that compute the same array as openai-whisper's, to the tolerance."""
    jax.clear_caches()  # so that the first call compiles
    check = functools.partial(comparison.require_close, reference=OPENAI, **tolerance)
    calls = {who: functools.partial(function, x) for who, function in functions.items()}
    return interleaved(calls, arguments.repeats, budget_s=arguments.seconds, check=check)
