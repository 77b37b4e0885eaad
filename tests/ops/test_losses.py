import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxaudio.ops.losses import cross_entropy


@pytest.mark.parametrize("scale", [1.0, 300.0])  # 300: exp overflows unless the maximum is taken out
def test_cross_entropy_equals_torch(scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.standard_normal((3, 5, 7))).astype(np.float32)
    targets, mask = rng.integers(0, 7, (3, 5)), rng.random((3, 5)) < 0.6
    theirs = torch.tensor(logits, requires_grad=True)
    ignored = torch.tensor(np.where(mask, targets, -100)).reshape(-1)
    total = torch.nn.functional.cross_entropy(theirs.reshape(-1, 7), ignored, reduction="sum")
    total.backward()
    grad_fn = jax.value_and_grad(cross_entropy, has_aux=True)
    (nats, weight), gradient = grad_fn(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask))
    assert float(weight) == mask.sum()
    assert nats.dtype == weight.dtype == jnp.float32
    np.testing.assert_allclose(nats, total.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-5)


def test_cross_entropy_of_16_bit_logits_is_computed_in_float32():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((2, 64, 50)), jnp.bfloat16)
    targets, mask = jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64), bool)
    rounded = cross_entropy(logits, targets, mask)[0]
    np.testing.assert_array_equal(rounded, cross_entropy(logits.astype(jnp.float32), targets, mask)[0])


def test_nothing_kept_is_a_sum_and_a_weight_of_zero():
    logits = jnp.full((1, 2, 3), jnp.inf)  # what a masked position holds does not matter
    nats, weight = cross_entropy(logits, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), bool))
    assert (float(nats), float(weight)) == (0.0, 0.0)
