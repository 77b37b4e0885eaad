"""Networks that tell recordings from reconstructions: one module for all families, and those that hear the waveform.

The networks over spectrograms are in `stft_discriminators`, the configs and presets in `discriminator_config`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxaudio.nn.discriminator_config import DiscriminatorConfig, PeriodConfig, ScaleConfig
from jaxaudio.nn.norm_conv import NormConv
from jaxaudio.nn.stft_discriminators import BandNetwork, ResidualSTFTNetwork, STFTNetwork

Output = tuple[jax.Array, list[jax.Array]]


class Discriminators(nn.Module):
    """All sub-discriminators of a config: `Discriminators(PRESETS["dac"])`.

    Channels are judged one by one (EnCodec, section 3.4), as rows of the batch: row b * channels + c.

    Parameters are under scale_{index}, period_{period}, residual_stft, stft_{win_length} and band_{win_length}.
    """

    config: DiscriminatorConfig

    @nn.compact
    def __call__(self, waveform: Float[Array, "B A channels"]) -> list[tuple[Any, list[Any]]]:
        """(logits, feature_maps) of each sub-discriminator, in the order of the config's fields.

        Args:
          waveform: samples, at least half the longest window.
        Returns:
          logits: high for recordings, (rows, positions ...); local in time, not averaged.
          feature_maps: activations before the logits, first layer first, (rows, positions ..., features), all that
            the networks' feature losses compare; the logits are not among them.
        """
        config = self.config
        rows = jnp.swapaxes(waveform, 1, 2).reshape(-1, waveform.shape[1])
        if config.normalize:
            rows = rows - rows.mean(axis=1, keepdims=True)
            rows = 0.8 * rows / (jnp.abs(rows).max(axis=1, keepdims=True) + 1e-9)
        networks: list[nn.Module] = []
        if config.scales:
            for index, downsampling in enumerate(config.scales.downsampling):
                networks.append(ScaleNetwork(config.scales, downsampling, name=f"scale_{index}"))
        if config.periods:
            networks += [PeriodNetwork(config.periods, p, name=f"period_{p}") for p in config.periods.periods]
        if config.residual_stft:
            networks.append(ResidualSTFTNetwork(config.residual_stft, name="residual_stft"))
        if config.multi_scale_stft:
            stft = config.multi_scale_stft
            networks += [STFTNetwork(stft, win_length, name=f"stft_{win_length}") for win_length in stft.win_lengths]
        if config.multi_band:
            bands = config.multi_band
            networks += [BandNetwork(bands, win_length, name=f"band_{win_length}") for win_length in bands.win_lengths]
        return [network(rows) for network in networks]


class ScaleNetwork(nn.Module):
    """One waveform network of `ScaleConfig`."""

    config: ScaleConfig
    downsampling: int

    @nn.compact
    def __call__(self, rows: Float[Array, "rows A"]) -> Output:
        """Logits (rows, T), T the samples over downsampling and all strides."""
        config = self.config
        first, middle, last = config.kernel_sizes
        x = rows[..., None]
        for _ in range(self.downsampling.bit_length() - 1):
            x = nn.avg_pool(x, (4,), (2,), padding=((1, 1),), count_include_pad=False)  # MelGAN's
        x = jnp.pad(x, ((0, 0), (first // 2, first // 2), (0, 0)), mode="reflect")
        features = config.features
        convs = [NormConv(features, (first,), padding=(0,), name="conv_0")]
        for index, (stride, groups) in enumerate(zip(config.strides, config.groups, strict=True)):
            features, kernel = min(features * stride, config.max_features), (10 * stride + 1,)
            convs.append(NormConv(features, kernel, strides=(stride,), groups=groups, name=f"conv_{index + 1}"))
        features = min(2 * features, config.max_features)
        convs.append(NormConv(features, (middle,), name=f"conv_{len(convs)}"))
        feature_maps = []
        for conv in convs:
            x = nn.leaky_relu(conv(x), config.negative_slope)
            feature_maps.append(x)
        return NormConv(1, (last,), name="conv_out")(x)[..., 0], feature_maps


class PeriodNetwork(nn.Module):
    """One network of `PeriodConfig`: convolutions over time for each sample of a period by itself."""

    config: PeriodConfig
    period: int

    @nn.compact
    def __call__(self, rows: Float[Array, "rows A"]) -> Output:
        """Logits (rows, period, T); feature maps (rows, period, T, features)."""
        config, period = self.config, self.period
        kernel_size, last_kernel_size = config.kernel_sizes
        missing = -rows.shape[1] % period
        if config.always_pad:
            missing = missing or period
        x = jnp.pad(rows, ((0, 0), (0, missing)), mode="reflect").reshape(rows.shape[0], -1, period)
        # The samples at one place of their period are a row of their own: on a CPU twice as fast as pictures.
        x = jnp.swapaxes(x, 1, 2).reshape(rows.shape[0] * period, -1, 1)
        feature_maps = []
        for index, features in enumerate(config.features):
            stride = 1 if index == len(config.features) - 1 else config.stride
            x = NormConv(features, (kernel_size,), strides=(stride,), name=f"conv_{index}")(x)
            x = nn.leaky_relu(x, config.negative_slope)
            feature_maps.append(x.reshape(rows.shape[0], period, *x.shape[1:]))
        logits = NormConv(1, (last_kernel_size,), name="conv_out")(x)
        return logits.reshape(rows.shape[0], period, -1), feature_maps
