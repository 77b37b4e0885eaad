"""Convolutions and recurrences over signals that come in pieces: the layers of every codec.

A signal may come whole, or piece by piece with the state of one call handed to the next. Each layer keeps the inputs
that later outputs still need and gives out what can be computed, so that pieces of any size give the numbers of the
whole, whether the layers look ahead or not.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaudio.nn.layers import weight_normed
from jaxaudio.ops.activations import snake
from jaxaudio.ops.conv import conv, conv_transpose, depthwise_conv_transpose
from jaxaudio.ops.lstm import lstm

PadMode = Literal["zeros", "reflect", "edge"]
State = dict[str, Any]


@dataclasses.dataclass
class Stream:
    """One piece's way through the layers: lives while a call is traced, and is read and written by each layer.

    Attributes:
      state: what the layers kept of the pieces before, by layer; None for a signal's first piece.
      last: whether the signals end with this piece.
      lengths: (B,) steps of each row that are signal, the others being padding on the right; None if all are. Layers
        that change the number of steps change it. Only of last pieces.
      kept: what the layers keep for the next piece, unless this is the last.
    """

    state: State | None = None
    last: bool = True
    lengths: jax.Array | None = None
    kept: State = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.lengths is not None and not self.last:
            raise ValueError("lengths go with a signal's last piece: rows cannot end in pieces before")

    @property
    def first(self) -> bool:
        """Whether the signals begin with this piece."""
        return self.state is None

    @property
    def whole(self) -> bool:
        """Whether this is all there is."""
        return self.first and self.last


def _valid(lengths: jax.Array, num_steps: int) -> jax.Array:
    """(B, T, 1), True where a row is signal."""
    return (jnp.arange(num_steps)[None] < lengths[:, None])[..., None]


def pad_time(
    x: jax.Array, left: int, right: int, mode: PadMode, ends: tuple[jax.Array, jax.Array] | None = None
) -> jax.Array:
    """Pads (B, T, C) by `left` steps before each row and by `right` after its end, as EnCodec's convolutions do.

    A reflection longer than the signal is one of the signal with zeros after it.

    Args:
      x: the signals.
      left: steps before.
      right: steps after.
      mode: zeros, the signal mirrored at its first and last step, or these steps repeated.
      ends: (B,) each row's own length, if that is not T, and (B,) how many steps to put after it, at most `right`.
    Returns:
      (B, left + T + right, C); what comes after a row's own steps means nothing.
    """
    num_steps = x.shape[1]
    if ends is None:
        short = max(0, max(left, right) - num_steps + 1) if mode == "reflect" else 0
        x = jnp.pad(x, ((0, 0), (0, short), (0, 0)))
        numpy_mode = "constant" if mode == "zeros" else mode
        return jnp.pad(x, ((0, 0), (left, right), (0, 0)), mode=numpy_mode)[:, : left + num_steps + right]
    lengths, rights = ends
    if mode == "zeros":
        return jnp.pad(jnp.where(_valid(lengths, num_steps), x, 0), ((0, 0), (left, right), (0, 0)))

    def outside(steps: jax.Array) -> jax.Array:
        """The values at steps (B, n) before 0 or from a row's length on."""
        end = lengths[:, None]
        exists = jnp.ones_like(steps, bool)
        if mode == "edge":
            index = jnp.clip(steps, 0, end - 1)
        else:
            mirror = jnp.maximum(end, jnp.maximum(left, rights[:, None]) + 1) - 1
            index = mirror - jnp.abs(mirror - jnp.abs(steps))
            exists = index < end
        values = jnp.take_along_axis(x, jnp.clip(index, 0, num_steps - 1)[..., None], axis=1)
        return jnp.where(exists[..., None], values, 0)

    batch = x.shape[0]
    before = outside(jnp.broadcast_to(jnp.arange(-left, 0)[None], (batch, left)))
    after = outside(lengths[:, None] + jnp.arange(right)[None])
    x = jnp.concatenate([before, jnp.pad(x, ((0, 0), (0, right), (0, 0)))], axis=1)
    return jax.vmap(lambda row, end, values: jax.lax.dynamic_update_slice_in_dim(row, values, end, 0))(
        x, left + lengths, after
    )


