"""Whisper on an accelerator, without peers: encoder, decoding and long audio beside the device's published peaks.

Needs neither torch nor librosa nor any file: weights are random, and the vocabulary is made up to the right size.
"""

import argparse
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import comparison
from experiments.benchmarks import whisper_limits as limits
from experiments.benchmarks.comparison import report
from experiments.benchmarks.timing import interleaved
from experiments.benchmarks.whisper_limits import Peaks
from jaxaudio.data.byte_pair import BytePairEncoding
from jaxaudio.data.whisper_tokenizer import LANGUAGES, WhisperTokenizer
from jaxaudio.generate.transcribe import transcribe
from jaxaudio.generate.whisper import DecodingOptions, decode, encode, inference_params
from jaxaudio.models.whisper import SAMPLE_RATE, Whisper, WhisperConfig

WINDOW_S = 30
VALUE_BYTES = 2  # of bfloat16
_NUM_SPECIAL = len(LANGUAGES) + 8 + 1501


def made_up_tokenizer(vocab_size: int) -> WhisperTokenizer:
    """Whisper's special tokens after as many byte strings as make a vocabulary of that size: bytes, then pairs."""
    pairs = (bytes([first, second, third]) for first in range(256) for second in range(256) for third in (0, 1))
    num_ranks = vocab_size - _NUM_SPECIAL
    tokens = [bytes([i]) for i in range(256)] + [next(pairs) for _ in range(num_ranks - 256)]
    return WhisperTokenizer.for_ranks(BytePairEncoding(tuple(tokens)), languages=tuple(LANGUAGES))


def random_params(config: WhisperConfig, first_special: int) -> Any:
    """Random parameters in bfloat16; as in `whisper_peers`, no text ends early and none has times."""
    model = Whisper(config)

    @jax.jit
    def init(key):
        mel = jnp.zeros((1, config.num_frames, config.num_mels))
        params = nn.meta.unbox(model.init(key, mel, jnp.zeros((1, 1), jnp.int32))["params"])
        table = params["decoder"]["token_embedding"].at[first_special:].multiply(0.01)
        params = params | {"decoder": params["decoder"] | {"token_embedding": 3 * table}}
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    return init(jax.random.key(0))


def accelerator_part(config: WhisperConfig, peaks: Peaks, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`encode` and `decode` of a batch of windows, then `transcribe` of long audio, batched.

    Args:
      config: the shapes; the work is done in its dtype, bfloat16.
      peaks: of the device, as its maker publishes them for bfloat16.
      arguments: batch_size, tokens, minutes, repeats and seconds of the command line.
    """
    model, tokenizer = Whisper(config), made_up_tokenizer(config.vocab_size)
    params = random_params(config, tokenizer.eot)
    kinds = {"bfloat16": inference_params(params), "int8 decoder": inference_params(params, int8=True)}
    return [
        _windows(model, tokenizer, kinds, peaks, arguments),
        _long(model, tokenizer, kinds["bfloat16"], peaks, arguments),
    ]


def _windows(model, tokenizer, kinds, peaks, arguments) -> dict[str, Any]:
    config, size, num_tokens = model.config, arguments.batch_size, arguments.tokens
    shape = (size, config.num_frames, config.num_mels)
    mel = jax.device_put(0.4 * np.random.default_rng(0).standard_normal(shape, np.float32))
    options = [DecodingOptions(language="en", sample_len=num_tokens, without_timestamps=True)] * size
    memory = None  # of the latest call of `encoder`, which comes first

    def encoder():
        nonlocal memory
        memory = jax.block_until_ready(encode(model, kinds["bfloat16"], mel))

    def decoder(kind):
        results = decode(model, kinds[kind], tokenizer, memory, jax.random.key(0), options)
        return [result.tokens for result in results]

    def check(outputs):
        for kind in kinds:
            comparison.require_lengths(kind, outputs[f"decode, {kind}"], num_tokens)

    calls = {"encode": encoder} | {f"decode, {kind}": functools.partial(decoder, kind) for kind in kinds}
    amounts = {row: size * (1 if row == "encode" else num_tokens) for row in calls}
    least_s = {"encode": limits.encoder_s(config, size, peaks, cross=True)}
    for kind, weight_bytes in (("bfloat16", VALUE_BYTES), ("int8 decoder", 1)):
        item_bytes = {"weight_bytes": weight_bytes, "value_bytes": VALUE_BYTES}
        least_s[f"decode, {kind}"] = limits.decoding_s(config, size, num_tokens, peaks, cross=False, **item_bytes)
    timings = interleaved(calls, arguments.repeats, budget_s=arguments.seconds, check=check)
    title = f"{size} windows of 30 s, {num_tokens} tokens each"
    return report(title, timings, amounts, "windows or tokens", least_s, "decode, bfloat16")


def _long(model, tokenizer, params, peaks, arguments) -> dict[str, Any]:
    config, size, num_tokens, seconds = model.config, arguments.batch_size, arguments.tokens, 60 * arguments.minutes
    audio = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * SAMPLE_RATE), np.float32)
    spans = [(float(s), min(float(s + WINDOW_S), float(seconds))) for s in range(0, int(seconds), WINDOW_S)]

    def call():
        result = transcribe(
            model,
            params,
            audio,
            tokenizer=tokenizer,
            language="en",
            temperature=0.0,
            sample_len=num_tokens,
            without_timestamps=True,
            compression_ratio_threshold=None,
            logprob_threshold=None,
            no_speech_threshold=None,
            batched=True,
            batch_size=size,
            vad=lambda blocks: spans,
        )
        return [segment.tokens for segment in result.segments]

    def check(outputs):
        if len(outputs["transcribe"]) != len(spans):
            raise ValueError(f"heard {len(outputs['transcribe'])} windows, not {len(spans)}; nothing is timed")
        comparison.require_lengths("transcribe", outputs["transcribe"], num_tokens)

    item_bytes = {"weight_bytes": VALUE_BYTES, "value_bytes": VALUE_BYTES}
    decoding_s = limits.decoding_s(config, size, num_tokens, peaks, **item_bytes)
    least_s = limits.log_mel_flops(config.num_mels, seconds) / peaks.flops_per_s
    least_s += len(spans) * (limits.encoder_s(config, 1, peaks) + decoding_s / size)
    timings = interleaved({"transcribe": call}, arguments.repeats, budget_s=arguments.seconds, check=check)
    title = f"{arguments.minutes:g} minutes of audio, {len(spans)} windows of {num_tokens} tokens, batches of {size}"
    found = report(title, timings, {"transcribe": seconds}, "s of audio", {"transcribe": least_s}, "transcribe")
    found["seconds_per_hour"] = 3600 / seconds * timings["transcribe"].median_s
    print(f"{found['seconds_per_hour']:.1f} s per hour of audio", flush=True)
    return found
