"""Position encodings: sinusoids, rotary phases and T5's distance buckets."""

import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sinusoids(
    positions: Int[Array, "*shape"],
    dim: int,
    *,
    max_period: float = 1e4,
    order: Literal["sin_cos", "cos_sin"] = "sin_cos",
) -> Float[Array, "*shape {dim}"]:
    """Absolute sinusoids in two halves, with dim/2 - 1 in the exponent as tensor2tensor and MusicGen have it.

    Vaswani et al. 2017, section 3.5, interleaves the halves and divides by dim/2; the public music models do not.

    Args:
      positions: integer positions, any shape.
      dim: even width, at least 4.
      max_period: ratio of the longest to the shortest period.
      order: "sin_cos" (tensor2tensor) or "cos_sin" (MusicGen).
    Raises:
      ValueError: if dim is odd or below 4; the message carries it.
    """
    if dim % 2 or dim < 4:
        raise ValueError(f"sinusoids need an even dim of at least 4, got {dim}")
    half = dim // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(max_period) / (half - 1)))
    phase = positions[..., None].astype(jnp.float32) * frequencies.reshape((1,) * positions.ndim + (half,))
    waves = [jnp.sin(phase), jnp.cos(phase)]
    return jnp.concatenate(waves if order == "sin_cos" else waves[::-1], axis=-1)


def rotate(x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], *, base: float = 1e4) -> Float[Array, "B T N H"]:
    """Rotary embedding: turns the pair (x[i], x[i + H/2]) by positions * base^(-2i/H).

    Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.4, in the two-halves layout of Llama and Qwen.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    phase = positions[..., None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, half)
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def t5_buckets(
    distance: Int[Array, "*shape"], *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Int[Array, "*shape"]:
    """T5's bucket of a distance: exact when near, logarithmic up to max_distance, one bucket beyond.

    Raffel et al. 2020, section 2.1, and the released code.

    Args:
      distance: key position minus query position.
      num_buckets: buckets in all; halved per side when bidirectional.
      max_distance: distances from here on share the last bucket.
      bidirectional: False puts every later key into bucket 0 (decoders).
    """
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return bucket + jnp.where(distance < exact, distance, far)
