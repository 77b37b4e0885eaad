"""Causal attention within blocks, whose time and memory grow with length times block.

Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281, section 3.5, after Liu et al. 2018,
https://arxiv.org/abs/1801.10198, section 4.2.4.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxaudio.ops import dropout as dropout_ops
from jaxaudio.ops.attention import MASKED, causal_mask
from jaxaudio.ops.matmul import float32_einsum


def local_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    *,
    block_size: int,
    scale: float | None = None,
    more_logits: Callable[[jax.Array], jax.Array] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    dropout_generator: dropout_ops.Generator = "jax",
) -> Float[Array, "B T N Hv"]:
    """softmax(scale * q k^T + more) v, where each query sees its own block, causally, and all of the previous one.

    Args:
      query, key, value: N must be a multiple of K; query head n reads key-value head n // (N // K).
      block_size: positions a block; the last one may have fewer.
      scale: H ** -0.5 if None.
      more_logits: from the scaled queries (B, N, blocks, block_size, H) to logits that are added, (B, N, blocks,
        block_size, 2 block_size), whose keys are the previous block and the own one.
      dropout_rate, dropout_key, dropout_generator: dropout of the attention weights; no key, no dropout.
    """
    batch, length, num_heads, head_dim = query.shape
    num_blocks = -(-length // block_size)
    repeats = num_heads // key.shape[2]

    def blocks(x):  # B T N H -> B N blocks block H
        x = jnp.pad(x, ((0, 0), (0, num_blocks * block_size - length), (0, 0), (0, 0)))
        return x.reshape(batch, num_blocks, block_size, x.shape[2], -1).transpose(0, 3, 1, 2, 4)

    def with_previous(x):
        x = blocks(x)
        previous = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))[:, :, :-1]
        return jnp.repeat(jnp.concatenate([previous, x], axis=3), repeats, axis=1)

    q = blocks(query * (head_dim**-0.5 if scale is None else scale))
    k, v = with_previous(key), with_previous(value)
    logits = float32_einsum("BNCTH,BNCSH->BNCTS", q, k)
    if more_logits is not None:
        logits = logits + more_logits(q)
    seen = jnp.broadcast_to(causal_mask(block_size, 2 * block_size), (num_blocks, block_size, 2 * block_size))
    seen &= (jnp.arange(num_blocks)[:, None, None] > 0) | (jnp.arange(2 * block_size)[None, None, :] >= block_size)
    weights = jax.nn.softmax(jnp.where(seen[None, None], logits, MASKED), axis=-1)
    if dropout_rate and dropout_key is not None:
        weights = dropout_ops.dropout(dropout_key, weights, dropout_rate, dropout_generator)
    out = float32_einsum("BNCTS,BNCSH->BNCTH", weights.astype(v.dtype), v).astype(v.dtype)
    return out.transpose(0, 2, 3, 1, 4).reshape(batch, num_blocks * block_size, num_heads, -1)[:, :length]
