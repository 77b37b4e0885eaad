"""DAC, the Descript audio codec: wide convolutions with Snake, and codes looked up by direction in few dimensions.

Kumar et al. 2023, https://arxiv.org/abs/2306.06546. Sizes and padding are those of the released models.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxaudio.nn.codec import Codec, CodecConfig
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.nn.seanet import SEANetConfig
from jaxaudio.nn.streaming import Stream


@dataclasses.dataclass(frozen=True)
class DACConfig(CodecConfig):
    """Sizes of one model."""


def _dac(sample_rate: int, strides: tuple[int, ...], num_codebooks: int) -> DACConfig:
    seanet = SEANetConfig(
        num_filters=64,
        decoder_filters=96,
        embed_dim=1024,
        strides=strides,
        dilations=(1, 3, 9),
        residual_kernel_size=7,
        compress=1,
        conv_shortcut=False,
        activation="snake",
        final_tanh=True,
        num_lstm_layers=0,
        causal=False,
        pad_mode="zeros",
        encoder_last_kernel_size=3,
        short_transpose=True,
    )
    rvq = RVQConfig(num_codebooks, 1024, 8, 1024, projection="per_level", distance="cosine", learned_by="gradient")
    return DACConfig(sample_rate, seanet, rvq)


PRESETS: dict[str, DACConfig] = {
    "dac_44khz": _dac(44_100, (2, 4, 8, 8), 9),
    "dac_24khz": _dac(24_000, (2, 4, 5, 8), 32),
    "dac_16khz": _dac(16_000, (2, 4, 5, 8), 12),
}


class DAC(Codec):
    """Waveform to codes and back."""

    config: DACConfig

    def to_latents(self, waveform: jax.Array, stream: Stream) -> jax.Array:
        """(B, A, channels) -> (B, T, D); signals end with zeros up to a whole frame."""
        if stream.last:
            hop = self.config.hop_length
            if stream.lengths is not None:
                inside = jnp.arange(waveform.shape[1])[None] < stream.lengths[:, None]
                waveform = jnp.where(inside[..., None], waveform, 0)
                stream.lengths = -(-stream.lengths // hop) * hop
            waveform = jnp.pad(waveform, ((0, 0), (0, -waveform.shape[1] % hop), (0, 0)))
        return self.encoder(waveform, stream)
