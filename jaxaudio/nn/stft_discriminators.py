"""Discriminators that hear complex spectrograms: images of time by frequency, real and imaginary parts as channels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaudio.nn.discriminator_config import MultiBandConfig, MultiScaleSTFTConfig, ResidualSTFTConfig
from jaxaudio.nn.norm_conv import NormConv
from jaxaudio.ops import stft

Output = tuple[jax.Array, list[jax.Array]]


class ResidualSTFTNetwork(nn.Module):
    """SoundStream's: residual blocks that halve the frequencies, and every second one the time.

    The highest bin is dropped, so that F = win_length / 2 as in the paper, and the ends are reflected by
    (win_length - hop_length) / 2, so that T = A / hop_length. Where the paper is silent it follows the codec's own
    residual units: an activation before each convolution, a plain 1x1 convolution as the shortcut.
    """

    config: ResidualSTFTConfig

    @nn.compact
    def __call__(self, rows: Float[Array, "rows A"]) -> Output:
        """Logits (rows, ceil(T / 8)); feature maps: the first convolution, then inside and output of each block."""
        config = self.config
        x = _spectrogram(_pad_ends(rows, config.win_length, config.hop_length), config.win_length, config.hop_length)
        x = self._conv(config.features, (config.kernel_size,) * 2, "conv_in")(x[:, :, :-1])
        feature_maps = [x]
        features = config.features
        for index, (multiplier, strides) in enumerate(zip(config.multipliers, config.strides, strict=True)):
            inner = self._conv(features, (3, 3), f"block_{index}_conv_1")(nn.leaky_relu(x, config.negative_slope))
            features *= multiplier
            kernel_size = tuple(stride + 2 for stride in strides)
            outer = self._conv(features, kernel_size, f"block_{index}_conv_2", strides)
            x = outer(nn.leaky_relu(inner, config.negative_slope)) + self._conv(
                features, (1, 1), f"block_{index}_shortcut", strides
            )(x)
            feature_maps += [inner, x]
        logits = NormConv(1, (1, x.shape[2]), padding=(0, 0), weight_norm=config.weight_norm, name="conv_out")
        return logits(nn.leaky_relu(x, config.negative_slope))[:, :, 0, 0], feature_maps

    def _conv(self, features, kernel_size, name, strides=(1, 1)):
        return NormConv(features, kernel_size, strides, padding="SAME", weight_norm=self.config.weight_norm, name=name)


class STFTNetwork(nn.Module):
    """One of EnCodec's; its spectrogram is divided by the norm of the window and begins at the first sample."""

    config: MultiScaleSTFTConfig
    win_length: int

    @nn.compact
    def __call__(self, rows: Float[Array, "rows A"]) -> Output:
        """Logits (rows, T, F / 8), T = 1 + (A - win_length) // hop; feature maps likewise, of every convolution."""
        config = self.config
        square = (config.kernel_size[0],) * 2
        window_norm = float(np.sqrt(np.sum(stft.hann_window(self.win_length) ** 2)))
        x = _spectrogram(rows, self.win_length, self.win_length // 4) / window_norm
        convs = [NormConv(config.features, config.kernel_size, weight_norm=config.first_weight_norm, name="conv_0")]
        for index, dilation in enumerate(config.dilations):
            convs.append(NormConv(config.features, config.kernel_size, (1, 2), dilation, name=f"conv_{index + 1}"))
        convs.append(NormConv(config.features, square, name=f"conv_{len(convs)}"))
        x, feature_maps = _run(convs, x, config.negative_slope)
        return NormConv(1, square, name="conv_out")(x)[..., 0], feature_maps


class BandNetwork(nn.Module):
    """One of DAC's: a stack of convolutions for each band, and one over all bands side by side.

    Ends are reflected so that T = ceil(A / hop), a frame for every hop.
    """

    config: MultiBandConfig
    win_length: int

    @nn.compact
    def __call__(self, rows: Float[Array, "rows A"]) -> Output:
        """Logits (rows, T, F'), F' of all bands; feature maps: of every convolution, the lowest band first."""
        config, hop_length = self.config, self.win_length // 4
        square = (config.kernel_size[0],) * 2
        spectrogram = _spectrogram(_pad_ends(rows, self.win_length, hop_length), self.win_length, hop_length)
        num_bins = spectrogram.shape[2]
        bands, feature_maps = [], []
        for band, limits in enumerate(config.bands):
            low, high = (int(limit * num_bins) for limit in limits)
            strides = [(1, 1)] + [(1, 2)] * config.num_strided
            convs = [
                NormConv(config.features, config.kernel_size, stride, name=f"band_{band}_conv_{index}")
                for index, stride in enumerate(strides)
            ]
            convs.append(NormConv(config.features, square, name=f"band_{band}_conv_{len(convs)}"))
            x, band_maps = _run(convs, spectrogram[:, :, low:high], config.negative_slope)
            bands.append(x)
            feature_maps += band_maps
        return NormConv(1, square, name="conv_out")(jnp.concatenate(bands, axis=2))[..., 0], feature_maps


def _run(convs: list[NormConv], x: jax.Array, negative_slope: float) -> Output:
    """The last activation and all of them."""
    feature_maps = []
    for conv in convs:
        x = nn.leaky_relu(conv(x), negative_slope)
        feature_maps.append(x)
    return x, feature_maps


def _spectrogram(rows: jax.Array, win_length: int, hop_length: int) -> jax.Array:
    """(rows, A) -> (rows, T, F, 2), real parts and imaginary parts, of the frames that lie inside the rows."""
    frames = stft.frame(rows, win_length, hop_length) * stft.hann_window(win_length)[None, None]
    return jnp.stack(stft.real_imaginary(frames), axis=-1)


def _pad_ends(rows: jax.Array, win_length: int, hop_length: int) -> jax.Array:
    """Mirrors the ends so that there are ceil(A / hop_length) frames."""
    margin = (win_length - hop_length) // 2
    return jnp.pad(rows, ((0, 0), (margin, margin + -rows.shape[1] % hop_length)), mode="reflect")
