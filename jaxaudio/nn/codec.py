"""What all codecs have in common: an encoder, a residual quantizer, a decoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxaudio.nn.rvq import Quantized, ResidualVectorQuantizer, RVQConfig
from jaxaudio.nn.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder
from jaxaudio.nn.streaming import State, Stream


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """Sizes of a codec.

    Attributes:
      sample_rate: Hz.
      seanet: encoder and decoder.
      rvq: quantizer.
      bandwidths: kbps that the model was trained for; any number of codebooks if empty.
    """

    sample_rate: int
    seanet: SEANetConfig
    rvq: RVQConfig
    bandwidths: tuple[float, ...] = ()

    @property
    def channels(self) -> int:
        """Of the waveform."""
        return self.seanet.channels

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return self.seanet.hop_length

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop_length

    @property
    def num_codebooks(self) -> int:
        """Levels of the quantizer."""
        return self.rvq.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Codes of a level."""
        return self.rvq.codebook_size

    @property
    def causal(self) -> bool:
        """Whether frames can be coded as they come."""
        return self.seanet.causal

    @property
    def segment_length(self) -> int | None:
        """Samples of the pieces that are coded one by one; None codes the whole."""
        return None


class Codec(nn.Module):
    """Waveform to codes and back; the codecs of `models` are this with a config and what is special to them."""

    config: CodecConfig

    def setup(self) -> None:
        """Makes the three parts."""
        self.encoder = SEANetEncoder(self.config.seanet)
        self.quantizer = ResidualVectorQuantizer(self.config.rvq)
        self.decoder = SEANetDecoder(self.config.seanet)

    def to_latents(self, waveform: jax.Array, stream: Stream) -> jax.Array:
        """(B, A, channels) -> (B, T, D)."""
        return self.encoder(waveform, stream)

    def to_waveform(self, latents: jax.Array, stream: Stream) -> jax.Array:
        """(B, T, D) -> (B, A, channels)."""
        return self.decoder(latents, stream)

    def encode(
        self,
        waveform: Float[Array, "B A channels"],
        num_codebooks: int | None = None,
        *,
        lengths: Int[Array, " B"] | None = None,
        state: State | None = None,
        last: bool = True,
    ) -> tuple[Int[Array, "B Q T"], State]:
        """Codes of the first levels, for a signal or a piece of one; see `nn.streaming`.

        Args:
          waveform: samples in [-1, 1].
          num_codebooks: how many levels; all if None.
          lengths: samples of each row; codes after ceil(length / hop_length) mean nothing.
          state: what the call on the piece before returned.
          last: whether the signal ends here.
        """
        stream = Stream(state, last, lengths)
        latents = self.to_latents(waveform, stream)
        return self.quantizer.encode(latents, num_codebooks or self.config.num_codebooks), stream.kept

    def decode(
        self,
        codes: Int[Array, "B Q T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        state: State | None = None,
        last: bool = True,
    ) -> tuple[Float[Array, "B A channels"], State]:
        """Waveform of codes; arguments as for `encode`, lengths in frames."""
        stream = Stream(state, last, lengths)
        return self.to_waveform(self.quantizer.decode(codes), stream), stream.kept

    def __call__(
        self, waveform: Float[Array, "B A channels"], num_levels: Int[Array, " B"]
    ) -> tuple[Float[Array, "B A channels"], Quantized]:
        """Reconstruction with so many levels for each row, and what training needs; as long as the input."""
        quantized = self.quantizer(self.to_latents(waveform, Stream()), num_levels)
        reconstruction = self.to_waveform(quantized.latents, Stream())[:, : waveform.shape[1]]
        missing = waveform.shape[1] - reconstruction.shape[1]  # see `SEANetConfig.short_transpose`
        return jnp.pad(reconstruction, ((0, 0), (0, missing), (0, 0))), quantized
