"""Music Transformer: a decoder of symbolic music with relative attention.

Huang et al. 2018, https://arxiv.org/abs/1809.04281; block details as in tensor2tensor, whose hyper-parameters the
paper names: pre-norm, ReLU, no biases in attention, token and output tables not tied, sinusoids kept beside relative
positions.
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxaudio.nn.layers import Dropout, Projection, TokenEmbedding, constrain
from jaxaudio.nn.transformer import Transformer, init_caches
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.attention import KVCache
from jaxaudio.ops.positions import sinusoids

_FAR = 10_000  # more than any pitch interval


@dataclasses.dataclass(frozen=True)
class MusicTransformerConfig:
    """A Music Transformer.

    Attributes:
      vocab_size: ids incl. 0, the start and padding token.
      transformer: the stack; `positions="relative"` is the Relative Transformer.
      position_encoding: sinusoids "added" to the embeddings, or "concatenated" and projected to embed_dim (rows "cps"
        of Table 2).
      label_period: with "concatenated", also concatenates each position modulo this, one-hot: 4 is the voice of a
        chorale in raster order (the "instrument labels" of "cpsi"), 16 the voice and the 16th within its beat; 0 does
        not.
      first_pitch_id: the first id that is a pitch, for `transformer.pitch_time`; ids below are rest and start.
    """

    vocab_size: int
    transformer: TransformerConfig
    position_encoding: Literal["added", "concatenated"] = "added"
    label_period: int = 0
    first_pitch_id: int = 2

    def __post_init__(self):
        if self.label_period and self.position_encoding != "concatenated":
            raise ValueError(f"label_period={self.label_period} needs position_encoding='concatenated'")


class MusicCache(NamedTuple):
    """State of decoding: the layers' keys and values, and the input ids so far (B, S), for pitch intervals."""

    layers: tuple[KVCache, ...]
    tokens: Array


class MusicTransformer(nn.Module):
    """Next-token logits for raster-ordered voices or for performance events."""

    config: MusicTransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        cache: MusicCache | None = None,
        position: Int[Array, ""] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T V"], MusicCache | None]:
        """Logits of the token that follows each input.

        Args:
          tokens: inputs, already shifted: the first is 0, the start.
          cache: from `init_cache` or an earlier call; tokens then continue it at `position`. The parameters must be
            unstacked, see `nn.transformer.unstack_layers`.
          position: index of the first token in the cache.
          deterministic: no dropout; otherwise a "dropout" key is needed.
        Returns:
          (float32 logits, updated cache or None).
        """
        config, transformer = self.config, self.config.transformer
        x = TokenEmbedding(config.vocab_size, transformer.embed_dim, transformer.dtype, name="embedding")(tokens)
        where = jnp.arange(tokens.shape[1]) + (0 if position is None else position)
        x = self._with_positions(x, where)
        x = Dropout(transformer.dropout_rate, transformer.dropout_generator)(x, deterministic=deterministic)
        x = constrain(x, "act_batch", "act_length", "act_embed")
        if cache is not None:
            tokens = lax.dynamic_update_slice_in_dim(cache.tokens, tokens, position, axis=1)
        pitches = None
        if transformer.pitch_time:
            # Tokens without a pitch stand so far apart that no interval from or to them is in the table.
            nowhere = _FAR * jnp.arange(1, tokens.shape[1] + 1)[None]
            pitches = jnp.where(tokens >= config.first_pitch_id, tokens, nowhere)
        x, layers = Transformer(transformer, name="transformer")(
            x,
            pitches=pitches,
            cache=None if cache is None else cache.layers,
            position=position,
            deterministic=deterministic,
        )
        shape = (transformer.embed_dim, config.vocab_size)
        logits = Projection(shape, ("embed", "vocab"), dtype=transformer.dtype, name="logits")(x)
        logits = constrain(logits, "act_batch", "act_length", "act_vocab")
        return logits.astype(jnp.float32), None if cache is None else MusicCache(layers, tokens)

    def _with_positions(self, x, where):
        """Adds or concatenates sinusoids of the positions `where` (T,), and their labels."""
        config, dim = self.config, self.config.transformer.embed_dim
        waves = sinusoids(where, dim)[None].astype(x.dtype)
        if config.position_encoding == "added":
            return x + waves
        parts = [x, jnp.broadcast_to(waves, x.shape)]
        if config.label_period:
            label = nn.one_hot(where % config.label_period, config.label_period, dtype=x.dtype)[None]
            parts.append(jnp.broadcast_to(label, (*x.shape[:2], config.label_period)))
        x = jnp.concatenate(parts, axis=-1)
        return Projection((x.shape[-1], dim), (None, "embed"), dtype=x.dtype, name="concatenated")(x)


def init_cache(config: MusicTransformerConfig, batch_size: int, length: int) -> MusicCache:
    """An empty cache for `length` positions of `batch_size` rows."""
    tokens = jnp.zeros((batch_size, length), jnp.int32)
    return MusicCache(init_caches(config.transformer, batch_size, length), tokens)
