"""Convolution of any rank with weight norm, as discriminators use it."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class NormConv(nn.Module):
    """Convolution over one or two axes, channels last, its kernel a magnitude times a direction for each output.

    Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868. Kernels and biases start uniform within
    1 / sqrt(fan-in), as torch's do, and the magnitudes as the kernels' norms.

    Attributes:
      features: output channels.
      kernel_size: along each axis.
      strides, dilations: along each axis; 1 if None.
      padding: zeros on both sides of each axis; if None, dilation * (kernel_size - 1) // 2; or "SAME", as many as give
        ceil(length / stride) outputs, one more at the end if they are odd.
      groups: channels are split into; each is convolved by itself.
      weight_norm: False stores the kernel as it is: {kernel, bias} and not {direction, magnitude, bias}.
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    dilations: tuple[int, ...] | None = None
    padding: tuple[int, ...] | Literal["SAME"] | None = None
    groups: int = 1
    weight_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, *positions, inputs) -> (rows, *positions, features)."""
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
            kernel = kernel * (magnitude / norm).reshape((1,) * (rank + 1) + (-1,))
        bias = self.param("bias", nn.with_logical_partitioning(uniform, ("conv",)), (self.features,), jnp.float32)
        dilations = self.dilations or (1,) * rank
        padding = self.padding
        if padding is None:
            padding = [dilation * (size - 1) // 2 for size, dilation in zip(self.kernel_size, dilations, strict=True)]
        if padding != "SAME":
            padding = [(width, width) for width in padding]
        spatial = "HW"[2 - rank :]
        y = lax.conv_general_dilated(
            x,
            kernel,
            self.strides or (1,) * rank,
            padding,
            rhs_dilation=dilations,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=self.groups,
        )
        return y + bias.reshape((1,) * (rank + 1) + (-1,))
