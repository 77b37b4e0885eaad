"""What a machine could do at best: the work of Whisper by formula, and the speed of one product and of one long read.

An encoder is limited by floating-point operations. A decoder's step reads every weight, and the keys and values of each
row, to make one token a row: it is limited by bytes, until there are many rows. Figures count what the mathematics
needs, a product and a sum each, and leave out norms, activations, softmax and what an implementation reads twice.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import interleaved
from jaxaudio.models.whisper import HOP_LENGTH, N_FFT, SAMPLE_RATE, WhisperConfig

PROMPT_LENGTH = 4  # start, language, task, no timestamps


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The fastest product of matrices, in operations a second, and the fastest read of memory, in bytes a second."""

    flops_per_s: float
    bytes_per_s: float


def log_mel_flops(num_mels: int, seconds: float) -> float:
    """A real transform of n samples costs 5/2 n log2(n); then the product with the filters."""
    frames = seconds * SAMPLE_RATE / HOP_LENGTH
    return frames * (2.5 * N_FFT * math.log2(N_FFT) + 2 * (N_FFT // 2 + 1) * num_mels)


def encoder_flops(config: WhisperConfig, batch_size: int) -> int:
    """Two convolutions, then per layer the projections, the MLP and attention's two products."""
    dim, length = config.embed_dim, config.num_positions
    convolutions = 3 * config.num_mels * dim * config.num_frames + 3 * dim * dim * length
    layer = length * 12 * dim**2 + 2 * length**2 * dim
    return 2 * batch_size * (convolutions + config.num_encoder_layers * layer)


def cross_flops(config: WhisperConfig, batch_size: int) -> int:
    """Keys and values of the decoder's cross-attention, once a window."""
    return 2 * batch_size * config.num_decoder_layers * 2 * config.num_positions * config.embed_dim**2


def step_weights(config: WhisperConfig) -> int:
    """Weights that a decoding step reads: 14 D^2 a layer (keys and values of the audio are made before), the tokens."""
    return config.num_decoder_layers * 14 * config.embed_dim**2 + config.vocab_size * config.embed_dim


def step_bytes(
    config: WhisperConfig, batch_size: int, num_seen: float, *, weight_bytes: int = 4, value_bytes: int = 4
) -> float:
    """Bytes that one decoding step reads: weights, keys and values of the audio and of the tokens so far."""
    values = config.num_decoder_layers * 2 * (config.num_positions + num_seen) * config.embed_dim
    return weight_bytes * step_weights(config) + value_bytes * batch_size * values


def step_flops(config: WhisperConfig, batch_size: int, num_seen: float) -> float:
    """Operations of one decoding step."""
    attended = config.num_decoder_layers * 2 * (config.num_positions + num_seen) * config.embed_dim
    return 2 * batch_size * (step_weights(config) + attended)


def encoder_s(config: WhisperConfig, batch_size: int, peaks: Peaks, *, cross: bool = False) -> float:
    """Least seconds of the encoder."""
    return (encoder_flops(config, batch_size) + cross * cross_flops(config, batch_size)) / peaks.flops_per_s


def decoding_s(
    config: WhisperConfig, batch_size: int, num_tokens: int, peaks: Peaks, *, cross: bool = True, **item_bytes: int
) -> float:
    """Least seconds to `num_tokens` tokens a row, from the encoder's output or (cross=False) its cross keys and values;
    `item_bytes` as of `step_bytes`."""
    num_seen = PROMPT_LENGTH + (num_tokens - 1) / 2  # on average
    bytes_s = step_bytes(config, batch_size, num_seen, **item_bytes) / peaks.bytes_per_s
    flops_s = step_flops(config, batch_size, num_seen) / peaks.flops_per_s
    cross_s = cross * cross_flops(config, batch_size) / peaks.flops_per_s
    return cross_s + num_tokens * max(bytes_s, flops_s)


def measure_peaks(side: int, megabytes: int, repeats: int = 5) -> Peaks:
    """Of this CPU in float32: the fastest of JAX and PyTorch, at a product of square matrices and at reading an array.

    Args:
      side: of the matrices.
      megabytes: of the array, much larger than the caches.
      repeats: timed calls of each, of which the fastest counts.
    """
    import torch

    rng = np.random.default_rng(0)
    square = rng.standard_normal((side, side), np.float32)
    rows = np.ones((megabytes * 10**6 // 4096 // 4, 4096), np.float32)
    vector = np.ones(4096, np.float32)
    ours, theirs = jax.device_put((square, rows, vector)), [torch.from_numpy(x) for x in (square, rows, vector)]
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)

    def fastest(calls):
        return min(timing.min_s for timing in interleaved(calls, repeats).values())

    flops_s = fastest(
        {
            "jax": lambda: jax.block_until_ready(product(ours[0], ours[0])),
            "torch": lambda: theirs[0] @ theirs[0],
        }
    )
    bytes_s = fastest(
        {
            "jax, sum": lambda: jax.block_until_ready(total(ours[1])),
            "jax, product": lambda: jax.block_until_ready(product(ours[1], ours[2])),
            "torch, sum": functools.partial(torch.sum, theirs[1]),
            "torch, product": lambda: theirs[1] @ theirs[2],
        }
    )
    return Peaks(2 * side**3 / flops_s, rows.nbytes / bytes_s)
