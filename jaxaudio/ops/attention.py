"""Attention: one function for every mask, grouped heads and backend; and the key-value cache of decoding."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jaxaudio.ops import dropout as dropout_ops

Implementation = Literal["auto", "xla", "mapped", "cudnn"]
MASKED = -1e30  # finite, so that a fully masked row has no NaN in its gradient


def causal_mask(query_length: int, key_length: int, *, window: int | None = None) -> Bool[Array, "T S"]:
    """True where the key is not in the query's future; with a window, also where it is less than `window` back.

    Query t stands at position key_length - query_length + t::

        causal_mask(3, 3)  1 0 0      causal_mask(3, 3, window=2)  1 0 0
                           1 1 0                                   1 1 0
                           1 1 1                                   0 1 1
    """
    query = lax.broadcasted_iota(jnp.int32, (query_length, key_length), 0) + key_length - query_length
    key = lax.broadcasted_iota(jnp.int32, (query_length, key_length), 1)
    mask = query >= key
    return mask if window is None else mask & (query - key < window)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    mask: Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    dropout_generator: dropout_ops.Generator = "jax",
    implementation: Implementation = "auto",
) -> Float[Array, "B T N Hv"]:
    """softmax(scale * q k^T + bias) v with grouped heads: query head n reads key-value head n // (N // K).

    Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023. Softmax in float32 whatever the inputs are.

    Args:
      query, key, value: N must be a multiple of K.
      mask: True = attend. A row without any True gives the mean of the values.
      bias: added to the scaled logits.
      scale: H ** -0.5 if None; T5 uses 1.0.
      dropout_rate, dropout_key, dropout_generator: dropout of the attention weights; no key, no dropout.
      implementation: "xla" stores all logits. "mapped" handles one key-value head at a time and recomputes its weights
        in the backward pass, which keeps them in a CPU's cache. "cudnn" is the fused GPU kernel for 16-bit floats.
        "auto" is "mapped" on a CPU; on a GPU "cudnn" for 16-bit floats without bias or dropout, in lengths of whole
        64s and head widths of whole 8s up to 128; else "xla".
    Raises:
      ValueError: if N is not a multiple of K, or "cudnn" is asked for with dropout.
    """
    num_heads, num_kv_heads = query.shape[2], key.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into groups of {num_kv_heads} key-value heads")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rate = dropout_rate if dropout_key is not None else 0.0
    if implementation == "auto":
        implementation = _fastest(query, key, value, plain=bias is None and not rate)
    if implementation == "mapped":
        return _mapped(query, key, value, mask, bias, scale, rate, dropout_key, dropout_generator)
    if implementation == "cudnn":
        if rate:
            raise ValueError(f"cudnn attention has no dropout of the weights here, got dropout_rate={rate}")
        bias = None if bias is None else bias.astype(query.dtype)
        return jax.nn.dot_product_attention(
            query, key, value, bias=bias, mask=mask, scale=scale, implementation="cudnn"
        )
    weights = attention_weights(query, key, mask=mask, bias=bias, scale=scale)
    if rate:
        weights = dropout_ops.dropout(dropout_key, weights, rate, dropout_generator)
    return weighted_values(weights, value)


def _fastest(query, key, value, *, plain: bool) -> Implementation:
    """The implementation for the backend in use; to compile ahead for another one, name the implementation instead."""
    backend = jax.default_backend()
    if backend == "cpu":
        return "mapped"
    # The sizes that every version of the fused kernel takes; others have to be asked for by name.
    lengths, head_dim = (query.shape[1], key.shape[1]), query.shape[-1]
    fits = all(length % 64 == 0 for length in lengths) and head_dim % 8 == 0 and head_dim <= 128
    fused = plain and fits and head_dim == value.shape[-1] and query.dtype.itemsize == 2
    return "cudnn" if backend == "gpu" and fused else "xla"


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    scale: float,
) -> Float[Array, "B N T S"]:
    """softmax(scale * q k^T + bias) in float32: the dense form, all logits stored."""
    batch, length, num_heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32) * scale
    return masked_softmax(logits.reshape(batch, num_heads, length, -1), mask, bias)


def masked_softmax(
    logits: Float[Array, "B N T S"],
    mask: Bool[Array, "#B #N #T S"] | None,
    bias: Float[Array, "#B #N T S"] | None,
) -> Float[Array, "B N T S"]:
    """Softmax over the keys after adding the bias and hiding what the mask hides."""
    return jax.nn.softmax(_biased(logits, mask, bias), axis=-1)


def _biased(logits: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """Logits with the bias added and what the mask hides hidden."""
    if bias is not None:
        logits = logits + bias
    return logits if mask is None else jnp.where(mask, logits, MASKED)


def weighted_values(weights: Float[Array, "B N T S"], value: Float[Array, "B S K Hv"]) -> Float[Array, "B T N Hv"]:
    """Sums the values by attention weights, heads grouped as in `attention`."""
    batch, num_heads, length, _ = weights.shape
    grouped = weights.astype(value.dtype).reshape(batch, value.shape[2], -1, length, value.shape[1])
    return jnp.einsum("BKGTS,BSKH->BTKGH", grouped, value).reshape(batch, length, num_heads, value.shape[-1])


def _mapped(query, key, value, mask, bias, scale, dropout_rate, dropout_key, dropout_generator):
    """One key-value head at a time, heads leading: its logits stay in cache between matrix products."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, num_kv_heads, -1, head_dim).transpose(2, 0, 3, 1, 4)  # K B G T H
    num_groups = grouped.shape[2]

    def per_kv_head(x):  # (B, 1 or N, T, S) -> (K or 1, B, G or 1, T, S); None stays None
        if x is None:
            return None
        heads = x.shape[1]
        split = (num_kv_heads, num_groups) if heads == num_heads else (1, 1)
        x = x.reshape(x.shape[0], *split, *x.shape[2:]).transpose(1, 0, 2, 3, 4)
        return jnp.broadcast_to(x, (num_kv_heads, *x.shape[1:]))

    def one_head(arrays):
        q, k, v, m, b, drop_key = arrays  # (B, G, T, H), (B, S, H), (B, S, Hv)
        logits = jnp.einsum("BGTH,BSH->BGTS", q, k, preferred_element_type=jnp.float32) * scale
        logits = _biased(logits, m, b)
        # The sum divides the result instead of the weights, which spares a pass over them.
        weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if dropout_rate:
            weights = dropout_ops.dropout(drop_key, weights, dropout_rate, dropout_generator)
        values = jnp.einsum("BGTS,BSH->BGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (values / total).astype(v.dtype)

    keys = jax.random.split(dropout_key, num_kv_heads) if dropout_rate else None
    heads = (
        grouped,
        key.transpose(2, 0, 1, 3),
        value.transpose(2, 0, 1, 3),
        per_kv_head(mask),
        per_kv_head(bias),
        keys,
    )
    out = lax.map(jax.checkpoint(one_head), heads)  # K B G T Hv
    return out.transpose(1, 3, 0, 2, 4).reshape(batch, length, num_heads, value.shape[-1])


class KVCache(NamedTuple):
    """One layer's keys and values of the last S positions, of logical shape (B, K, S, H); position p is in slot p % S.

    On a CPU they are stored as (B * K, S, H): with a batch of one, XLA copies a four-dimensional cache at every step.
    """

    keys: Array
    values: Array


def init_cache(
    batch_size: int, length: int, num_kv_heads: int, head_dim: int, value_head_dim: int, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """An empty cache for the last `length` positions."""
    merged = jax.default_backend() == "cpu"
    lead = (batch_size * num_kv_heads,) if merged else (batch_size, num_kv_heads)
    return KVCache(jnp.zeros((*lead, length, head_dim), dtype), jnp.zeros((*lead, length, value_head_dim), dtype))


def update_cache(
    cache: KVCache, key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], position: Int[Array, ""]
) -> KVCache:
    """Writes T new positions from `position` on, in place.

    A single one may come after any number of others, and takes the place of the oldest once the cache is full: so a
    cache of the last S positions rolls on without a copy. Several at once must not reach beyond slot S - 1, which is
    the caller's to see to; `roll_cache` has no such limit.
    """

    def write(stored, new):
        slot = position % stored.shape[-2]
        return lax.dynamic_update_slice_in_dim(stored, _stored_like(stored, new), slot, stored.ndim - 2)

    return KVCache(write(cache.keys, key), write(cache.values, value))


def roll_cache(
    cache: KVCache, key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], position: Int[Array, ""]
) -> tuple[KVCache, KVCache]:
    """Any number T of new positions, each of which still sees the S before it.

    Returns:
      (a cache of S + T slots that holds positions `position` - S up to `position` + T - 1 in that order; the next
      cache, of the last S of them).
    """
    size, length = cache.keys.shape[-2], key.shape[1]

    def extend(stored, new):
        in_order = jnp.roll(stored, -(position % size), axis=-2)
        return jnp.concatenate([in_order, _stored_like(stored, new)], axis=-2)

    extended = KVCache(extend(cache.keys, key), extend(cache.values, value))
    return extended, KVCache(*(jnp.roll(x[..., -size:, :], (position + length) % size, axis=-2) for x in extended))


