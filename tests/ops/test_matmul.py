import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudio.ops.matmul import project


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 12), (12, 5), (8, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_gradient_equal_those_of_einsum(inputs, outputs, dtype):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.integers(-4, 5, shape), dtype)  # small integers: every sum below is exact in 16 bits

    x, kernel, direction = draw(2, 3, inputs), draw(inputs, outputs), draw(2, 3, outputs)

    def graded(product):
        def loss(x, kernel):
            out = product(x, kernel)
            return jnp.sum((out * direction).astype(jnp.float32)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)
        return out, *gradients

    plain = graded(lambda x, kernel: jnp.einsum("BTI,IO->BTO", x, kernel))
    for ours, theirs in zip(graded(project), plain, strict=True):
        assert ours.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))
