"""Whisper: an encoder of log-mel spectrograms and a decoder of text with timestamps.

Radford et al. 2022, Robust Speech Recognition via Large-Scale Weak Supervision, https://arxiv.org/abs/2212.04356,
section 2.2; details as in the released code: pre-norm, exact GELU, no bias on keys, the token table tied to the logits.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxaudio.nn.layers import Conv, constrain
from jaxaudio.nn.transformer import ACTIVATIONS, Transformer, init_caches
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.attention import KVCache
from jaxaudio.ops.positions import sinusoids

SAMPLE_RATE = 16_000
N_FFT = 400
HOP_LENGTH = 160
FRAME_RATE = SAMPLE_RATE // HOP_LENGTH  # mel frames a second
TOKENS_PER_SECOND = FRAME_RATE // 2  # encoder positions a second; a timestamp's step is their inverse, 20 ms


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """One Whisper.

    Attributes:
      vocab_size: 51864 of the English models, 51865 of the multilingual ones, 51866 since large-v3.
      num_mels: 80, or 128 since large-v3.
      num_frames: mel frames of the window: 3000 are 30 s. The encoder has half as many positions.
      text_length: positions of the decoder.
      embed_dim, num_heads, num_encoder_layers, num_decoder_layers: sizes; the MLP is four times as wide.
      alignment_heads: (layer, head) of the decoder whose cross-attention follows the audio, for word timestamps; None:
        all heads of the last half of the layers.
      dropout_rate, stochastic_depth_rate: of training; see `TransformerConfig`.
      remat_policy, dtype: see `TransformerConfig`.

    Raises:
      ValueError: an odd number of frames, or an alignment head that does not exist; with the value.
    """

    vocab_size: int
    num_mels: int
    embed_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_frames: int = 3000
    text_length: int = 448
    alignment_heads: tuple[tuple[int, int], ...] | None = None
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    remat_policy: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.num_frames < 2 or self.num_frames % 2:
            raise ValueError(f"num_frames must be even and positive, got {self.num_frames}")
        for name in ("vocab_size", "num_mels", "text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for layer, head in self.alignment_heads or ():
            if not (0 <= layer < self.num_decoder_layers and 0 <= head < self.num_heads):
                raise ValueError(
                    f"alignment head {(layer, head)} is not one of {self.num_decoder_layers} layers x {self.num_heads}"
                )

    @property
    def num_positions(self) -> int:
        """Positions of the encoder, 20 ms each."""
        return self.num_frames // 2

    @property
    def encoder(self) -> TransformerConfig:
        """The encoder's stack."""
        return self._stack(self.num_encoder_layers, attention="full")

    @property
    def decoder(self) -> TransformerConfig:
        """The decoder's stack."""
        return self._stack(self.num_decoder_layers, attention="causal", cross_attention=True)

    def _stack(self, num_layers: int, **kind) -> TransformerConfig:
        return TransformerConfig(
            num_layers=num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            mlp_dim=4 * self.embed_dim,
            norm_epsilon=1e-5,
            activation="gelu",
            attention_bias=True,
            attention_key_bias=False,
            attention_out_bias=True,
            dropout_rate=self.dropout_rate,
            stochastic_depth_rate=self.stochastic_depth_rate,
            kernel_init="fan_in_normal",
            remat_policy=self.remat_policy,
            dtype=self.dtype,
            **kind,
        )


