"""Choosing the next token from logits; every option is an array, so one compiled program serves all values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """Options of each row.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: only the k most likely tokens may be drawn; 0 allows all.
      top_p: only the smallest set of most likely tokens whose probability reaches p may be drawn (nucleus sampling,
        Holtzman et al. 2020); 1 allows all. Applied after temperature and top_k.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]


def make_sampling(batch_size: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    """The same options for every row.

    Raises:
      ValueError: temperature or top_k below 0, or top_p outside (0, 1]; the message carries the value.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0 allows all tokens), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    return Sampling(
        jnp.full(batch_size, temperature, jnp.float32),
        jnp.full(batch_size, top_k, jnp.int32),
        jnp.full(batch_size, top_p, jnp.float32),
    )


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Scales by temperature and sets the tokens that top_k and top_p exclude to -inf; ties with the last kept stay."""
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    logits = logits.astype(jnp.float32) / temperature[:, None]
    descending = -jnp.sort(-logits, axis=-1)
    last = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, logits.shape[-1]), logits.shape[-1]) - 1
    threshold = jnp.take_along_axis(descending, last[:, None], axis=-1)
    logits, descending = (jnp.where(x >= threshold, x, -jnp.inf) for x in (logits, descending))
    probabilities = jax.nn.softmax(descending, axis=-1)
    # A token stays if those before it have not reached p; the first one always does.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    in_nucleus = (before < sampling.top_p[:, None]) | (sampling.top_p[:, None] >= 1)
    smallest = jnp.min(jnp.where(in_nucleus, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def most_likely(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """argmax, the first of equals; jnp.argmax reduces pairs of value and index, which takes a CPU nine times longer."""
    index = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, index, logits.shape[-1] - 1), axis=-1)


def sample(keys: Key[Array, " B"], logits: Float[Array, "B V"], sampling: Sampling) -> Int[Array, " B"]:
    """Draws one token per row with the row's own key, so a row's result does not depend on the others."""
    filtered = filter_logits(logits, sampling)
    drawn = jax.vmap(jax.random.categorical)(keys, filtered)
    return jnp.where(sampling.temperature > 0, drawn, most_likely(logits)).astype(jnp.int32)
