"""Projection, norm, dropout and token embedding: the layers that every stack is made of."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaudio.ops import dropout as dropout_ops


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for a sharding of x by logical axes; nothing happens outside `sharding.use`."""
    return nn.with_logical_constraint(x, axes)


class Projection(nn.Module):
    """An einsum with a kernel of any rank that carries logical axes, and an optional bias over the output axes.

    `nn.DenseGeneral` fails under `jax.set_mesh` with partitioned kernels of rank 3 (flax issue 3676).
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_input_axes: int = 1
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the kernel to x, in `dtype`."""
        inputs, outputs = tuple(range(self.num_input_axes)), tuple(range(self.num_input_axes, len(self.shape)))
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=inputs, out_axis=outputs)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), self.shape, jnp.float32)
        y = jnp.einsum(self.equation, x.astype(self.dtype), kernel.astype(self.dtype))
        if self.bias:
            shape, axes = self.shape[self.num_input_axes :], self.axes[self.num_input_axes :]
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, axes), shape, jnp.float32)
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
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
