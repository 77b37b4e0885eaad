"""Resampling by a rational factor inside a compiled program."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxaudio.ops.stft import frame

_LARGEST_KERNEL = 1 << 25


@functools.partial(jax.jit, static_argnames=("up", "down"))
def resample(waveform: Float[Array, "B A"], up: int, down: int) -> Float[Array, "B R"]:
    """The waveform at up/down times its sample rate, as scipy.signal.resample_poly with its default filter.

    Output m is the sum over inputs i of waveform[i] * h[m * down - i * up], where h is a low-pass of
    20 max(up, down) + 1 taps and the waveform zero beyond its ends. Polyphase: a block of outputs is one matrix product
    with the inputs around it, so that no stuffed zero is multiplied.

    Args:
      waveform: samples at the old rate.
      up, down: the new rate and the old one; common factors do not matter.
    Returns:
      R = ceil(A * up / down) samples, aligned with the input at sample 0.
    Raises:
      ValueError: up or down is not positive, or their ratio needs too large a matrix (prime rates of five digits); the
        message carries them.
    """
    if min(up, down) < 1:
        raise ValueError(f"expected positive up and down, got up = {up} and down = {down}")
    up, down = up // math.gcd(up, down), down // math.gcd(up, down)
    if up == down:
        return waveform
    batch, num_samples = waveform.shape
    num_outputs = -(-num_samples * up // down)
    kernel, before = _block_kernel(up, down)
    length, outputs = kernel.shape
    hop = outputs * down // up
    num_blocks = -(-num_outputs // outputs)
    after = max((num_blocks - 1) * hop + length - before - num_samples, 0)
    padded = jnp.pad(waveform.astype(jnp.float32), ((0, 0), (before, after)))
    frames = frame(padded, length, hop)[:, :num_blocks]
    blocks = jnp.einsum("BTI,IO->BTO", frames, jnp.asarray(kernel), precision=lax.Precision.HIGHEST)
    return blocks.reshape(batch, -1)[:, :num_outputs]


@functools.lru_cache(maxsize=16)
def _block_kernel(up: int, down: int) -> tuple[np.ndarray, int]:
    """(inputs, outputs) matrix of one block, and how many inputs it reads before the block's own.

    A block is a multiple of `up` outputs and as many times `down` inputs: enough that the filter's reach to both sides,
    which every block reads anew, is no larger part of the product than the block itself.
    """
    half = 10 * max(up, down)
    reach = half // up
    periods = max(1, round(2 * reach / down))
    length = periods * down + 2 * reach
    if length * periods * up > _LARGEST_KERNEL:
        raise ValueError(
            f"up = {up} and down = {down} have no common factor and need a matrix of {length} x {periods * up}; "
            "choose rates with a smaller ratio, or resample on the host"
        )
    outputs, inputs = np.arange(periods * up), np.arange(-reach, periods * down + reach)
    position = outputs[None] * down - inputs[:, None] * up
    taps = np.where(abs(position) <= half, _low_pass(half, max(up, down))[np.clip(position, -half, half) + half], 0)
    return (up * taps).astype(np.float32), reach


def _low_pass(half: int, max_rate: int) -> np.ndarray:
    """2 half + 1 taps of a low-pass at 1 / max_rate of Nyquist: a windowed sinc (Kaiser, beta 5) with unit sum."""
    taps = np.sinc(np.arange(-half, half + 1) / max_rate) * np.kaiser(2 * half + 1, 5.0)
    return taps / taps.sum()
