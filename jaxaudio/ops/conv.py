"""Convolutions over time, forward and transposed, channels last. No padding anywhere: callers pad and cut.

Times below are of one core of a CPU with XLA 0.10, output alone / output and both gradients.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxaudio.ops.matmul import project

_FEW_STEPS = 16  # of all rows together, as when a stream's frames are coded one by one


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
    size, inputs, outputs = kernel.shape
    extent = (size - 1) * dilation + 1
    if x.shape[1] < extent:
        raise ValueError(f"x has {x.shape[1]} steps, fewer than the kernel's {extent}; pad it before")
    if groups == stride == size == 1:
        return project(x, kernel[0])  # 64 to 64 channels: 6.9 ms, as a convolution 7.8
    on_cpu = jax.default_backend() == "cpu"
    num_steps = (x.shape[1] - extent) // stride + 1
    if on_cpu and groups == dilation == 1 and len(x) * num_steps <= _FEW_STEPS:
        # A product does not rearrange the kernel first: 512 to 1024 channels, K = 16, one step: 1.6 ms, not 3.4.
        windows = [x[:, step * stride : step * stride + size] for step in range(num_steps)]
        return project(jnp.stack(windows, axis=1).reshape(len(x), num_steps, -1), kernel.reshape(-1, outputs))
    if on_cpu and groups > 1 == dilation and inputs > 1:
        return _grouped(x, kernel, stride, groups)  # 256 groups of 4 to 4 channels: 6 ms with gradients, not 1000
    flat = on_cpu and groups == dilation == 1
    if flat and stride == outputs == 1:
        return _sum_of_shifted(x, kernel)  # 96 channels to 1: 7.3 ms, as a convolution 17.9
    if flat and inputs <= 32:
        # As a picture of one row: 1 to 32 channels 1.6 ms, not 8.4; 32 to 64 with stride 2 10.5 ms, not 15.
        return _conv(x[:, None], kernel[None], (1, stride), (1, 1), 1)[:, 0]
    return _conv(x, kernel, (stride,), (dilation,), groups)


def _conv(x, kernel, strides, dilations, groups):
    axes = "HW"[2 - len(strides) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        "VALID",
        rhs_dilation=dilations,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=groups,
    )


def _grouped(x, kernel, stride, groups):
    """A product for each group of all inputs that an output hears, gathered in blocks of one stride."""
    size, inputs, outputs = kernel.shape
    num_steps = (x.shape[1] - size) // stride + 1
    reach = -(-size // stride)
    num_blocks = num_steps - 1 + reach
    x = jnp.pad(x, ((0, 0), (0, max(num_blocks * stride - x.shape[1], 0)), (0, 0)))[:, : num_blocks * stride]
    x = x.reshape(len(x), num_blocks, stride, groups, inputs).transpose(3, 0, 1, 2, 4)
    x = x.reshape(groups, -1, num_blocks, stride * inputs)
    heard = jnp.concatenate([x[:, :, i : i + num_steps] for i in range(reach)], axis=-1)
    kernel = jnp.pad(kernel, ((0, reach * stride - size), (0, 0), (0, 0)))
    kernel = kernel.reshape(-1, groups, outputs // groups).swapaxes(0, 1)
    y = jnp.einsum("GBTI,GIO->BTGO", heard, kernel)
    return y.reshape(*y.shape[:2], outputs)


def _sum_of_shifted(x, kernel):
    """All taps of an output of one channel in one product, then added where they belong."""
    taps = project(x, kernel[:, :, 0].T)
    length = x.shape[1] - len(kernel) + 1
    return sum(taps[:, k : k + length, k : k + 1] for k in range(len(kernel)))


def conv_transpose(
    x: Float[Array, "B T I"], kernel: Float[Array, "K I O"], *, stride: int
) -> Float[Array, "B T_out O"]:
    """Adds x[t] @ kernel[k] to out[t * stride + k], as torch's conv_transpose1d without padding.

    A convolution with stride * O outputs, which are the O channels of `stride` steps: of the kernel's ceil(K / stride)
    blocks of taps, the first meets the latest input. 128 to 64 channels with stride 4: 22 / 35 ms; the product with
    all taps and its overlapping sum 24 / 74, a convolution of x with zeros between its steps 25 / many times that.

    Args:
      x: any length.
      kernel: torch's weight (I, O, K) transposed by (2, 0, 1).
      stride: at least 1; need not divide K.
    Returns:
      (B, (T - 1) * stride + K, O).
    """
    size, inputs, outputs = kernel.shape
    if jax.default_backend() == "cpu" and x.shape[0] * x.shape[1] <= _FEW_STEPS:
        return _few_transposed(x, kernel, stride)
    num_blocks = -(-size // stride)
    kernel = jnp.pad(kernel, ((0, num_blocks * stride - size), (0, 0), (0, 0)))
    kernel = kernel.reshape(num_blocks, stride, inputs, outputs).swapaxes(1, 2).reshape(num_blocks, inputs, -1)
    # Padding as an operation of its own: as the convolution's, the kernel's gradient takes forty times as long.
    padded = jnp.pad(x, ((0, 0), (num_blocks - 1, num_blocks - 1), (0, 0)))
    blocks = conv(padded, kernel[::-1])
    return blocks.reshape(len(x), -1, outputs)[:, : (x.shape[1] - 1) * stride + size]


def _few_transposed(x, kernel, stride):
    """A product for each tap, the kernel read as it lies: 1024 to 512 channels, K = 16, two steps: 3.3 ms, not 9.5."""
    batch, length, inputs = x.shape
    size, _, outputs = kernel.shape
    rows = jnp.broadcast_to(x.reshape(1, -1, inputs), (size, batch * length, inputs))
    pieces = jnp.einsum("KRI,KIO->RKO", rows, kernel).reshape(batch, length, size, outputs)
    y = jnp.zeros((batch, (length - 1) * stride + size, outputs), pieces.dtype)
    for step in range(length):
        y = y.at[:, step * stride : step * stride + size].add(pieces[:, step])
    return y


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
    size, width = kernel.shape
    num_blocks = -(-size // stride)
    kernel = jnp.pad(kernel, ((0, num_blocks * stride - size), (0, 0))).reshape(num_blocks, stride, width)

    def shifted(index, block):
        return jnp.pad(x, ((0, 0), (index, num_blocks - 1 - index), (0, 0)))[:, :, None] * block[None, None]

    blocks = sum(shifted(index, block) for index, block in enumerate(kernel))
    return blocks.reshape(len(x), -1, width)[:, : (x.shape[1] - 1) * stride + size]
