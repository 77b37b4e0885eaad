"""Snake and ELU equal float64's and torch's, and their gradients do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxaudio.ops.activations import elu, snake


def around_zero(most: float) -> np.ndarray:
    sizes = 10.0 ** np.linspace(-8, np.log10(most), 1001)
    return np.concatenate([-sizes[::-1], [0.0], sizes]).astype(np.float32)


@pytest.mark.parametrize("most", [10.0, 10_000.0])
def test_snake_equals_that_of_float64(most):
    alpha = np.array([0.3, 1.0, -2.0], np.float32)
    x = around_zero(most / 2)[None, :, None] * np.ones((2, 1, 3), np.float32)
    phase = (alpha * x).astype(np.float64)  # rounded once to float32, as any phase is
    found = np.asarray(jax.jit(snake)(jnp.asarray(x), jnp.asarray(alpha)))
    expected = x + np.sin(phase) ** 2 / (alpha.astype(np.float64) + 1e-9)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-6)


def test_snakes_gradients_equal_torchs():
    rng = np.random.default_rng(0)
    x, alpha = rng.normal(0, 5, (2, 50, 3)).astype(np.float32), rng.uniform(0.2, 2, 3).astype(np.float32)
    weights = rng.standard_normal(x.shape).astype(np.float32)
    ours = jax.jit(jax.grad(lambda x, a: jnp.sum(weights * snake(x, a)), (0, 1)))(jnp.asarray(x), jnp.asarray(alpha))
    torch_x, torch_alpha = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x, alpha))
    y = torch_x + torch.sin(torch_alpha * torch_x) ** 2 / (torch_alpha + 1e-9)
    torch.sum(torch.tensor(weights) * y).backward()
    np.testing.assert_allclose(ours[0], torch_x.grad, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[1], torch_alpha.grad, rtol=1e-5, atol=1e-4)  # sums of a hundred numbers


def test_elu_and_its_gradient_equal_torchs():
    x = around_zero(100.0)
    found, gradient = jax.jit(jax.vmap(jax.value_and_grad(elu)))(jnp.asarray(x))
    torch_x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.elu(torch_x)
    expected.sum().backward()
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-6, atol=0)  # also where exp(x) - 1 would cancel
    np.testing.assert_allclose(gradient, torch_x.grad, rtol=1e-6, atol=1e-6)


def test_sixteen_bit_inputs_stay_so():
    x = jnp.asarray([[1.5, -2.0]], jnp.bfloat16)
    assert snake(x, jnp.ones(2)).dtype == elu(x).dtype == jnp.bfloat16
