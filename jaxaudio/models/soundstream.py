"""SoundStream: a causal convolutional codec without recurrence, at any bitrate up to its own, which can denoise.

Zeghidour et al. 2021, https://arxiv.org/abs/2107.03312; the 16 kHz model is AudioLM's (Borsos et al. 2022,
https://arxiv.org/abs/2209.03143, section III-B).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxaudio.nn.codec import Codec, CodecConfig
from jaxaudio.nn.rvq import Quantized, RVQConfig
from jaxaudio.nn.seanet import SEANetConfig
from jaxaudio.nn.streaming import State, Stream


@dataclasses.dataclass(frozen=True)
class SoundStreamConfig(CodecConfig):
    """Sizes of one model.

    Attributes:
      denoising: adds FiLM after the encoder (section 3.6), by which a caller asks for the noise to be taken out.
    """

    denoising: bool = False


def _soundstream(sample_rate: int, num_codebooks: int) -> SoundStreamConfig:
    # Units of half the width: with them alone the sizes of the paper's table I come out (8.4 M for 32 filters).
    seanet = SEANetConfig(
        num_filters=32,
        embed_dim=256,
        dilations=(1, 3, 9),
        residual_kernel_size=7,
        compress=2,
        conv_shortcut=False,
        num_lstm_layers=0,
        pad_mode="zeros",
        encoder_last_kernel_size=3,
    )
    return SoundStreamConfig(sample_rate, seanet, RVQConfig(num_codebooks, 1024, 256, 256))


PRESETS: dict[str, SoundStreamConfig] = {
    "soundstream_24khz": _soundstream(24_000, 24),
    "soundstream_16khz": _soundstream(16_000, 12),
}


class SoundStream(Codec):
    """Waveform to codes and back."""

    config: SoundStreamConfig

    def setup(self) -> None:
        """Makes the parts."""
        super().setup()
        if self.config.denoising:
            # Row 0 is for keeping the noise, row 1 for leaving it out.
            dim = self.config.seanet.embed_dim
            self.film_gamma = self.param("film_gamma", nn.initializers.ones, (2, dim), jnp.float32)
            self.film_beta = self.param("film_beta", nn.initializers.zeros, (2, dim), jnp.float32)

    def encode(
        self,
        waveform: Float[Array, "B A channels"],
        num_codebooks: int | None = None,
        *,
        denoise: Bool[Array, " B"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        state: State | None = None,
        last: bool = True,
    ) -> tuple[Int[Array, "B Q T"], State]:
        """As `Codec.encode`; `denoise` says of which rows the noise is to be left out, of none if None.

        Raises:
          ValueError: `denoise` for a model without it.
        """
        stream = Stream(state, last, lengths)
        latents = self._conditioned(self.to_latents(waveform, stream), denoise)
        return self.quantizer.encode(latents, num_codebooks or self.config.num_codebooks), stream.kept

    def __call__(
        self,
        waveform: Float[Array, "B A channels"],
        num_levels: Int[Array, " B"],
        denoise: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B A channels"], Quantized]:
        """As `Codec.__call__`; `denoise` as in `encode`."""
        latents = self._conditioned(self.to_latents(waveform, Stream()), denoise)
        quantized = self.quantizer(latents, num_levels)
        return self.to_waveform(quantized.latents, Stream())[:, : waveform.shape[1]], quantized

    def _conditioned(self, latents: jax.Array, denoise: jax.Array | None) -> jax.Array:
        if not self.config.denoising:
            if denoise is not None:
                raise ValueError("denoise was given, but the model has denoising=False")
            return latents
        rows = jnp.zeros(len(latents), jnp.int32) if denoise is None else denoise.astype(jnp.int32)
        return self.film_gamma[rows][:, None] * latents + self.film_beta[rows][:, None]
