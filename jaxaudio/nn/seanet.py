"""The one convolutional autoencoder of the codecs: SoundStream, EnCodec, DAC and Mimi are its configurations.

Tagliasacchi et al. 2020, https://arxiv.org/abs/2009.02095 (SEANet); Zeghidour et al. 2021,
https://arxiv.org/abs/2107.03312, section 3.1 and figure 3; Defossez et al. 2022, https://arxiv.org/abs/2210.13438,
section 3.1; Kumar et al. 2023, https://arxiv.org/abs/2306.06546, section 3.1.
"""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaudio.nn.layers import weight_normed
from jaxaudio.nn.streaming import PadMode, Snake, Stream, StreamConv, StreamConvTranspose, StreamLSTM
from jaxaudio.ops.activations import elu


@dataclasses.dataclass(frozen=True)
class SEANetConfig:
    """Shape and kind of an encoder and its decoder.

    Attributes:
      channels: of the waveform.
      num_filters: channels after the encoder's first convolution; each stage doubles them.
      decoder_filters: channels before the decoder's last convolution; num_filters if None.
      embed_dim: channels of the latents, D.
      strides: of the encoder's stages in time order; the decoder goes back through them.
      dilations: of the residual units of a stage.
      kernel_size, last_kernel_size: of each half's first and last convolution.
      encoder_last_kernel_size: of the encoder's last one, if it differs.
      residual_kernel_size: of a residual unit's first convolution; its second has 1.
      compress: how many times narrower a residual unit's inner channels are.
      conv_shortcut: a convolution of width 1 in the residual sum; the identity if False.
      activation: before every convolution but each half's first.
      final_tanh: bounds the waveform to (-1, 1).
      num_lstm_layers: between the stages and the latents' convolution.
      causal: nothing looks ahead.
      pad_mode: what stands outside of the signal.
      short_transpose: odd strides lose a step, as in DAC's released models.
      norm: "group" after every convolution, over steps and channels.
      weight_norm: kernels as direction and magnitude, for training; `fold_weight_norm` makes kernels of them.
      dtype: "float32" or "bfloat16" compute; parameters are always float32.
    """

    channels: int = 1
    num_filters: int = 32
    decoder_filters: int | None = None
    embed_dim: int = 128
    strides: tuple[int, ...] = (2, 4, 5, 8)
    dilations: tuple[int, ...] = (1,)
    kernel_size: int = 7
    last_kernel_size: int = 7
    encoder_last_kernel_size: int | None = None
    residual_kernel_size: int = 3
    compress: int = 2
    conv_shortcut: bool = True
    activation: Literal["elu", "snake"] = "elu"
    final_tanh: bool = False
    num_lstm_layers: int = 2
    causal: bool = True
    pad_mode: PadMode = "reflect"
    short_transpose: bool = False
    norm: Literal["none", "group"] = "none"
    weight_norm: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in ("channels", "num_filters", "embed_dim", "kernel_size", "last_kernel_size", "compress"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("strides", "dilations"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be one or more positive numbers, got {getattr(self, name)}")
        if self.num_filters % self.compress or (self.decoder_filters or self.compress) % self.compress:
            raise ValueError(
                f"compress={self.compress} must divide num_filters {self.num_filters} and "
                f"decoder_filters {self.decoder_filters}"
            )

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return math.prod(self.strides)

    def conv(
        self, width: int, inputs: int, outputs: int, name: str, *, stride: int = 1, dilation: int = 1
    ) -> StreamConv:
        """A convolution of the kind that this config says."""
        return StreamConv(
            (width, inputs, outputs),
            stride,
            self.causal,
            weight_norm=self.weight_norm,
            norm=self.norm,
            dtype=self.dtype,
            dilation=dilation,
            pad_mode=self.pad_mode,
            name=name,
        )


def _activate(config: SEANetConfig, x: jax.Array, name: str) -> jax.Array:
    return elu(x) if config.activation == "elu" else Snake(name=name)(x)


class ResidualUnit(nn.Module):
    """Two convolutions beside a shortcut: a dilated one to fewer channels, one of width 1 back."""

    config: SEANetConfig
    width: int
    dilation: int

    @nn.compact
    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        """(B, T, C) -> (B, T', C); T' is T but for a lag in pieces of a signal with layers that look ahead."""
        config, hidden, name = self.config, self.width // self.config.compress, "/".join(self.path)
        shortcut = config.conv(1, self.width, self.width, "shortcut")(x, stream) if config.conv_shortcut else x
        y = _activate(config, x, "snake_1")
        y = config.conv(config.residual_kernel_size, self.width, hidden, "conv_1", dilation=self.dilation)(y, stream)
        y = _activate(config, y, "snake_2")
        y = config.conv(1, hidden, self.width, "conv_2")(y, stream)
        if not stream.first:
            shortcut = jnp.concatenate([stream.state[name], shortcut], axis=1)
        if not stream.last:
            stream.kept[name] = shortcut[:, y.shape[1] :]
        return shortcut[:, : y.shape[1]] + y


class SEANetEncoder(nn.Module):
    """Waveform to latents."""

    config: SEANetConfig

    @nn.compact
    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        """(B, A, channels) -> (B, ceil(A / hop_length), D)."""
        config, width = self.config, self.config.num_filters
        x = config.conv(config.kernel_size, config.channels, width, "conv_in")(x, stream)
        for index, stride in enumerate(config.strides):
            x = _EncoderStage(config, width, stride, name=f"stage_{index}")(x, stream)
            width *= 2
        if config.num_lstm_layers:
            x = StreamLSTM(config.num_lstm_layers, name="lstm")(x, stream)
        x = _activate(config, x, "snake")
        last = config.encoder_last_kernel_size or config.last_kernel_size
        return config.conv(last, width, config.embed_dim, "conv_out")(x, stream)


class _EncoderStage(nn.Module):
    config: SEANetConfig
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        for index, dilation in enumerate(self.config.dilations):
            x = ResidualUnit(self.config, self.width, dilation, name=f"unit_{index}")(x, stream)
        x = _activate(self.config, x, "snake")
        down = self.config.conv(2 * self.stride, self.width, 2 * self.width, "down", stride=self.stride)
        return down(x, stream)


class SEANetDecoder(nn.Module):
    """Latents to waveform, the encoder's mirror image."""

    config: SEANetConfig

    @nn.compact
    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        """(B, T, D) -> (B, T * hop_length, channels)."""
        config = self.config
        width = (config.decoder_filters or config.num_filters) * 2 ** len(config.strides)
        x = config.conv(config.kernel_size, config.embed_dim, width, "conv_in")(x, stream)
        if config.num_lstm_layers:
            x = StreamLSTM(config.num_lstm_layers, name="lstm")(x, stream)
        for index, stride in enumerate(reversed(config.strides)):
            x = _DecoderStage(config, width, stride, name=f"stage_{index}")(x, stream)
            width //= 2
        x = _activate(config, x, "snake")
        x = config.conv(config.last_kernel_size, width, config.channels, "conv_out")(x, stream)
        return jnp.tanh(x) if config.final_tanh else x


class _DecoderStage(nn.Module):
    config: SEANetConfig
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        config = self.config
        x = _activate(config, x, "snake")
        x = StreamConvTranspose(
            (2 * self.stride, self.width, self.width // 2),
            self.stride,
            config.causal,
            weight_norm=config.weight_norm,
            norm=config.norm,
            dtype=config.dtype,
            short=config.short_transpose,
            name="up",
        )(x, stream)
        for index, dilation in enumerate(config.dilations):
            x = ResidualUnit(config, self.width // 2, dilation, name=f"unit_{index}")(x, stream)
        return x


def fold_weight_norm(params: Any) -> Any:
    """Directions and magnitudes of convolutions as kernels: parameters of the same net with weight_norm=False."""
    if not isinstance(params, dict):
        return params
    if "direction" not in params:
        return {name: fold_weight_norm(value) for name, value in params.items()}
    folded = {name: value for name, value in params.items() if name not in ("direction", "magnitude")}
    return folded | {"kernel": weight_normed(params["direction"], params["magnitude"])}