def _stored_like(stored: jax.Array, new: jax.Array) -> jax.Array:
    """(B, T, K, H) in the layout and dtype of a cache."""
    return new.transpose(0, 2, 1, 3).reshape(*stored.shape[:-2], new.shape[1], new.shape[-1]).astype(stored.dtype)


def slot_positions(size: int, last: Int[Array, ""]) -> Int[Array, " {size}"]:
    """The position that each slot of a cache holds when `last` is the newest; negative where there is none yet.

    slot_positions(4, 1) is [0, 1, -2, -1], slot_positions(4, 5) is [4, 5, 2, 3].
    """
    slots = jnp.arange(size)
    return slots + last // size * size - jnp.where(slots > last % size, size, 0)


def cached_attention(
    query: Float[Array, "B T N H"],
    cache: KVCache,
    position: Int[Array, ""],
    *,
    bias: Float[Array, "#B #N T S"] | None = None,
    key_positions: Int[Array, " S"] | None = None,
    window_start: Int[Array, " T"] | None = None,
    mask: Bool[Array, "#B #N #T S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N Hv"]:
    """Attention of T new positions, the first at `position`, to a cache that already holds them; causal by default.

    Args:
      query: queries of the new positions.
      cache: from `update_cache` or `roll_cache`, of S slots; what is left in slots not written yet is not looked at.
      position: index of the first query.
      bias: added to the scaled logits.
      key_positions: the position that each slot holds, `slot_positions` if None; below 0 it holds none.
      window_start: first position that each query may see (local attention).
      mask: True = attend; takes the place of the causal rule.
      scale: H ** -0.5 if None.
    """
    batch, length, num_heads, head_dim = query.shape
    size = cache.keys.shape[-2]
    scale = head_dim**-0.5 if scale is None else scale
    num_kv_heads = cache.keys.size // (batch * size * head_dim)
    keys = cache.keys.reshape(batch * num_kv_heads, size, head_dim)
    values = cache.values.reshape(batch * num_kv_heads, size, -1)
    groups = num_heads // num_kv_heads
    rows = query.reshape(batch, length, num_kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch * num_kv_heads, groups * length, head_dim)
    logits = jnp.einsum("nqh,nsh->nqs", rows, keys, preferred_element_type=jnp.float32) * scale
    if mask is None:
        if key_positions is None:
            key_positions = slot_positions(size, position + length - 1)
        first = jnp.zeros(length, jnp.int32) if window_start is None else jnp.maximum(window_start, 0)
        last = position + jnp.arange(length)
        mask = (key_positions[None, :] >= first[:, None]) & (key_positions[None, :] <= last[:, None])
        mask = mask[None, None]
    weights = masked_softmax(logits.reshape(batch, num_heads, length, size), mask, bias)
    weights = weights.astype(values.dtype).reshape(batch * num_kv_heads, groups * length, size)
    out = jnp.einsum("nqs,nsh->nqh", weights, values)
    return out.reshape(batch, num_heads, length, -1).transpose(0, 2, 1, 3)
