"""Weights in 8 bits: one scale per output, rounding to nearest (Dettmers et al. 2022, LLM.int8(), section 2.1)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


def quantize(kernel: Float[Array, "..."], num_input_axes: int) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """A kernel whose first axes are its inputs -> (int8 kernel, scale for each output); their product is the kernel to
    within half a scale.

    Raises:
      ValueError: `num_input_axes` is not between 1 and the kernel's rank; with both.
    """
    if not 1 <= num_input_axes <= kernel.ndim:
        raise ValueError(f"num_input_axes must be in 1..{kernel.ndim}, the kernel's rank, got {num_input_axes}")
    inputs, outputs = kernel.shape[:num_input_axes], kernel.shape[num_input_axes:]
    flat = kernel.reshape(math.prod(inputs), *outputs)
    scale = jnp.max(jnp.abs(flat), axis=0) / 127
    steps = jnp.round(flat / jnp.where(scale > 0, scale, 1)[None])
    return steps.astype(jnp.int8).reshape(kernel.shape), scale


def dequantize(kernel: Int8[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product of what `quantize` gives."""
    return kernel.astype(scale.dtype) * scale.reshape((1,) * (kernel.ndim - scale.ndim) + scale.shape)
