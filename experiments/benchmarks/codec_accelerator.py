"""The codecs on an accelerator, without peers: seconds of audio a second beside the device's published peak.

Needs neither torch nor any file: weights are random.
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import codec_limits as limits
from experiments.benchmarks.comparison import report
from experiments.benchmarks.timing import interleaved
from jaxaudio.models import dac, encodec, mimi

PRESETS = encodec.PRESETS | dac.PRESETS | mimi.PRESETS
MODELS = {encodec.EnCodecConfig: encodec.EnCodec, dac.DACConfig: dac.DAC, mimi.MimiConfig: mimi.Mimi}


def accelerator_part(name: str, config: Any, num_codebooks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """`encode` and `decode` of a batch of recordings that lie on the device.

    Args:
      name: of the codec, for people.
      config: of one of `MODELS`.
      num_codebooks: levels of codes.
      arguments: batch_size, duration_s, peak_tflops, repeats and seconds of the command line.
    """
    model, size = MODELS[type(config)](config), arguments.batch_size
    num_frames = max(1, round(arguments.duration_s * config.frame_rate))
    num_samples = num_frames * config.hop_length
    noise = 0.1 * np.random.default_rng(0).standard_normal((size, num_samples, config.channels), np.float32)
    waveform, levels = jax.device_put(noise), jnp.full(1, config.num_codebooks, jnp.int32)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), waveform[:1], levels)["params"])

    @jax.jit
    def encode(params, waveform):
        return model.apply({"params": params}, waveform, num_codebooks, method="encode")[0]

    @jax.jit
    def decode(params, codes):
        return model.apply({"params": params}, codes, method="decode")[0]

    codes = encode(params, waveform)
    calls = {
        "encode": lambda: jax.block_until_ready(encode(params, waveform)),
        "decode": lambda: jax.block_until_ready(decode(params, codes)),
    }
    flops = {
        "encode": limits.encode_flops(config, num_frames, num_codebooks),
        "decode": limits.decode_flops(config, num_frames, num_codebooks),
    }
    jax.clear_caches()  # so that the first call compiles
    timings = interleaved(calls, arguments.repeats, budget_s=arguments.seconds)
    duration_s = num_samples / config.sample_rate
    title = f"{name}, {size} recordings of {duration_s:g} s, {num_codebooks} codebooks"
    least_s = {row: size * one / (1e12 * arguments.peak_tflops) for row, one in flops.items()}
    return report(title, timings, dict.fromkeys(calls, size * duration_s), "s of audio", least_s, "decode")
