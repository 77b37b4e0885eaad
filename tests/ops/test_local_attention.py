"""Attention within blocks against dense attention with a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudio.ops.attention import attention
from jaxaudio.ops.local_attention import local_attention


@pytest.mark.parametrize(
    ("length", "block", "num_kv_heads", "scale"), [(16, 4, 4, None), (13, 5, 2, 0.7), (3, 8, 1, None)]
)
def test_equals_dense_attention_with_a_mask(length, block, num_kv_heads, scale):
    rng = np.random.default_rng(length)
    shapes = (2, length, 4, 6), (2, length, num_kv_heads, 6), (2, length, num_kv_heads, 3)
    query, key, value = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    mask = jnp.array([[s <= t and t // block - s // block <= 1 for s in range(length)] for t in range(length)])

    def ours(*inputs):
        return local_attention(*inputs, block_size=block, scale=scale)

    def dense(*inputs):
        return attention(*inputs, mask=mask[None, None], scale=scale, implementation="xla")

    np.testing.assert_allclose(ours(query, key, value), dense(query, key, value), atol=1e-5)
    direction = rng.standard_normal((2, length, 4, 3)).astype(np.float32)
    gradients = [
        jax.grad(lambda *inputs, form=form: jnp.sum(form(*inputs) * direction), argnums=(0, 1, 2))(query, key, value)
        for form in (ours, dense)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


def test_memory_grows_with_the_length():
    def bytes_at(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(local_attention(q, k, v, block_size=16)), argnums=(0, 1, 2)))
        return step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert bytes_at(4096) < 4.5 * bytes_at(1024)  # dense attention's grows 16 times
