"""Dropout whose random generator is a choice: on a CPU the generator, not the arithmetic, is most of its cost."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

Generator = Literal["jax", "hash"]


def keep_mask(
    key: Key[Array, ""], shape: tuple[int, ...], rate: float, generator: Generator = "jax"
) -> Bool[Array, "..."]:
    """Which entries survive dropout: each independently with probability 1 - rate (to 2^-32).

    Both generators depend on the index in the whole array only, so the mask is the same however the array is sharded.

    Args:
      key: one key, consumed here.
      shape: shape of the mask.
      rate: probability of dropping, in [0, 1).
      generator: "jax" draws 32 bits an entry from the key's own generator (threefry by default: cryptographic, 20
        rounds). "hash" draws one 64-bit seed from the key and mixes it with each entry's index by a two-multiply
        integer hash (lowbias32 of C. Wellons' hash-prospector): a tenth of the time on a CPU, plenty for dropout.
    Raises:
      ValueError: if rate is outside [0, 1) or the generator is unknown; the message carries the value.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
    threshold = jnp.uint32(round(rate * 2**32))
    if generator == "jax":
        return jax.random.bits(key, shape, jnp.uint32) >= threshold
    if generator != "hash":
        raise ValueError(f"dropout generator must be 'jax' or 'hash', got {generator!r}")
    offset, flip = jax.random.bits(key, (2,), jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    word = (index + offset) ^ flip
    word = (word ^ (word >> 16)) * jnp.uint32(0x21F0AAAD)
    word = (word ^ (word >> 15)) * jnp.uint32(0xD35A2D97)
    return word ^ (word >> 15) >= threshold


def dropout(
    key: Key[Array, ""], x: Float[Array, "*shape"], rate: float, generator: Generator = "jax"
) -> Float[Array, "*shape"]:
    """Zeroes entries of x with probability rate and scales the rest by 1 / (1 - rate); see `keep_mask`."""
    return jnp.where(keep_mask(key, x.shape, rate, generator), x / (1.0 - rate), 0.0).astype(x.dtype)
