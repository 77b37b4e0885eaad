"""Projection, convolution, norm, dropout and token embedding: the layers that every stack is made of."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaudio.ops import dropout as dropout_ops
from jaxaudio.ops.matmul import project

KernelInit = Literal["xavier_uniform", "fan_in_normal"]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for a sharding of x by logical axes; nothing happens outside `sharding.use`."""
    return nn.with_logical_constraint(x, axes)


def kernel_init(name: KernelInit, num_input_axes: int, rank: int) -> nn.initializers.Initializer:
    """Initializer of a kernel whose first axes are its inputs."""
    mode, distribution = {"xavier_uniform": ("fan_avg", "uniform"), "fan_in_normal": ("fan_in", "normal")}[name]
    inputs, outputs = tuple(range(num_input_axes)), tuple(range(num_input_axes, rank))
    return nn.initializers.variance_scaling(1.0, mode, distribution, in_axis=inputs, out_axis=outputs)


def weight_normed(direction: jax.Array | np.ndarray, magnitude: jax.Array | np.ndarray) -> jax.Array:
    """The kernel of a direction and its magnitudes, which have one axis and 1 in place of the others (Salimans & Kingma
    2016, equation 2).
    """
    axes = tuple(axis for axis in range(direction.ndim) if magnitude.shape[axis] != direction.shape[axis])
    return direction * (magnitude / jnp.sqrt(jnp.sum(direction**2, axes, keepdims=True)))


class Projection(nn.Module):
    """x @ kernel + bias with a kernel of any rank, whose axes carry logical names.

    `nn.DenseGeneral` fails under `jax.set_mesh` with partitioned kernels of rank 3 (flax issue 3676).

    Attributes:
      shape: of the kernel, input axes first: (D, F), or (D, N, H) to split into heads, or (N, H, D) to join them.
      axes: logical name of each kernel axis.
      num_input_axes: how many leading axes of `shape` are contracted with the last axes of x.
      bias: adds one over the output axes.
      dtype: of the computation.
      init: "xavier_uniform", or "fan_in_normal", a Gaussian of variance 1 / fan-in.

    Int8 kernels come with "kernel_scale", a factor for each output, beside them: see `ops.quantization`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_input_axes: int = 1
    bias: bool = False
    dtype: Any = jnp.float32
    init: KernelInit = "xavier_uniform"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, *inputs) -> (B, T, *outputs)."""
        inputs, outputs = self.shape[: self.num_input_axes], self.shape[self.num_input_axes :]
        init = kernel_init(self.init, len(inputs), len(self.shape))
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), self.shape, jnp.float32)
        kernel = kernel.astype(self.dtype).reshape(math.prod(inputs), math.prod(outputs))
        lead = x.shape[:2]
        y = project(x.astype(self.dtype).reshape(*lead, -1), kernel).reshape(*lead, *outputs)
        if self.has_variable("params", "kernel_scale"):
            y = y * self.get_variable("params", "kernel_scale").astype(self.dtype)[None, None]
        if self.bias:
            axes = self.axes[self.num_input_axes :]
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), outputs, jnp.float32)
            y = y + bias.astype(self.dtype)[None, None]
        return y


class Conv(nn.Module):
    """1-D convolution over time; kernel (width, D_in, D_out), as `lax.conv` takes it in NWC.

    Attributes:
      shape: of the kernel.
      stride, padding: in steps; the padding is put on both sides.
      dtype, init: as in `Projection`.
    """

    shape: tuple[int, int, int]
    stride: int = 1
    padding: int = 0
    dtype: Any = jnp.float32
    init: KernelInit = "xavier_uniform"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D_in) -> (B, T', D_out)."""
        kernel = nn.with_logical_partitioning(kernel_init(self.init, 2, 3), ("conv", None, "embed"))
        bias = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
        kernel = self.param("kernel", kernel, self.shape, jnp.float32).astype(self.dtype)
        bias = self.param("bias", bias, self.shape[-1:], jnp.float32).astype(self.dtype)
        padding, layout = [(self.padding, self.padding)], ("NWC", "WIO", "NWC")
        x = x.astype(self.dtype)
        return lax.conv_general_dilated(x, kernel, (self.stride,), padding, dimension_numbers=layout) + bias[None, None]


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, statistics in float32."""

    kind: Literal["layer", "rms"] = "layer"
    epsilon: float = 1e-6
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        if self.kind == "rms":
            return nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, scale_init=scale_init, name="rms")(x)
        return nn.LayerNorm(
            epsilon=self.epsilon,
            dtype=self.dtype,
            use_bias=self.bias,
            scale_init=scale_init,
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
            use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits
            name="layer",
        )(x)


class Dropout(nn.Module):
    """Dropout with the generator of the config; needs a "dropout" key unless deterministic."""

    rate: float
    generator: dropout_ops.Generator

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """Any shape."""
        if deterministic or not self.rate:
            return x
        return dropout_ops.dropout(self.make_rng("dropout"), x, self.rate, self.generator)


class TokenEmbedding(nn.Module):
    """Embeddings of token ids, N(0, 1/D) scaled by sqrt(D) as in tensor2tensor; id 0 (padding, start) is the zero
    vector.
    """

    vocab_size: int
    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(B, T) ids -> (B, T, D)."""
        init = nn.with_logical_partitioning(nn.initializers.normal(self.embed_dim**-0.5), ("vocab", "embed"))
        table = self.param("embedding", init, (self.vocab_size, self.embed_dim), jnp.float32)
        # Gathering the FSDP axis before the lookup spares a full rematerialisation of the output.
        table = constrain(table.astype(self.dtype), "vocab", None)
        x = jnp.take(table, tokens, axis=0) * self.embed_dim**0.5
        return jnp.where(tokens[..., None] == 0, 0, x).astype(self.dtype)