class Encoder(nn.Module):
    """Two convolutions, the second of stride 2, sinusoids and a Transformer."""

    config: WhisperConfig

    @nn.compact
    def __call__(self, mel: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """(B, T, M) -> (B, T / 2, D)."""
        config, dim = self.config, self.config.embed_dim
        if mel.ndim != 3 or mel.shape[1:] != (config.num_frames, config.num_mels):
            raise ValueError(
                f"mel must have shape (batch, {config.num_frames} frames, {config.num_mels} mels), got {mel.shape}; "
                "pad or cut the audio to the model's window"
            )
        gelu = ACTIVATIONS["gelu"]
        options = {"padding": 1, "dtype": config.dtype, "init": "fan_in_normal"}
        x = gelu(Conv((3, config.num_mels, dim), name="conv1", **options)(mel))
        x = gelu(Conv((3, dim, dim), stride=2, name="conv2", **options)(x))
        # A parameter, since checkpoints store the table, but one that training leaves alone.
        init = nn.with_logical_partitioning(
            lambda _, shape, dtype: sinusoids(jnp.arange(shape[0]), shape[1]).astype(dtype), ("position", "embed")
        )
        table = self.param("position_embedding", init, (config.num_positions, dim), jnp.float32)
        x = x + jax.lax.stop_gradient(table).astype(x.dtype)[None]
        x = constrain(x, "act_batch", "act_length", "act_embed")
        return Transformer(config.encoder, name="transformer")(x, deterministic=deterministic)[0]


class Decoder(nn.Module):
    """A Transformer over tokens that attends to the encoder's output."""

    config: WhisperConfig

    def setup(self):
        """Declares the parameters."""
        config = self.config
        # The vocabularies are odd numbers, which no mesh axis divides.
        tokens = nn.with_logical_partitioning(nn.initializers.normal(config.embed_dim**-0.5), (None, "embed"))
        positions = nn.with_logical_partitioning(nn.initializers.normal(0.01), ("position", "embed"))
        self.token_embedding = self.param("token_embedding", tokens, (config.vocab_size, config.embed_dim), jnp.float32)
        self.position_embedding = self.param(
            "position_embedding", positions, (config.text_length, config.embed_dim), jnp.float32
        )
        self.transformer = Transformer(config.decoder)

    def __call__(
        self,
        tokens: jax.Array,
        memory: jax.Array | tuple[KVCache, ...],
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: tuple[KVCache, ...] | None = None,
        slot: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, tuple[KVCache, ...] | None]:
        """Last hidden states of the tokens.

        Args:
          tokens: (B, L) inputs, already shifted.
          memory: (B, S, D) from the encoder; with a cache, their `nn.transformer.cross_caches`.
          positions: (B, L) place of each token in its text; 0, 1, ... if None.
          mask: with a cache, (B, 1, L, cache length), True = attend; causal if None.
          cache: keys and values so far; the parameters must be unstacked then.
          slot: where in the cache the first token goes.
          deterministic: no dropout, no stochastic depth.
        Returns:
          ((B, L, D), updated cache or None).
        """
        config = self.config
        if positions is None and tokens.shape[1] > config.text_length:
            raise ValueError(f"the decoder has {config.text_length} positions, got {tokens.shape[1]} tokens")
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        x = jnp.take(self.token_embedding, tokens, axis=0)
        if self.has_variable("params", "token_embedding_scale"):  # int8, see ops.quantization
            x = x * jnp.take(self.get_variable("params", "token_embedding_scale"), tokens, axis=0)[..., None]
        x = x + jnp.take(self.position_embedding, positions, axis=0)
        x = constrain(x.astype(config.dtype), "act_batch", "act_length", "act_embed")
        return self.transformer(x, memory=memory, mask=mask, cache=cache, position=slot, deterministic=deterministic)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(B, L, D) -> (B, L, V) in float32: products with the token table."""
        table = self.token_embedding.astype(hidden.dtype)
        logits = jnp.einsum("BLD,VD->BLV", hidden, table, preferred_element_type=jnp.float32)
        if self.has_variable("params", "token_embedding_scale"):
            logits = logits * self.get_variable("params", "token_embedding_scale")[None, None]
        return constrain(logits, "act_batch", "act_length", "act_vocab")


class Whisper(nn.Module):
    """Log-mel windows and text so far in, next-token logits out."""

    config: WhisperConfig

    def setup(self):
        """Declares the two halves."""
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(
        self, mel: Float[Array, "B T M"], tokens: Int[Array, "B L"], *, deterministic: bool = True
    ) -> Float[Array, "B L V"]:
        """Logits of the token that follows each input.

        Args:
          mel: normalised log-mel of the window, see `ops.mel.whisper_log_mel`.
          tokens: inputs, already shifted.
          deterministic: no dropout, no stochastic depth; otherwise a "dropout" key is needed.
        Raises:
          ValueError: a window of another shape than the config's, or more tokens than the decoder has positions.
        """
        memory = self.encode(mel, deterministic=deterministic)
        hidden, _ = self.decoder(tokens, memory, deterministic=deterministic)
        return self.decoder.logits(hidden)

    def encode(self, mel: Float[Array, "B T M"], *, deterministic: bool = True) -> Float[Array, "B S D"]:
        """The encoder's output, one position for every 20 ms."""
        return self.encoder(mel, deterministic=deterministic)

    def decode(self, tokens: Int[Array, "B L"], memory: tuple[KVCache, ...], **options):
        """`Decoder` with a cache: ((B, L, D) hidden states, cache)."""
        return self.decoder(tokens, memory, **options)

    def logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Logits of the decoder's hidden states."""
        return self.decoder.logits(hidden)


def init_cache(config: WhisperConfig, batch_size: int, length: int) -> tuple[KVCache, ...]:
    """An empty cache of the decoder's self-attention for `length` slots."""
    return init_caches(config.decoder, batch_size, length)


def _size(num_layers, embed_dim, *, decoder_layers=None, vocab_size=51865, num_mels=80, heads) -> WhisperConfig:
    return WhisperConfig(
        vocab_size=vocab_size,
        num_mels=num_mels,
        embed_dim=embed_dim,
        num_heads=embed_dim // 64,
        num_encoder_layers=num_layers,
        num_decoder_layers=decoder_layers or num_layers,
        alignment_heads=heads,
    )


# Every public size: table 1 of the paper and the model card; alignment heads are those that OpenAI publishes with the
# weights.
# fmt: off
SIZES = {
    "tiny": _size(4, 384, heads=((2, 2), (3, 0), (3, 2), (3, 3), (3, 4), (3, 5))),
    "tiny.en": _size(4, 384, vocab_size=51864,
                     heads=((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4))),
    "base": _size(6, 512, heads=((3, 1), (4, 2), (4, 3), (4, 7), (5, 1), (5, 2), (5, 4), (5, 6))),
    "base.en": _size(6, 512, vocab_size=51864, heads=((3, 3), (4, 7), (5, 1), (5, 5), (5, 7))),
    "small": _size(12, 768, heads=((5, 3), (5, 9), (8, 0), (8, 4), (8, 7), (8, 8), (9, 0), (9, 7), (9, 9), (10, 5))),
    "small.en": _size(12, 768, vocab_size=51864,
                      heads=((6, 6), (7, 0), (7, 3), (7, 8), (8, 2), (8, 5), (8, 7), (9, 0), (9, 4), (9, 8), (9, 10),
                             (10, 0), (10, 1), (10, 2), (10, 3), (10, 6), (10, 11), (11, 2), (11, 4))),
    "medium": _size(24, 1024, heads=((13, 15), (15, 4), (15, 15), (16, 1), (20, 0), (23, 4))),
    "medium.en": _size(24, 1024, vocab_size=51864,
                       heads=((11, 4), (14, 1), (14, 12), (14, 14), (15, 4), (16, 0), (16, 4), (16, 9), (17, 12),
                              (17, 14), (18, 7), (18, 10), (18, 15), (20, 0), (20, 3), (20, 9), (20, 14), (21, 12))),
    "large-v1": _size(32, 1280, heads=((9, 19), (11, 2), (11, 4), (11, 17), (22, 7), (22, 11), (22, 17), (23, 2),
                                       (23, 15))),
    "large-v2": _size(32, 1280, heads=((10, 12), (13, 17), (16, 11), (16, 12), (16, 13), (17, 15), (17, 16), (18, 4),
                                       (18, 11), (18, 19), (19, 11), (21, 2), (21, 3), (22, 3), (22, 9), (22, 12),
                                       (23, 5), (23, 7), (23, 13), (25, 5), (26, 1), (26, 12), (27, 15))),
    "large-v3": _size(32, 1280, vocab_size=51866, num_mels=128,
                      heads=((7, 0), (10, 17), (12, 18), (13, 12), (16, 1), (17, 14), (19, 11), (21, 4), (24, 1),
                             (25, 6))),
    "turbo": _size(32, 1280, decoder_layers=4, vocab_size=51866, num_mels=128,
                   heads=((2, 4), (2, 11), (3, 3), (3, 6), (3, 11), (3, 14))),
}
# fmt: on
SIZES["large"] = SIZES["large-v3"]
SIZES["large-v3-turbo"] = SIZES["turbo"]
