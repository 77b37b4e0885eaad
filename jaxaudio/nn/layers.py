"""Projection, norm, dropout and token embedding: the layers that every stack is made of."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaudio.ops import dropout as dropout_ops
from jaxaudio.ops.matmul import project


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for a sharding of x by logical axes; nothing happens outside `sharding.use`."""
    return nn.with_logical_constraint(x, axes)


class Projection(nn.Module):
    """x @ kernel + bias with a kernel of any rank, whose axes carry logical names.

    `nn.DenseGeneral` fails under `jax.set_mesh` with partitioned kernels of rank 3 (flax issue 3676).

    Attributes:
      shape: of the kernel, input axes first: (D, F), or (D, N, H) to split into heads, or (N, H, D) to join them.
      axes: logical name of each kernel axis.
      num_input_axes: how many leading axes of `shape` are contracted with the last axes of x.
      bias: adds one over the output axes.
      dtype: of the computation.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_input_axes: int = 1
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, *inputs) -> (B, T, *outputs)."""
        inputs, outputs = self.shape[: self.num_input_axes], self.shape[self.num_input_axes :]
        init = nn.initializers.variance_scaling(
            1.0,
            "fan_avg",
            "uniform",
            in_axis=tuple(range(len(inputs))),
            out_axis=tuple(range(len(inputs), len(self.shape))),
        )
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), self.shape, jnp.float32)
        kernel = kernel.astype(self.dtype).reshape(math.prod(inputs), math.prod(outputs))
        lead = x.shape[:2]
        y = project(x.astype(self.dtype).reshape(*lead, -1), kernel).reshape(*lead, *outputs)
        if self.bias:
            axes = self.axes[self.num_input_axes :]
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), outputs, jnp.float32)
            y = y + bias.astype(self.dtype)[None, None]
        return y


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
