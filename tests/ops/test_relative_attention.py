"""The four forms of relative attention against a brute-force loop, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudio.ops import dropout
from jaxaudio.ops import relative_attention as relative
from jaxaudio.ops.attention import cached_attention, init_cache, update_cache

B, N, H = 2, 3, 8


def arrays(length, max_distance, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return draw(B, length, N, H), draw(B, length, N, H), draw(B, length, N, H), draw(N, max_distance, H)


def loop_weights(query, key, table, block=None):
    """Equation 3 of the Music Transformer, one pair at a time in float64."""
    query, key, table = (np.asarray(x, np.float64) for x in (query, key, table))
    length, rows = query.shape[1], table.shape[1]
    weights = np.zeros((B, N, length, length))
    for b in range(B):
        for n in range(N):
            for i in range(length):
                first = 0 if block is None else max(0, (i // block - 1) * block)
                logits = []
                for j in range(first, i + 1):
                    vector = key[b, j, n]
                    if i - j < rows:
                        vector = vector + table[n, rows - 1 - (i - j)]
                    logits.append(query[b, i, n] @ vector / np.sqrt(H))
                exp = np.exp(np.array(logits) - max(logits))
                weights[b, n, i, first : i + 1] = exp / exp.sum()
    return weights


def loop_attention(query, key, value, table, block=None):
    return np.einsum("bnts,bsnh->btnh", loop_weights(query, key, table, block), value)


def loop_gradient(query, key, value, table, direction, block=None):
    """Gradient of sum(direction * output) by the chain rule written out in float64."""
    query, key, value, table = (np.asarray(x, np.float64) for x in (query, key, value, table))
    length, rows = query.shape[1], table.shape[1]
    weights = loop_weights(query, key, table, block)
    d_weights = np.einsum("btnh,bsnh->bnts", direction, value)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(H)
    d_query, d_key, d_table = (np.zeros(x.shape) for x in (query, key, table))
    for i in range(length):
        for j in range(i + 1):
            d = d_logits[:, :, i, j][..., None]  # B N 1
            d_query[:, i] += d * key[:, j]
            d_key[:, j] += d * query[:, i]
            if i - j < rows:
                d_query[:, i] += d * table[None, :, rows - 1 - (i - j)]
                d_table[:, rows - 1 - (i - j)] += (d * query[:, i]).sum(0)
    return d_query, d_key, np.einsum("bnts,btnh->bsnh", weights, direction), d_table


# (length, rows of the table, block): table shorter, equal and longer; lengths that are no multiple of the block.
CASES = [(16, 16, 4), (16, 5, 4), (16, 4, 4), (13, 20, 4), (21, 9, 8), (7, 3, 16)]


@pytest.mark.parametrize(("length", "rows", "block"), CASES)
@pytest.mark.parametrize("form", ["gather", "skew", "blockwise", "local"])
def test_form_equals_loop_forward_and_gradient(form, length, rows, block):
    inputs = arrays(length, rows)
    direction = np.random.default_rng(1).standard_normal((B, length, N, H)).astype(np.float32)
    hidden = block if form == "local" else None

    def project(*inputs):
        out = relative.relative_attention(*inputs, form=form, block_size=block)
        return jnp.sum(out * direction), out

    (_, out), gradients = jax.jit(jax.value_and_grad(project, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)
    np.testing.assert_allclose(out, loop_attention(*inputs, block=hidden), atol=1e-5)
    for ours, loop in zip(gradients, loop_gradient(*inputs, direction, block=hidden), strict=True):
        np.testing.assert_allclose(ours, loop, atol=1e-5)


@pytest.mark.parametrize("form", ["gather", "skew", "blockwise", "local"])
def test_16_bit_inputs_give_16_bit_outputs_and_gradients(form):
    inputs = arrays(16, 9)
    short = [x.astype(jnp.bfloat16) for x in inputs]

    def loss(*inputs):
        out = relative.relative_attention(*inputs, form=form, block_size=4)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*short)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    exact = loop_attention(*(np.asarray(x, np.float64) for x in short), block=4 if form == "local" else None)
    # Queries, weights and outputs are each rounded to 8 bits, 2^-9 relative; values reach 3.
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.05)


@pytest.mark.parametrize("generator", ["jax", "hash"])
def test_blockwise_dropout_is_the_dense_dropout_of_its_block_masks(generator):
    length, block, rate, key = 12, 4, 0.3, jax.random.key(7)
    inputs = arrays(length, 6)
    direction = np.random.default_rng(1).standard_normal((B, length, N, H)).astype(np.float32)
    keep = np.zeros((B, N, length, length), bool)
    with jax.debug_key_reuse(False):  # the reference draws the block masks a second time
        for i in range(3):
            for j in range(3):
                block_key = jax.random.fold_in(jax.random.fold_in(key, i), j)
                tile = dropout.keep_mask(block_key, (B, N, block, block), rate, generator)
                keep[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block] = tile

        def blockwise(*inputs):
            out = relative.relative_attention(
                *inputs, block_size=block, dropout_rate=rate, dropout_key=key, dropout_generator=generator
            )
            return jnp.sum(out * direction)

        def dense(q, k, v, e):
            weights = relative.relative_attention_weights(q, k, e, form="gather") * keep / (1 - rate)
            return jnp.sum(jnp.einsum("BNTS,BSNH->BTNH", weights, v) * direction)

        ours = jax.jit(jax.value_and_grad(blockwise, argnums=(0, 1, 2, 3)))(*inputs)
        reference = jax.jit(jax.value_and_grad(dense, argnums=(0, 1, 2, 3)))(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, reference)


def test_blockwise_never_stores_the_logits():
    """Temporaries of forward and backward grow linearly in length and are a fraction of one L x L array."""

    def temporaries(form, length):
        shapes = [jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)] * 3
        table = jax.ShapeDtypeStruct((8, length, 64), jnp.float32)

        def loss(*x):
            return jnp.sum(relative.relative_attention(*x, form=form))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*shapes, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("blockwise", 8192) <= 2.2 * temporaries("blockwise", 4096)
    assert temporaries("blockwise", 2048) <= temporaries("gather", 2048) / 50


@pytest.mark.parametrize("rows", [3, 9, 20])
def test_cached_step_equals_full_forward(rows):
    query, key, value, table = arrays(9, rows)
    full = relative.relative_attention(query, key, value, table, form="gather")
    cache = init_cache(B, 9, N, H, H)
    for t, span in ((0, 1), (1, 1), (2, 3), (5, 4)):
        part = slice(t, t + span)
        cache = update_cache(cache, key[:, part], value[:, part], jnp.int32(t))
        bias = relative.cached_relative_logits(query[:, part], table, jnp.int32(t), 9)
        out = cached_attention(query[:, part], cache, jnp.int32(t), bias=bias)
        np.testing.assert_allclose(out, full[:, part], atol=1e-5)


def test_pitch_time_logits_equal_loop():
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((B, 6, N, H)), jnp.float32)
    time, pitch = (jnp.asarray(rng.standard_normal((N, size, H)), jnp.float32) for size in (2, 7))
    pitches = jnp.array([[60, 62, 1000, 60, 65, 61], [50, 50, 53, 54, 40, 51]])
    steps = jnp.arange(6) // 2
    ours = relative.pitch_time_logits(query, time, pitch, pitches, steps, pitches, steps)
    for b, n, i, j in np.ndindex(B, N, 6, 6):
        vector = np.zeros(H)
        if 0 <= steps[i] - steps[j] < 2:
            vector = vector + time[n, 1 - (steps[i] - steps[j])]
        if abs(pitches[b, i] - pitches[b, j]) <= 3:
            vector = vector + pitch[n, 3 + pitches[b, i] - pitches[b, j]]
        np.testing.assert_allclose(ours[b, n, i, j], query[b, i, n] @ vector / np.sqrt(H), atol=1e-5)


def test_weights_of_a_form_that_stores_none_are_an_error():
    query, key, _, table = arrays(4, 4)
    with pytest.raises(ValueError, match="'local'"):
        relative.relative_attention_weights(query, key, table, form="local")
