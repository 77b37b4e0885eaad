"""Mimi: a streaming codec of 12.5 frames a second, with a Transformer on each side and a semantic first code.

Defossez et al. 2024 (Moshi), https://arxiv.org/abs/2410.00037, section 3.3. Sizes and padding are those of the released
model.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaudio.nn.codec import Codec, CodecConfig
from jaxaudio.nn.rvq import Quantized, ResidualVectorQuantizer, RVQConfig
from jaxaudio.nn.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder
from jaxaudio.nn.streaming import Stream, StreamConv, StreamConvTranspose
from jaxaudio.nn.transformer import Transformer, init_caches
from jaxaudio.nn.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class MimiConfig(CodecConfig):
    """Sizes of the model.

    Attributes:
      transformer: of each of the two, which run at `downsampling` times the frame rate.
      downsampling: from the convolutions' rate to that of the codes.
      num_semantic: levels of the semantic quantizer; the rest of `rvq.num_codebooks` are acoustic.
    """

    transformer: TransformerConfig = TransformerConfig(
        num_layers=8,
        embed_dim=512,
        num_heads=8,
        mlp_dim=2048,
        window=250,
        norm_epsilon=1e-5,
        final_norm=False,
        layer_scale=0.01,
        activation="gelu",
        mlp_bias=False,
        positions="rotary",
    )
    downsampling: int = 2
    num_semantic: int = 1

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return self.seanet.hop_length * self.downsampling


PRESETS: dict[str, MimiConfig] = {
    "mimi": MimiConfig(
        24_000,
        SEANetConfig(
            num_filters=64,
            embed_dim=512,
            strides=(4, 5, 6, 8),
            last_kernel_size=3,
            conv_shortcut=False,
            num_lstm_layers=0,
            pad_mode="zeros",
        ),
        RVQConfig(32, 2048, codebook_dim=256, embed_dim=512, projection="shared"),
    )
}


class SplitQuantizer(nn.Module):
    """A semantic and an acoustic quantizer of the same latents; the decoder gets the sum (section 3.3.3)."""

    config: RVQConfig
    num_semantic: int

    def setup(self) -> None:
        """Makes both."""
        num_acoustic = self.config.num_codebooks - self.num_semantic
        self.semantic = ResidualVectorQuantizer(dataclasses.replace(self.config, num_codebooks=self.num_semantic))
        self.acoustic = ResidualVectorQuantizer(dataclasses.replace(self.config, num_codebooks=num_acoustic))

    def encode(self, latents: jax.Array, num_codebooks: int) -> jax.Array:
        """(B, T, D) -> codes (B, num_codebooks, T), the semantic ones first."""
        codes = [self.semantic.encode(latents, min(num_codebooks, self.num_semantic))]
        if num_codebooks > self.num_semantic:
            codes.append(self.acoustic.encode(latents, num_codebooks - self.num_semantic))
        return jnp.concatenate(codes, axis=1)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes (B, Q, T) -> (B, T, D)."""
        latents = self.semantic.decode(codes[:, : self.num_semantic])
        if codes.shape[1] > self.num_semantic:
            latents += self.acoustic.decode(codes[:, self.num_semantic :])
        return latents

    def __call__(self, latents: jax.Array, num_levels: jax.Array) -> Quantized:
        """As `ResidualVectorQuantizer`; num_levels (B,) counts the levels of both and is at least num_semantic."""
        semantic = self.semantic(latents, jnp.full_like(num_levels, self.num_semantic))
        acoustic = self.acoustic(latents, num_levels - self.num_semantic)
        return Quantized(
            latents=semantic.latents + acoustic.latents,
            codes=jnp.concatenate([semantic.codes, acoustic.codes], axis=1),
            residuals=jnp.concatenate([semantic.residuals, acoustic.residuals], axis=0),
            commitment=semantic.commitment + acoustic.commitment,
            codebook_loss=semantic.codebook_loss + acoustic.codebook_loss,
        )


class StreamTransformer(nn.Module):
    """A causal Transformer with a window, over pieces of a signal."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        """(B, T, D) -> (B, T, D); pieces need parameters from `unstack_layers`."""
        name = "/".join(self.path)
        transformer = Transformer(self.config, name="transformer")
        if stream.whole:
            return transformer(x)[0]
        position, caches = (jnp.int32(0), init_caches(self.config, len(x), 0)) if stream.first else stream.state[name]
        y, caches = transformer(x, cache=caches, position=position)
        if not stream.last:
            stream.kept[name] = (position + x.shape[1], caches)
        return y


class Mimi(Codec):
    """Waveform to codes and back."""

    config: MimiConfig

    def setup(self) -> None:
        """Makes the parts."""
        config, dim = self.config, self.config.seanet.embed_dim
        shape, stride = (2 * config.downsampling, dim, dim), config.downsampling
        self.encoder = SEANetEncoder(config.seanet)
        self.encoder_transformer = StreamTransformer(config.transformer)
        self.downsample = StreamConv(shape, stride, bias=False, pad_mode="edge")
        self.quantizer = SplitQuantizer(config.rvq, config.num_semantic)
        self.upsample = StreamConvTranspose((shape[0], 1, dim), stride, bias=False, depthwise=True)
        self.decoder_transformer = StreamTransformer(config.transformer)
        self.decoder = SEANetDecoder(config.seanet)

    def to_latents(self, waveform: jax.Array, stream: Stream) -> jax.Array:
        """(B, A, channels) -> (B, T, D)."""
        x = self.encoder_transformer(self.encoder(waveform, stream), stream)
        return self.downsample(x, stream)

    def to_waveform(self, latents: jax.Array, stream: Stream) -> jax.Array:
        """(B, T, D) -> (B, A, channels)."""
        x = self.decoder_transformer(self.upsample(latents, stream), stream)
        return self.decoder(x, stream)
