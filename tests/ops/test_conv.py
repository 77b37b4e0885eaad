"""Convolutions, their lengths and their gradients equal torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxaudio.ops.conv import conv, conv_transpose, depthwise_conv_transpose

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def graded(function, x, kernel):
    """Output, and the gradients of its product with fixed numbers."""

    def loss(x, kernel):
        y = function(x, kernel)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)
    return y, *gradients


def torch_graded(function, x, weight):
    """The same of torch's (B, C, T) layout; the kernel's gradient as torch's weight."""
    x, weight = (torch.tensor(array, requires_grad=True) for array in (x.transpose(0, 2, 1), weight))
    y = function(x, weight).transpose(1, 2)
    torch.sum(y * torch.cos(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape)).backward()
    return y.detach().numpy(), x.grad.numpy().transpose(0, 2, 1), weight.grad.numpy()


def assert_equal(ours, theirs):
    for found, expected in zip(ours, theirs, strict=True):
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


# length, inputs, outputs, kernel, stride, dilation, groups: the layers of the codecs, narrow, and what lies between
LAYERS = [
    (40, 1, 6, 7, 1, 1, 1),
    (40, 6, 1, 7, 1, 1, 1),
    (41, 6, 2, 7, 1, 1, 1),
    (40, 2, 6, 7, 1, 1, 1),
    (23, 6, 4, 3, 1, 1, 1),
    (23, 4, 6, 1, 1, 1, 1),
    (23, 4, 6, 1, 2, 1, 1),
    (41, 5, 6, 7, 1, 3, 1),
    (70, 5, 6, 7, 1, 9, 1),
    (55, 5, 6, 7, 1, 9, 1),  # one output
    (40, 4, 8, 4, 2, 1, 1),
    (41, 4, 8, 8, 4, 1, 1),
    (44, 4, 8, 10, 5, 1, 1),
    (45, 4, 8, 16, 8, 1, 1),
    (45, 1, 8, 15, 4, 1, 1),
    (45, 8, 1, 5, 3, 2, 1),
    (45, 8, 12, 41, 4, 1, 4),
    (45, 8, 8, 5, 1, 2, 8),
    (24, 4, 8, 10, 5, 1, 1),  # few outputs
]


@pytest.mark.parametrize(("length", "inputs", "outputs", "size", "stride", "dilation", "groups"), LAYERS)
def test_convolution_and_its_gradients_equal_torchs(length, inputs, outputs, size, stride, dilation, groups):
    x, weight = draw(2, length, inputs), draw(outputs, inputs // groups, size)
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    y, d_x, d_kernel = graded(lambda x, kernel: conv(x, kernel, **options), x, weight.transpose(2, 1, 0))
    assert y.shape[1] == (length - (size - 1) * dilation - 1) // stride + 1
    theirs = torch_graded(lambda x, weight: torch.nn.functional.conv1d(x, weight, **options), x, weight)
    assert_equal((y, d_x, d_kernel.transpose(2, 1, 0)), theirs)


def test_an_input_shorter_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match="x has 18 steps, fewer than the kernel's 19"):
        conv(jnp.ones((1, 18, 1)), jnp.ones((7, 1, 1)), dilation=3)


TRANSPOSED = [(4, 2), (8, 4), (10, 5), (16, 8), (12, 6), (5, 2), (3, 4), (7, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize("length", [1, 9])  # two rows: few steps, many
@pytest.mark.parametrize(("size", "stride"), TRANSPOSED)
def test_transposed_convolution_and_its_gradients_equal_torchs(length, size, stride):
    x, weight = draw(2, length, 6), draw(6, 3, size)
    y, d_x, d_kernel = graded(lambda x, k: conv_transpose(x, k, stride=stride), x, weight.transpose(2, 0, 1))
    assert y.shape[1] == (length - 1) * stride + size
    theirs = torch_graded(lambda x, w: torch.nn.functional.conv_transpose1d(x, w, stride=stride), x, weight)
    assert_equal((y, d_x, d_kernel.transpose(1, 2, 0)), theirs)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize(("size", "stride"), [(4, 2), (5, 2), (3, 4), (8, 4)])
def test_depthwise_transposed_convolution_and_its_gradients_equal_torchs(length, size, stride):
    x, weight = draw(2, length, 6), draw(6, 1, size)
    y, d_x, d_kernel = graded(lambda x, k: depthwise_conv_transpose(x, k, stride=stride), x, weight[:, 0].T)
    theirs = torch_graded(lambda x, w: torch.nn.functional.conv_transpose1d(x, w, stride=stride, groups=6), x, weight)
    assert_equal((y, d_x, d_kernel.T[:, None]), theirs)


def test_the_forms_of_other_backends_are_equal(monkeypatch):
    x, kernel, narrow, wide = map(jnp.asarray, (draw(2, 9, 6), draw(5, 6, 3), draw(2, 40, 1), draw(2, 40, 6)))
    widen, narrow_down = jnp.asarray(draw(7, 1, 6)), jnp.asarray(draw(7, 6, 1))

    def outputs():
        return conv_transpose(x, kernel, stride=2), conv(narrow, widen), conv(wide, narrow_down, dilation=3)

    here = outputs()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for found, expected in zip(outputs(), here, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
