"""Attention against torch, its dropout against the rebuilt mask, and the cache against the full computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from jaxaudio.ops import dropout
from jaxaudio.ops.attention import (
    attention,
    attention_weights,
    cached_attention,
    causal_mask,
    init_cache,
    slot_positions,
    update_cache,
)

B, T, H = 2, 6, 8
RNG = np.random.default_rng(0)
PADDING = np.arange(9)[None, None, None, :] < np.array([9, 5]).reshape(2, 1, 1, 1)
SCATTERED = (RNG.random((B, 4, T, 9)) < 0.5) | (np.arange(9) == 3)  # no row is without a key


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# name: (S, N, K, Hv, options)
CASES = {
    "plain": (9, 4, 4, H, {}),
    "causal": (T, 4, 4, H, {"mask": np.asarray(causal_mask(T, T))[None, None]}),
    "padding": (9, 4, 4, H, {"mask": PADDING}),
    "bias": (9, 4, 4, 5, {"bias": normal(1, 4, T, 9)}),
    "scale": (9, 4, 4, H, {"scale": 1.0, "mask": SCATTERED, "bias": normal(B, 1, T, 9)}),
    "grouped": (T, 4, 2, 5, {"mask": np.asarray(causal_mask(T, T))[None, None]}),
    "grouped_all": (9, 4, 2, 5, {"scale": 0.7, "mask": SCATTERED, "bias": normal(B, 4, T, 9)}),
    "one_kv_head": (9, 4, 1, H, {"mask": PADDING, "bias": normal(1, 1, T, 9)}),
}


def torch_attention(query, key, value, bias, direction, mask=None, scale=None):
    """Output of torch's own attention, and the gradients of its product with `direction`."""
    leaves = [torch.tensor(x, requires_grad=True) for x in (query, key, value)]
    added = None if bias is None else torch.tensor(bias, requires_grad=True)
    hidden = added
    if mask is not None:
        mask = torch.tensor(mask)
        hidden = mask if added is None else torch.where(mask, added, -torch.inf)
    heads_first = [x.transpose(1, 2) for x in leaves]
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=hidden, scale=scale, enable_gqa=True).transpose(1, 2)
    torch.sum(out * torch.tensor(direction)).backward()
    return out.detach().numpy(), [x.grad.numpy() for x in leaves + ([] if added is None else [added])]


@pytest.mark.parametrize("implementation", ["xla", "mapped"])
@pytest.mark.parametrize("name", CASES)
def test_equals_torch_forward_and_gradient(name, implementation):
    length, num_heads, num_kv_heads, value_dim, options = CASES[name]
    bias, mask, scale = (options.get(option) for option in ("bias", "mask", "scale"))
    ours = {"mask": None if mask is None else jnp.asarray(mask), "scale": scale, "implementation": implementation}
    query, key = normal(B, T, num_heads, H), normal(B, length, num_kv_heads, H)
    value, direction = normal(B, length, num_kv_heads, value_dim), normal(B, T, num_heads, value_dim)

    def loss(query, key, value, bias):
        out = attention(query, key, value, bias=bias, **ours)
        return jnp.sum(out * direction), out

    argnums = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    arrays = [jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), None if bias is None else jnp.asarray(bias)]
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*arrays)
    expected, expected_gradients = torch_attention(query, key, value, bias, direction, mask, scale)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for gradient, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, theirs, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "mapped"])