def _uniform(fan_in: int) -> nn.initializers.Initializer:
    """torch's initial weights of a convolution, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


class _Kernel(nn.Module):
    """What forward and transposed convolutions share: kernel, bias and norm.

    Attributes:
      shape: of the kernel, (K, I, O).
      stride: of the convolution.
      causal: no output looks ahead.
      bias: adds one.
      weight_norm: keeps the kernel as direction and magnitude (Salimans & Kingma 2016): per output channel, or per
        input channel of a transposed convolution, as torch does.
      norm: "group" normalises each row of the output over steps and channels.
      dtype: of the computation.
    """

    shape: tuple[int, int, int]
    stride: int = 1
    causal: bool = True
    bias: bool = True
    weight_norm: bool = False
    norm: Literal["none", "group"] = "none"
    dtype: Any = jnp.float32

    def _kernel(self, fan_in: int, norm_axes: tuple[int, int]) -> jax.Array:
        if not self.weight_norm:
            return self.param("kernel", _uniform(fan_in), self.shape, jnp.float32).astype(self.dtype)
        direction = self.param("direction", _uniform(fan_in), self.shape, jnp.float32)
        magnitude = self.param("magnitude", lambda key: jnp.sqrt(jnp.sum(direction**2, norm_axes, keepdims=True)))
        return weight_normed(direction, magnitude).astype(self.dtype)

    def _biased(self, y: jax.Array) -> jax.Array:
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.shape[-1:], jnp.float32)
        return y + bias.astype(self.dtype)[None, None]

    def _normed(self, y: jax.Array, lengths: jax.Array | None, stream: Stream) -> jax.Array:
        if self.norm == "none":
            return y
        if not stream.whole:
            raise ValueError("group norm averages over the whole signal, which cannot come in pieces")
        scale = self.param("norm_scale", nn.initializers.ones, self.shape[-1:], jnp.float32)
        bias = self.param("norm_bias", nn.initializers.zeros, self.shape[-1:], jnp.float32)
        valid = jnp.ones((1, y.shape[1], 1), bool) if lengths is None else _valid(lengths, y.shape[1])
        where = jnp.broadcast_to(valid, y.shape)
        x = y.astype(jnp.float32)
        mean = jnp.mean(x, (1, 2), keepdims=True, where=where)
        variance = jnp.mean((x - mean) ** 2, (1, 2), keepdims=True, where=where)
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale[None, None] + bias[None, None]
        return x.astype(y.dtype)


class StreamConv(_Kernel):
    """Convolution over time with EnCodec's padding: all of it on the left if causal, else on both sides.

    Attributes:
      dilation: steps between the taps.
      pad_mode: what stands outside of the signal.

    A signal of T steps gives ceil(T / stride).
    """

    dilation: int = 1
    pad_mode: PadMode = "zeros"

    @nn.compact
    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        """(B, T, I) -> (B, T', O)."""
        stride, name = self.stride, "/".join(self.path)
        extent = (self.shape[0] - 1) * self.dilation + 1
        padding = extent - stride
        left = padding if self.causal else padding - padding // 2
        x, lengths, missing = x.astype(self.dtype), stream.lengths, left
        if not stream.first:
            kept, missing = stream.state[name], 0
            x = jnp.concatenate([kept, x], axis=1)
            lengths = None if lengths is None else lengths + kept.shape[1]

        def num_outputs(end):
            return -(-(end + missing - left) // stride)

        def num_after(end):  # padding that the last output needs
            return (num_outputs(end) - 1) * stride + extent - missing - end

        if stream.last:
            count = num_outputs(x.shape[1])
            if lengths is None:
                x = pad_time(x, missing, num_after(x.shape[1]), self.pad_mode)
            else:
                x = pad_time(x, missing, extent - left - 1, self.pad_mode, (lengths, num_after(lengths)))
                stream.lengths = num_outputs(lengths)
        else:
            x = pad_time(x, missing, 0, self.pad_mode)
            count = max(0, (x.shape[1] - extent) // stride + 1)
            stream.kept[name] = x[:, count * stride :]
        kernel = self._kernel(self.shape[0] * self.shape[1], (0, 1))
        y = jnp.zeros((x.shape[0], 0, self.shape[-1]), self.dtype)
        if count:
            x = x[:, : (count - 1) * stride + extent]
            y = conv(x, kernel, stride=stride, dilation=self.dilation)
        return self._normed(self._biased(y), stream.lengths, stream)


class StreamConvTranspose(_Kernel):
    """Transposed convolution over time, cut to T * stride steps: on the right if causal, else on both sides.

    Attributes:
      depthwise: each channel has a kernel of its own, of shape (K, 1, O).
      short: cuts the larger half of an odd surplus on the right too, which leaves T * stride - 1 steps (DAC).
    """

    depthwise: bool = False
    short: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        """(B, T, I) -> (B, T', O)."""
        stride, name = self.stride, "/".join(self.path)
        surplus = self.shape[0] - stride
        left = 0 if self.causal else surplus - surplus // 2
        right = left if self.short else surplus - left
        x, lengths = x.astype(self.dtype), stream.lengths
        if lengths is not None:
            x = jnp.where(_valid(lengths, x.shape[1]), x, 0)
        kernel = self._kernel(self.shape[0] * self.shape[2], (0, 2))
        if self.depthwise:
            y = depthwise_conv_transpose(x, kernel[:, 0], stride=stride)
        else:
            y = conv_transpose(x, kernel, stride=stride)
        if not stream.first:
            y = jnp.pad(stream.state[name], ((0, 0), (0, y.shape[1] - surplus), (0, 0))) + y
        ready = y.shape[1] - surplus
        if not stream.last:
            stream.kept[name] = y[:, ready:]  # without bias, which each step gets once
        y = self._biased(y)
        begin = left if stream.first else 0
        end = y.shape[1] - right if stream.last else ready
        full = None if lengths is None else (lengths - 1) * stride + self.shape[0]
        stream.lengths = None if full is None else full - right - begin
        return self._normed(y, full, stream)[:, begin:end]


class StreamLSTM(nn.Module):
    """Layers of LSTM as wide as their input, with one residual sum around all of them."""

    num_layers: int

    @nn.compact
    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        dim, name = x.shape[-1], "/".join(self.path)
        params = [_LSTMParams(dim, name=f"layer_{i}")() for i in range(self.num_layers)]
        y, state = lstm(x, params, None if stream.first else stream.state[name])
        if not stream.last:
            stream.kept[name] = state
        return x + y


class _LSTMParams(nn.Module):
    dim: int

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        shapes = {"input_kernel": (self.dim, 4 * self.dim), "hidden_kernel": (self.dim, 4 * self.dim)}
        params = {name: self.param(name, _uniform(self.dim), shape, jnp.float32) for name, shape in shapes.items()}
        return params | {"bias": self.param("bias", nn.initializers.zeros, (4 * self.dim,), jnp.float32)}


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha with alpha learned for each channel (Ziyin et al. 2020, equation 3)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape, channels last."""
        alpha = self.param("alpha", nn.initializers.ones, x.shape[-1:], jnp.float32)
        return snake(x, alpha)
