"""Causal self-attention with learned relative positions, in four forms that agree.

Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281, equation 3::

    softmax((Q K^T + S_rel) / sqrt(H)) V,    S_rel[i, j] = q_i . e[i - j]    for keys j <= i

The table `embeddings` (N, R, H) holds one row per head and distance, the farthest first: row r stands for distance
R - 1 - r, the last row for a token's distance to itself. Distances of R and more get a zero logit, as in
tensor2tensor's `dot_product_self_attention_relative_v2` (Shaw-style ports reuse the last row instead); if the sequence
is shorter than R the last rows are used.

form         memory                  what it is
gather       O(L^2 H)                Shaw et al. 2018: every embedding gathered for every pair; the reference
skew         O(L H + L^2)            section 3.4: q times the table, then shifted into place
blockwise    O(L H)                  the skew inside an online softmax over key blocks, see `_blockwise`
local        O(L x block)            section 3.5: each block sees itself and the one before
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxaudio.ops import dropout as dropout_ops
from jaxaudio.ops.attention import MASKED, causal_mask, masked_softmax, weighted_values
from jaxaudio.ops.local_attention import local_attention
from jaxaudio.ops.matmul import float32_einsum

Form = Literal["gather", "skew", "blockwise", "local"]


def relative_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N Hv"],
    embeddings: Float[Array, "N R H"],
    *,
    form: Form = "blockwise",
    block_size: int = 128,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    dropout_generator: dropout_ops.Generator = "jax",
) -> Float[Array, "B T N Hv"]:
    """Causal attention with relative positions; see the module's head for the formula and the forms.

    Args:
      query, key, value: projected inputs, unscaled.
      embeddings: relative embeddings, farthest distance first.
      form: "gather", "skew" and "blockwise" give the same result; "local" hides keys before the previous block.
      block_size: positions a block in "blockwise" and "local".
      dropout_rate, dropout_key, dropout_generator: dropout of the attention weights; no key, no dropout.
        "blockwise" draws its mask block by block, from keys folded from (query block, key block).
    Raises:
      ValueError: for an unknown form; the message carries it.
    """
    rate = dropout_rate if dropout_key is not None else 0.0
    if form == "blockwise":
        spec = _BlockSpec(block_size, rate, dropout_generator)
        heads_first = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        return _blockwise(spec, *heads_first, embeddings, dropout_key).transpose(0, 2, 1, 3)
    if form == "local":
        return local_attention(
            query,
            key,
            value,
            block_size=block_size,
            more_logits=functools.partial(_local_logits, embeddings=embeddings, block=block_size),
            dropout_rate=rate,
            dropout_key=dropout_key,
            dropout_generator=dropout_generator,
        )
    weights = relative_attention_weights(query, key, embeddings, form=form)
    if rate:
        weights = dropout_ops.dropout(dropout_key, weights, rate, dropout_generator)
    return weighted_values(weights, value)


def relative_attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    embeddings: Float[Array, "N R H"],
    *,
    form: Form = "skew",
    bias: Float[Array, "#B #N T T"] | None = None,
) -> Float[Array, "B N T T"]:
    """The attention weights of the dense forms "gather" and "skew"; `bias` is added to the scaled logits."""
    if form not in ("gather", "skew"):
        raise ValueError(f"dense relative attention weights come from form 'gather' or 'skew', got {form!r}")
    query = query * query.shape[-1] ** -0.5
    logits = float32_einsum("BTNH,BSNH->BNTS", query, key)
    relative = gather_relative_logits if form == "gather" else skew_relative_logits
    logits = logits + relative(query, embeddings)
    return masked_softmax(logits, causal_mask(*logits.shape[-2:])[None, None], bias)


def gather_relative_logits(
    query: Float[Array, "B T N H"], embeddings: Float[Array, "N R H"]
) -> Float[Array, "B N T T"]:
    """S_rel by gathering an embedding for every pair (O(L^2 H) memory); zero at distances of R and more."""
    length, rows = query.shape[1], embeddings.shape[1]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    gathered = embeddings[:, jnp.clip(rows - 1 - distance, 0, rows - 1)]  # N T S H
    gathered = jnp.where((distance >= 0) & (distance < rows), gathered.transpose(0, 3, 1, 2), 0.0)
    return float32_einsum("BTNH,NHTS->BNTS", query, gathered)


def skew_relative_logits(query: Float[Array, "B T N H"], embeddings: Float[Array, "N R H"]) -> Float[Array, "B N T T"]:
    """S_rel by the paper's skewing: pad a column on the left, reshape, drop the first row (section 3.4.1).

    Entries above the diagonal are leftovers of other rows and have to be masked.
    """
    batch, length, num_heads, _ = query.shape
    rows = min(length, embeddings.shape[1])
    products = float32_einsum("BTNH,NRH->BNTR", query, embeddings[:, -rows:])
    padded = jnp.pad(products, ((0, 0), (0, 0), (0, 0), (length - rows + 1, 0)))
    return padded.reshape(batch, num_heads, length + 1, length)[:, :, 1:]


def cached_relative_logits(
    query: Float[Array, "B T N H"], embeddings: Float[Array, "N R H"], position: Int[Array, ""], length: int
) -> Float[Array, "B N T {length}"]:
    """S_rel / sqrt(H) of T new queries, the first at `position`, against a cache of `length` slots.

    The slot of query i is i % length, and those before it, around the cache's end, are at distances 1, 2, ...: the
    products of one query with the table, rotated. Keys of the future, where several queries come at once, get whatever
    lies there; `cached_attention` masks them.
    """
    query = query * query.shape[-1] ** -0.5
    rows = min(length, embeddings.shape[1])
    products = float32_einsum("BTNH,NRH->BNTR", query, embeddings)[..., -rows:]
    by_distance = jnp.pad(products, ((0, 0), (0, 0), (0, 0), (length - rows, 0)))  # from length - 1 down to 0
    twice = jnp.concatenate([by_distance, by_distance], axis=-1)

    def rotated(row, i):
        return lax.dynamic_slice_in_dim(row, length - 1 - i % length, length, axis=-1)

    return jax.vmap(rotated, in_axes=(2, 0), out_axes=2)(twice, position + jnp.arange(query.shape[1]))


def pitch_time_logits(
    query: Float[Array, "B T N H"],
    time_embeddings: Float[Array, "N Rt H"],
    pitch_embeddings: Float[Array, "N Rp H"],
    query_pitch: Int[Array, "B T"],
    query_step: Int[Array, " T"],
    key_pitch: Int[Array, "B S"],
    key_step: Int[Array, " S"],
) -> Float[Array, "B N T S"]:
    """Q (R_t + R_p)^T / sqrt(H): relative logits by distance in time steps and by pitch interval.

    Huang et al. 2018, section 4.1.1, for chorales on a grid, where one step holds four tokens. The products with the
    small tables are taken first and then looked up per pair, so memory is O(L (Rt + Rp) + L^2), not O(L^2 H).

    Args:
      query: unscaled queries.
      time_embeddings: row Rt - 1 - d for a distance of d steps; farther gets zero.
      pitch_embeddings: Rp = 2 P + 1 rows, row P + (query pitch - key pitch); wider intervals get zero.
      query_pitch, key_pitch: any integers whose differences are intervals; the caller gives pitchless tokens (rests,
        the start) values far from all pitches, so that their intervals are out of range and get zero.
      query_step, key_step: time step of each position.
    """
    query = query * query.shape[-1] ** -0.5

    def looked_up(table, row):  # row (#B, T, S) indexes the table where it is in range
        products = float32_einsum("BTNH,NRH->BNTR", query, table)
        size = table.shape[1]
        index = jnp.broadcast_to(jnp.clip(row, 0, size - 1)[:, None], (*products.shape[:3], row.shape[-1]))
        return jnp.where(((row >= 0) & (row < size))[:, None], jnp.take_along_axis(products, index, axis=-1), 0.0)

    steps = query_step[:, None] - key_step[None, :]
    intervals = query_pitch[:, :, None] - key_pitch[:, None, :]
    by_time = looked_up(time_embeddings, (time_embeddings.shape[1] - 1 - steps)[None])
    return by_time + looked_up(pitch_embeddings, pitch_embeddings.shape[1] // 2 + intervals)


def _skew_block(x: jax.Array, num_keys: int) -> jax.Array:
    """(..., T, T + S) -> (..., T, S) with [t, s] = x[t, T - 1 - t + s]: the skew of a rectangular block."""
    *lead, num_queries, width = x.shape
    flat = x.reshape(*lead, num_queries * width)
    flat = lax.slice_in_dim(flat, num_queries - 1, num_queries - 1 + num_queries * (width - 1), axis=-1)
    return flat.reshape(*lead, num_queries, width - 1)[..., :num_keys]


def _unskew_block(y: jax.Array) -> jax.Array:
    """The transpose of `_skew_block`: (..., T, S) -> (..., T, T + S), zeros where nothing came from."""
    *lead, num_queries, num_keys = y.shape
    width = num_queries + num_keys
    none = [(0, 0)] * len(lead)
    flat = jnp.pad(y, [*none, (0, 0), (0, width - 1 - num_keys)]).reshape(*lead, num_queries * (width - 1))
    return jnp.pad(flat, [*none, (num_queries - 1, 1)]).reshape(*lead, num_queries, width)


def _local_logits(query, embeddings, block):
    """S_rel of blocks of queries (B, N, blocks, block, H) against their own block and the previous one, as one skewed
    rectangle."""
    # Query t and key s of the rectangle are block + t - s apart, so the slab runs from 2 block - 1 down to -block.
    rows = min(embeddings.shape[1], 2 * block)
    slab = jnp.pad(embeddings[:, -rows:], ((0, 0), (2 * block - rows, block), (0, 0)))
    return _skew_block(float32_einsum("BNCTH,NWH->BNCTW", query, slab), 2 * block)


class _BlockSpec(NamedTuple):
    block: int
    dropout_rate: float
    dropout_generator: dropout_ops.Generator


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(spec, query, key, value, embeddings, dropout_key):
    """Relative attention over (query block, key block) pairs on or below the diagonal; heads first: (B, N, T, H).

    Forward keeps a running maximum, normaliser and output per query (online softmax, Milakov & Gimelshein 2018);
    backward recomputes each block's weights from the saved log-normaliser (Dao et al. 2022). A block needs only the
    2 x block rows of the table that its distances touch, and none where every distance is R or more. Neither the L x L
    logits nor S_rel ever exist.
    """
    return _blockwise_forward(spec, query, key, value, embeddings, dropout_key)[0]


def _blockwise_forward(spec, query, key, value, embeddings, dropout_key):
    blocks = _Blocks(spec, query.shape[2], embeddings)
    q, k, v = (blocks.pad(x) for x in (query * query.shape[-1] ** -0.5, key, value))
    lead = (*q.shape[:2], blocks.size)

    def query_block(i):
        q_i = blocks.read(q, i)

        def key_block(j, carry, *, near):
            maximum, normaliser, out = carry
            logits = blocks.logits(q_i, blocks.read(k, j), i, j, near)
            new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
            weights = jnp.exp(logits - new_maximum[..., None])
            shrink = jnp.exp(maximum - new_maximum)
            normaliser = normaliser * shrink + weights.sum(axis=-1)
            if spec.dropout_rate:
                weights = jnp.where(blocks.keep(dropout_key, weights.shape, i, j), weights, 0.0)
            new = float32_einsum("BNTS,BNSH->BNTH", weights.astype(v.dtype), blocks.read(v, j))
            return new_maximum, normaliser, out * shrink[..., None] + new

        start = (jnp.full(lead, MASKED), jnp.zeros(lead), jnp.zeros((*lead, v.shape[-1])))
        maximum, normaliser, out = blocks.over_keys(i, key_block, start)
        out = out / (normaliser * (1.0 - spec.dropout_rate))[..., None]
        return out.astype(value.dtype), maximum + jnp.log(normaliser)

    out, log_normaliser = lax.map(query_block, jnp.arange(blocks.number))
    out = jnp.moveaxis(out, 0, 2).reshape(*q.shape[:3], v.shape[-1])[:, :, : query.shape[2]]
    log_normaliser = jnp.moveaxis(log_normaliser, 0, 2).reshape(q.shape[:3])[:, :, : query.shape[2]]
    return out, (query, key, value, embeddings, dropout_key, out, log_normaliser)


def _blockwise_backward(spec, residuals, d_out):
    query, key, value, embeddings, dropout_key, out, log_normaliser = residuals
    blocks = _Blocks(spec, query.shape[2], embeddings)
    scale = query.shape[-1] ** -0.5
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    q, k, v, d_o = (blocks.pad(x) for x in (query * scale, key, value, d_out))
    log_z, delta = blocks.pad(log_normaliser), blocks.pad(delta)

    def query_block(i, carry):
        d_query, *rest = carry
        q_i, d_o_i, log_z_i, delta_i = (blocks.read(x, i) for x in (q, d_o, log_z, delta))

        def key_block(j, carry, *, near):
            d_q, d_key, d_value, d_table = carry
            k_j = blocks.read(k, j)
            weights = jnp.exp(blocks.logits(q_i, k_j, i, j, near) - log_z_i[..., None])
            d_weights = float32_einsum("BNTH,BNSH->BNTS", d_o_i, blocks.read(v, j))
            kept = weights
            if spec.dropout_rate:
                keep = blocks.keep(dropout_key, weights.shape, i, j)
                grow = 1.0 / (1.0 - spec.dropout_rate)
                kept, d_weights = jnp.where(keep, weights * grow, 0.0), jnp.where(keep, d_weights * grow, 0.0)
            d_logits = (weights * (d_weights - delta_i[..., None])).astype(q.dtype)
            d_value = blocks.add(d_value, j, float32_einsum("BNTS,BNTH->BNSH", kept.astype(q.dtype), d_o_i))
            d_key = blocks.add(d_key, j, float32_einsum("BNTS,BNTH->BNSH", d_logits, q_i))
            d_q = d_q + float32_einsum("BNTS,BNSH->BNTH", d_logits, k_j)
            if near:
                d_products = _unskew_block(d_logits)
                d_q = d_q + float32_einsum("BNTW,NWH->BNTH", d_products, blocks.slab(blocks.table, i, j, axis=1))
                d_table = blocks.add_slab(d_table, i, j, float32_einsum("BNTW,BNTH->BNWH", d_products, q_i))
            return d_q, d_key, d_value, d_table

        start = (jnp.zeros(q_i.shape), *rest)
        d_q, *rest = blocks.over_keys(i, key_block, start)
        return (lax.dynamic_update_slice_in_dim(d_query, d_q * scale, i * blocks.size, 2), *rest)

    # The table's gradient keeps the batch axis until the end: summed per block, it would cost an all-reduce per block.
    shapes = (q.shape, k.shape, v.shape, (q.shape[0], *blocks.table.shape))
    zeros = tuple(jnp.zeros(shape) for shape in shapes)
    d_query, d_key, d_value, d_table = lax.fori_loop(0, blocks.number, query_block, zeros)
    length = query.shape[2]
    d_query, d_key, d_value = (x[:, :, :length].astype(query.dtype) for x in (d_query, d_key, d_value))
    return d_query, d_key, d_value, blocks.table_gradient(d_table.sum(axis=0)).astype(embeddings.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


class _Blocks:
    """Where the blocks of a sequence of `length` lie, and which rows of the relative table a pair of blocks needs."""

    def __init__(self, spec: _BlockSpec, length: int, embeddings: jax.Array):
        self.spec = spec
        self.size = min(spec.block, length)
        self.number = -(-length // self.size)
        self.padded = self.number * self.size
        self.max_distance = embeddings.shape[1]
        self.rows = min(self.max_distance, self.padded)
        # One row per distance from padded - 1 down to -size: zeros beyond the table, and for the masked future.
        self.table = jnp.pad(embeddings[:, -self.rows :], ((0, 0), (self.padded - self.rows, self.size), (0, 0)))

    def pad(self, x):
        """Pads the time axis to whole blocks; padded keys lie in every real query's future, so nothing sees them."""
        return jnp.pad(x, [(0, 0), (0, 0), (0, self.padded - x.shape[2])] + [(0, 0)] * (x.ndim - 3))

    def read(self, x, i):
        return lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis=2)

    def add(self, x, i, new):
        return lax.dynamic_update_slice_in_dim(x, self.read(x, i) + new, i * self.size, axis=2)

    def slab(self, table, i, j, *, axis):
        """The 2 x size rows for distances (i - j + 1) size - 1 down to (i - j - 1) size."""
        return lax.dynamic_slice_in_dim(table, self.padded - (i - j + 1) * self.size, 2 * self.size, axis)

    def add_slab(self, table, i, j, new):
        start = self.padded - (i - j + 1) * self.size
        return lax.dynamic_update_slice_in_dim(table, self.slab(table, i, j, axis=2) + new, start, axis=2)

    def table_gradient(self, d_table):
        own = d_table[:, self.padded - self.rows : self.padded]
        return jnp.pad(own, ((0, 0), (self.max_distance - self.rows, 0), (0, 0)))

    def logits(self, q_i, k_j, i, j, near):
        """Scaled logits of a block pair; `near` pairs have distances below R, or touch the diagonal, or both."""
        logits = float32_einsum("BNTH,BNSH->BNTS", q_i, k_j)
        if not near:
            return logits
        products = float32_einsum("BNTH,NWH->BNTW", q_i, self.slab(self.table, i, j, axis=1).astype(q_i.dtype))
        query = i * self.size + lax.broadcasted_iota(jnp.int32, (self.size, self.size), 0)
        key = j * self.size + lax.broadcasted_iota(jnp.int32, (self.size, self.size), 1)
        return jnp.where((query >= key)[None, None], logits + _skew_block(products, self.size), MASKED)

    def keep(self, dropout_key, shape, i, j):
        block_key = jax.random.fold_in(jax.random.fold_in(dropout_key, i), j)
        return dropout_ops.keep_mask(block_key, shape, self.spec.dropout_rate, self.spec.dropout_generator)

    def over_keys(self, i, key_block, start):
        """Runs key_block over the keys of query block i: first those out of the table's reach, then the near ones."""
        # Block j holds a distance below R if its last key does: i size - (j size + size - 1) < R.
        first_near = jnp.maximum((i * self.size + 1 - self.max_distance) // self.size, 0)
        carry = lax.fori_loop(0, first_near, functools.partial(key_block, near=False), start)
        return lax.fori_loop(first_near, i + 1, functools.partial(key_block, near=True), carry)