def test_a_row_that_sees_nothing_is_the_mean_of_the_values(implementation):
    query, key, value = (jnp.asarray(normal(B, T, 2, H)) for _ in range(3))
    mask = jnp.ones((1, 1, T, T), bool).at[:, :, 2].set(False)

    def loss(*arrays):
        out = attention(*arrays, mask=mask, implementation=implementation)
        return jnp.sum(out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    np.testing.assert_allclose(out[:, 2], value.mean(axis=1), atol=1e-6)
    assert all(np.all(np.isfinite(x)) for x in gradients)


def test_auto_is_mapped_on_a_cpu():
    query, key, value = (jnp.asarray(normal(B, T, 2, H)) for _ in range(3))
    np.testing.assert_array_equal(
        attention(query, key, value), attention(query, key, value, implementation="mapped"), strict=True
    )


@pytest.mark.parametrize("generator", ["jax", "hash"])
@pytest.mark.parametrize("implementation", ["xla", "mapped"])
def test_dropout_is_that_of_the_rebuilt_mask(implementation, generator):
    rate, drop_key = 0.3, jax.random.key(3)
    query, key, value = (jnp.asarray(normal(B, T, heads, H)) for heads in (4, 2, 2))
    out = attention(
        query,
        key,
        value,
        dropout_rate=rate,
        dropout_key=drop_key,
        dropout_generator=generator,
        implementation=implementation,
    )
    with jax.debug_key_reuse(False):  # the masks are drawn a second time
        if implementation == "xla":
            keep = dropout.keep_mask(drop_key, (B, 4, T, T), rate, generator)
        else:
            per_head = [dropout.keep_mask(k, (B, 2, T, T), rate, generator) for k in jax.random.split(drop_key, 2)]
            keep = np.concatenate(per_head, axis=1)
    weights = np.asarray(attention_weights(query, key, scale=H**-0.5)) * np.asarray(keep) / (1 - rate)
    expected = np.einsum("bnts,bsnh->btnh", weights, np.repeat(value, 2, axis=2))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert 0.5 < np.mean(keep) < 0.9


def test_dropout_has_the_right_mean_and_needs_a_key():
    rows = 4000  # of the same inputs, each with weights of its own dropped
    query, key, value = (jnp.asarray(np.repeat(normal(1, 3, 2, 4), rows, axis=0)) for _ in range(3))
    plain = attention(query, key, value)
    np.testing.assert_array_equal(attention(query, key, value, dropout_rate=0.4), plain)
    draws = attention(query, key, value, dropout_rate=0.4, dropout_key=jax.random.key(0))
    bound = 5 * np.std(draws, axis=0) / np.sqrt(rows)  # five standard errors of the mean
    assert np.all(np.abs(np.mean(draws, axis=0) - plain[0]) < bound)


def test_causal_mask_literals():
    assert causal_mask(3, 3).astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(3, 3, window=2).astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert causal_mask(2, 4).astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(2, 4, window=1).astype(int).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("implementation", ["xla", "mapped"])
def test_bfloat16_is_close_to_float32(implementation):
    """Logits and softmax are float32, so only the weights and the output are rounded, each by at most 2^-9 of itself:

    together no more than 2^-8 of the largest value. Logits of 60 rounded to 16 bits would be off by 0.1: that fails.
    """
    query, key, value = (jnp.asarray(normal(B, 32, 4, H), jnp.bfloat16) for _ in range(3))
    out = attention(16 * query, key, value, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    query, key, value = (np.asarray(x, np.float64) for x in (16 * query, key, value))
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(H)
    exact = np.einsum("bnts,bsnh->btnh", scipy.special.softmax(logits, axis=-1), value)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=2**-8 * np.abs(value).max())


@jax.jit
def step(cache, query, key, value, bias, position, window_start):
    cache = update_cache(cache, key, value, position)
    return cached_attention(query, cache, position, bias=bias, window_start=window_start, scale=0.5), cache


# (N, K, window block): grouped and plain heads; local attention sees its own block and the one before.
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "block"), [(4, 4, None), (4, 2, None), (4, 1, 3)])
@pytest.mark.parametrize("spans", [(1,) * 10, (1, 3, 4, 2)])
def test_cached_equals_full(num_heads, num_kv_heads, block, spans):
    length = 10
    query, bias = normal(B, length, num_heads, H), normal(1, num_heads, length, length)
    key, value = normal(B, length, num_kv_heads, H), normal(B, length, num_kv_heads, 5)
    where = np.arange(length)
    window_start = np.zeros(length, int) if block is None else np.maximum(where // block - 1, 0) * block
    mask = (where[:, None] >= where) & (where >= window_start[:, None])
    expected, _ = torch_attention(query, key, value, bias, np.zeros((), np.float32), mask, 0.5)
    cache, position = init_cache(B, length, num_kv_heads, H, 5), 0
    for span in spans:
        part = slice(position, position + span)
        window = None if block is None else window_start[part]
        out, cache = step(cache, query[:, part], key[:, part], value[:, part], bias[:, :, part], position, window)
        np.testing.assert_allclose(out, expected[:, part], atol=1e-5)
        position += span


def test_what_the_cache_holds_after_the_last_query_is_never_looked_at():
    query, key, value = (jnp.asarray(normal(B, 4, 2, H)) for _ in range(3))
    clean = update_cache(init_cache(B, 8, 2, H, H), key, value, jnp.int32(0))
    dirty = update_cache(clean, 100 * key, 100 * value, jnp.int32(4))
    outs = [cached_attention(query, cache, jnp.int32(0)) for cache in (clean, dirty)]
    np.testing.assert_array_equal(*outs)
    np.testing.assert_allclose(outs[0], attention(query, key, value, mask=causal_mask(4, 4)[None, None]), atol=1e-5)


def test_each_slot_holds_the_newest_position_that_fell_there():
    for size, last in ((1, 0), (4, 1), (4, 5), (4, 7), (7, 20)):
        newest_first = range(last, last - size, -1)
        expected = [next(p for p in newest_first if p % size == slot) for slot in range(size)]
        assert slot_positions(size, jnp.int32(last)).tolist() == expected


def test_cache_keeps_its_dtype():
    cache = init_cache(B, 8, 2, H, 5, jnp.bfloat16)
    key, value = jnp.asarray(normal(B, 3, 2, H)), jnp.asarray(normal(B, 3, 2, 5))
    cache = update_cache(cache, key, value, jnp.int32(2))
    assert {cache.keys.dtype, cache.values.dtype} == {jnp.dtype("bfloat16")}
    stored = cache.values.reshape(B, 2, 8, 5)[:, :, 2:5].transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(stored, value.astype(jnp.bfloat16))


def test_errors():
    query, key, value = (jnp.zeros((1, 2, heads, 4)) for heads in (3, 2, 2))
    with pytest.raises(ValueError, match="3 query heads do not divide into groups of 2"):
        attention(query, key, value)
    with pytest.raises(ValueError, match=r"no dropout .* got dropout_rate=0\.25"):
        attention(key, key, value, dropout_rate=0.25, dropout_key=jax.random.key(0), implementation="cudnn")
