"""Convolution of pictures and its gradients equal torch's for every stride, dilation and width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxaudio.ops.conv2d import conv2d

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("size", "strides", "dilation", "length"),
    [
        ((3, 9), (1, 2), 2, (11, 24)),
        ((4, 4), (2, 2), 1, (9, 13)),
        ((3, 3), (1, 1), 1, (6, 5)),
        ((1, 1), (2, 2), 1, (5, 6)),
    ],
)
def test_output_and_gradients_equal_torchs(size, strides, dilation, length):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *length, 3)).astype(np.float32)
    kernel = rng.standard_normal((*size, 3, 5)).astype(np.float32)
    their_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    their_kernel = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).requires_grad_()
    theirs = torch.nn.functional.conv2d(their_x, their_kernel, stride=strides, dilation=(dilation, 1))
    weights = rng.standard_normal(theirs.permute(0, 2, 3, 1).shape).astype(np.float32)
    (theirs.permute(0, 2, 3, 1) * torch.from_numpy(weights)).sum().backward()

    @jax.jit
    def both(x, kernel):
        y, pull_back = jax.vjp(lambda *a: conv2d(*a, strides=strides, dilation=dilation), x, kernel)
        return y, pull_back(jnp.asarray(weights))

    ours, (x_gradient, kernel_gradient) = both(x, kernel)
    np.testing.assert_allclose(ours, theirs.detach().permute(0, 2, 3, 1), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(x_gradient, their_x.grad.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(kernel_gradient, their_kernel.grad.permute(2, 3, 1, 0), rtol=1e-5, atol=1e-4)
