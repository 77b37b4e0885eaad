"""Music Transformer: a decoder of symbolic music with relative attention, alone or with an encoder of a melody.

Huang et al. 2018, https://arxiv.org/abs/1809.04281; block details as in tensor2tensor, whose hyper-parameters the
paper names: pre-norm, ReLU, no biases in attention, token and output tables not tied, sinusoids kept beside relative
positions.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxaudio.nn.layers import Dropout, Projection, TokenEmbedding, constrain
from jaxaudio.nn.transformer import Transformer, cross_caches, init_caches, unstack_layers
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


@dataclasses.dataclass(frozen=True)
class AccompanimentConfig:
    """A Music Transformer that accompanies a melody (section 4.2.2).

    Attributes:
      melody_vocab_size: ids of the melody incl. 0, the padding.
      encoder: the stack over the melody: full attention, without positions of its own, since sinusoids are added.
      decoder: of the performance, melody and accompaniment; its stack has cross_attention.

    Raises:
      ValueError: stacks that do not go together; with the values.
    """

    melody_vocab_size: int
    encoder: TransformerConfig
    decoder: MusicTransformerConfig

    def __post_init__(self):
        encoder, decoder = self.encoder, self.decoder.transformer
        if (encoder.attention, encoder.positions, encoder.cross_attention) != ("full", "none", False):
            raise ValueError(
                "the encoder of a melody has attention='full', positions='none' and no cross_attention, got "
                f"{encoder.attention!r}, {encoder.positions!r}, {encoder.cross_attention}"
            )
        if not decoder.cross_attention or decoder.pitch_time:
            raise ValueError(
                "the decoder of an accompaniment has cross_attention and no pitch_time, got "
                f"cross_attention={decoder.cross_attention}, pitch_time={decoder.pitch_time}"
            )
        if encoder.embed_dim != decoder.embed_dim:
            raise ValueError(f"the encoder's embed_dim {encoder.embed_dim} is not the decoder's {decoder.embed_dim}")


class Memory(NamedTuple):
    """An encoded melody: states (B, S, D), or in a cache its keys and values for each layer; and (B, S) which of its
    positions are not padding.
    """

    states: Array | tuple[KVCache, ...]
    mask: Array


class MusicCache(NamedTuple):
    """State of decoding: the layers' keys and values, the last input ids (B, S), for pitch intervals, and a melody."""

    layers: tuple[KVCache, ...]
    tokens: Array
    memory: Memory | None = None


class MusicTransformer(nn.Module):
    """Next-token logits for raster-ordered voices or for performance events."""

    config: MusicTransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        memory: Memory | None = None,
        cache: MusicCache | None = None,
        position: Int[Array, ""] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T V"], MusicCache | None]:
        """Logits of the token that follows each input.

        Args:
          tokens: inputs, already shifted: the first is 0, the start.
          memory: the melody, for a stack with cross_attention; with a cache it is in the cache.
          cache: from `init_cache` or an earlier call; tokens then continue it at `position`. The parameters must be
            unstacked, see `nn.transformer.unstack_layers`.
          position: index of the first token; a single one may come after any number, and sees what the cache holds.
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
            memory = cache.memory if memory is None else memory
            slot = position % cache.tokens.shape[1]
            tokens = lax.dynamic_update_slice_in_dim(cache.tokens, tokens, slot, axis=1)
        pitches = None
        if transformer.pitch_time:
            # Tokens without a pitch stand so far apart that no interval from or to them is in the table.
            nowhere = _FAR * jnp.arange(1, tokens.shape[1] + 1)[None]
            pitches = jnp.where(tokens >= config.first_pitch_id, tokens, nowhere)
        x, layers = Transformer(transformer, name="transformer")(
            x,
            memory=None if memory is None else memory.states,
            memory_mask=None if memory is None else memory.mask[:, None, None],
            pitches=pitches,
            cache=None if cache is None else cache.layers,
            position=position,
            deterministic=deterministic,
        )
        shape = (transformer.embed_dim, config.vocab_size)
        logits = Projection(shape, ("embed", "vocab"), dtype=transformer.dtype, name="logits")(x)
        logits = constrain(logits, "act_batch", "act_length", "act_vocab")
        return logits.astype(jnp.float32), None if cache is None else MusicCache(layers, tokens, memory)

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
    """An empty cache for the last `length` positions of `batch_size` rows."""
    tokens = jnp.zeros((batch_size, length), jnp.int32)
    return MusicCache(init_caches(config.transformer, batch_size, length), tokens)


class AccompanimentTransformer(nn.Module):
    """Next-token logits of a performance for its melody: an encoder of melody tokens, and a `MusicTransformer`."""

    config: AccompanimentConfig

    def setup(self):
        """Declares the two halves."""
        config, stack = self.config, self.config.encoder
        self.embedding = TokenEmbedding(config.melody_vocab_size, stack.embed_dim, stack.dtype)
        self.dropout = Dropout(stack.dropout_rate, stack.dropout_generator)
        self.encoder = Transformer(stack)
        self.decoder = MusicTransformer(config.decoder)

    def __call__(
        self, melody: Int[Array, "B S"], tokens: Int[Array, "B T"], *, deterministic: bool = True
    ) -> Float[Array, "B T V"]:
        """Logits of the token that follows each input.

        Args:
          melody: ids of `data.melody`; 0 is padding, which changes nothing. A row of nothing else has no meaning.
          tokens: inputs, already shifted: the first is 0, the start.
          deterministic: no dropout; otherwise a "dropout" key is needed.
        """
        memory = self.encode(melody, deterministic=deterministic)
        return self.decoder(tokens, memory=memory, deterministic=deterministic)[0]

    def encode(self, melody: Int[Array, "B S"], *, deterministic: bool = True) -> Memory:
        """The melody as the decoder attends to it."""
        x = self.embedding(melody)
        x = x + sinusoids(jnp.arange(melody.shape[1]), x.shape[-1])[None].astype(x.dtype)
        x = constrain(self.dropout(x, deterministic=deterministic), "act_batch", "act_length", "act_embed")
        mask = melody > 0
        return Memory(self.encoder(x, mask=mask[:, None, None], deterministic=deterministic)[0], mask)


def init_accompaniment_cache(config: AccompanimentConfig, params: Any, melody: Array, length: int) -> MusicCache:
    """A cache for `length` positions of the accompaniment of each melody (B, S), with which the decoder alone goes on::

        decoder = MusicTransformer(config.decoder)
        decoder.apply({"params": unstack_layers(params["decoder"])}, tokens, cache=cache, position=position)

    `params` are an AccompanimentTransformer's; each layer's keys and values of the melody are made here, once.
    """
    memory = AccompanimentTransformer(config).apply({"params": params}, melody, method="encode")
    stack = unstack_layers(params["decoder"]["transformer"])
    states = cross_caches(config.decoder.transformer, stack, memory.states)
    return init_cache(config.decoder, len(melody), length)._replace(memory=memory._replace(states=states))
