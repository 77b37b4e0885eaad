"""Convolution over one or two axes with weight norm, as discriminators use it."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaudio.nn.layers import weight_normed
from jaxaudio.ops.conv import conv
from jaxaudio.ops.conv2d import conv2d


class NormConv(nn.Module):
    """Convolution over time, or over time and frequency, its kernel a magnitude times a direction for each output.

    Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868. Kernels and biases start uniform within
    1 / sqrt(fan-in), as torch's do, and the magnitudes as the kernels' norms.

    Attributes:
      features: output channels.
      kernel_size: along each axis.
      strides: along each axis; 1 if None.
      dilation: over time.
      padding: zeros on both sides of each axis; if None, as many as keep its length with an odd kernel and a stride of
        1; or "SAME", as many as give ceil(length / stride) outputs, one more at the end if they are odd.
      groups: over time alone, the channels are split into; each is convolved by itself.
      weight_norm: False stores the kernel as it is: {kernel, bias} and not {direction, magnitude, bias}.
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    dilation: int = 1
    padding: tuple[int, ...] | Literal["SAME"] | None = None
    groups: int = 1
    weight_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, T, inputs) -> (rows, T', features), or (rows, T, F, inputs) -> (rows, T', F', features)."""
        rank = len(self.kernel_size)
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        bound = math.prod(shape[:-1]) ** -0.5
        axes = (*(None,) * (rank + 1), "conv")  # Flax refuses a name twice

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        name = "direction" if self.weight_norm else "kernel"
        kernel = self.param(name, nn.with_logical_partitioning(uniform, axes), shape, jnp.float32)
        if self.weight_norm:
            norm = jnp.sqrt(jnp.sum(kernel**2, axis=tuple(range(rank + 1))))
            magnitude = self.param("magnitude", nn.with_logical_partitioning(lambda _: norm, ("conv",)))
            kernel = weight_normed(kernel, magnitude.reshape((1,) * (rank + 1) + (-1,)))
        bias = self.param("bias", nn.with_logical_partitioning(uniform, ("conv",)), (self.features,), jnp.float32)
        strides = self.strides or (1,) * rank
        x = jnp.pad(x, ((0, 0), *self._pads(x.shape[1:-1], strides), (0, 0)))
        if rank == 1:
            y = conv(x, kernel, stride=strides[0], dilation=self.dilation, groups=self.groups)
        else:
            y = conv2d(x, kernel, strides=strides, dilation=self.dilation)
        return y + bias.reshape((1,) * (rank + 1) + (-1,))

    def _pads(self, lengths: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
        if self.padding not in (None, "SAME"):
            return [(width, width) for width in self.padding]
        reaches = [(size - 1) * (self.dilation if axis == 0 else 1) for axis, size in enumerate(self.kernel_size)]
        if self.padding is None:
            return [(reach // 2, reach // 2) for reach in reaches]
        totals = [
            max((-(-length // stride) - 1) * stride + 1 + reach - length, 0)
            for length, stride, reach in zip(lengths, strides, reaches, strict=True)
        ]
        return [(total // 2, total - total // 2) for total in totals]
