"""Convolutions over time, forward and transposed, channels last. No padding anywhere: callers pad and cut."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def conv(
    x: Float[Array, "B T I"],
    kernel: Float[Array, "K I_per_group O"],
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Float[Array, "B T_out O"]:
    """out[t] = sum over k of x[t * stride + k * dilation] @ kernel[k], as torch's conv1d without padding.

    Args:
      x: T must be at least (K - 1) * dilation + 1.
      kernel: (K, I / groups, O); torch's weight (O, I / groups, K) transposed by (2, 1, 0).
      stride, dilation, groups: as everywhere.
    Returns:
      (B, (T - (K - 1) * dilation - 1) // stride + 1, O).
    Raises:
      ValueError: x is shorter than the kernel; has both lengths.
    """
    extent = (kernel.shape[0] - 1) * dilation + 1
    if x.shape[1] < extent:
        raise ValueError(f"x has {x.shape[1]} steps, fewer than the kernel's {extent}; pad it before")
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,),
        "VALID",
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def conv_transpose(
    x: Float[Array, "B T I"], kernel: Float[Array, "K I O"], *, stride: int
) -> Float[Array, "B T_out O"]:
    """Adds x[t] @ kernel[k] to out[t * stride + k], as torch's conv_transpose1d without padding.

    Args:
      x: any length.
      kernel: torch's weight (I, O, K) transposed by (2, 0, 1).
      stride: at least 1; need not divide K.
    Returns:
      (B, (T - 1) * stride + K, O).
    """
    if jax.default_backend() == "cpu":
        # The gradient of a dilated input is 20 to 40 times slower there than that of the product.
        return _overlap_add(jnp.einsum("BTI,KIO->BTKO", x, kernel), stride)
    return _dilated_input(x, kernel, stride, groups=1)


def depthwise_conv_transpose(
    x: Float[Array, "B T D"], kernel: Float[Array, "K D"], *, stride: int
) -> Float[Array, "B T_out D"]:
    """Adds x[t] * kernel[k] to out[t * stride + k], as torch's conv_transpose1d with as many groups as channels.

    Args:
      x: any length.
      kernel: torch's weight (D, 1, K) transposed by (2, 0, 1), without its axis of one.
      stride: at least 1; need not divide K.
    Returns:
      (B, (T - 1) * stride + K, D).
    """
    return _overlap_add(x[:, :, None] * kernel[None, None], stride)


def _overlap_add(pieces: Float[Array, "B T K O"], stride: int) -> Float[Array, "B T_out O"]:
    """Adds the K steps of piece t to those that begin at t * stride.

    Pieces are cut into blocks of `stride` steps, the last filled up with zeros; block j of piece t falls on block t + j
    of the output, so that the sum is one of whole blocks, shifted.
    """
    batch, length, size, width = pieces.shape
    num_blocks = -(-size // stride)
    pieces = jnp.pad(pieces, ((0, 0), (0, 0), (0, num_blocks * stride - size), (0, 0)))
    blocks = pieces.reshape(batch, length, num_blocks, stride * width)
    shifted = [jnp.pad(blocks[:, :, j], ((0, 0), (j, num_blocks - 1 - j), (0, 0))) for j in range(num_blocks)]
    return sum(shifted).reshape(batch, -1, width)[:, : (length - 1) * stride + size]


def _dilated_input(x, kernel, stride, groups):
    """The same as a convolution of x with stride - 1 zeros between its steps."""
    reach = kernel.shape[0] - 1
    return lax.conv_general_dilated(
        x,
        kernel[::-1],
        (1,),
        ((reach, reach),),
        lhs_dilation=(stride,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )
