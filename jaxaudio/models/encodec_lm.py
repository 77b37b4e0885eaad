"""EnCodec's language model: how likely each code of the next frame is, for entropy coding.

Défossez et al. 2022, High Fidelity Neural Audio Compression, https://arxiv.org/abs/2210.13438, section 3.3; details as
in the released code: all codebooks of a frame are predicted at once from the frames before, post-norm, exact GELU, a
norm of the summed embeddings, cosines before sines, and in every layer a zero vector before the first frame, which is
attended to until the window has moved past it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxaudio.nn.layers import Norm, constrain
from jaxaudio.nn.transformer import Transformer, init_caches
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.attention import KVCache, update_cache
from jaxaudio.ops.positions import sinusoids

CONTEXT_S = 3.5  # what a frame sees of the past


@dataclasses.dataclass(frozen=True)
class EncodecLMConfig:
    """One language model of a codec's codes.

    Attributes:
      num_codebooks, codebook_size: of the codec; fewer codebooks may be given, the first ones.
      past_frames: frames before its own that a frame sees: int(3.5 * frame_rate).
      num_layers, embed_dim, num_heads, mlp_dim: of the Transformer.
      remat_policy: see `TransformerConfig`.
    """

    num_codebooks: int
    codebook_size: int
    past_frames: int
    num_layers: int = 5
    embed_dim: int = 200
    num_heads: int = 8
    mlp_dim: int = 800
    remat_policy: str | None = None

    @property
    def transformer(self) -> TransformerConfig:
        """The stack."""
        return TransformerConfig(
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            window=self.past_frames + 1,
            zero_key=True,
            norm_position="post",
            norm_epsilon=1e-5,
            activation="gelu",
            attention_bias=True,
            attention_out_bias=True,
            remat_policy=self.remat_policy,
        )


PRESETS = {
    "encodec_24khz": EncodecLMConfig(num_codebooks=32, codebook_size=1024, past_frames=int(CONTEXT_S * 75)),
    "encodec_48khz": EncodecLMConfig(num_codebooks=16, codebook_size=1024, past_frames=int(CONTEXT_S * 150)),
}


class EncodecLM(nn.Module):
    """Logits of every code of a frame from the frames before it."""

    config: EncodecLMConfig

    @nn.compact
    def __call__(
        self,
        inputs: Int[Array, "B Q T"],
        *,
        num_levels: Int[Array, " B"] | None = None,
        offset: Int[Array, " B"] | None = None,
        cache: tuple[KVCache, ...] | None = None,
        position: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B Q T C"], tuple[KVCache, ...] | None]:
        """Logits of the codes of frame t from `inputs` up to t, which are the codes of frames up to t - 1.

        Args:
          inputs: 1 + the code of the frame before, 0 where there is none: the first frame. Q may be less than the
            config's num_codebooks.
          num_levels: codebooks that a row has; the others' inputs are not looked at. All of Q if None.
          offset: position of each row's first frame in the sinusoids, 0 if None; random in training, so that the model
            knows late positions too.
          cache: from `init_cache` or an earlier call; the inputs then continue it, and the parameters must be
            unstacked, see `nn.transformer.unstack_layers`.
          position: with a cache, how many frames came before.
        Returns:
          (logits, updated cache or None).
        Raises:
          ValueError: more codebooks than the config's.
        """
        config = self.config
        num_codebooks, length = inputs.shape[1:]
        if num_codebooks > config.num_codebooks:
            raise ValueError(f"{num_codebooks} codebooks of codes; the language model has {config.num_codebooks}")
        x = self._embedded(inputs, num_levels)
        x = Norm(epsilon=config.transformer.norm_epsilon, name="norm")(x)
        start = jnp.zeros(len(inputs), jnp.int32) if offset is None else offset
        start = start + (0 if position is None else position)
        x = x + sinusoids(start[:, None] + jnp.arange(length)[None], config.embed_dim, order="cos_sin")
        x = constrain(x, "act_batch", "act_length", "act_embed")
        after_zero_key = None if position is None else position + 1
        x, cache = Transformer(config.transformer, name="transformer")(x, cache=cache, position=after_zero_key)
        return self._logits(x, num_codebooks), cache

    def _embedded(self, inputs: jax.Array, num_levels: jax.Array | None) -> jax.Array:
        """The sum of the codebooks' embeddings (B, T, D)."""
        config, num_codebooks = self.config, inputs.shape[1]
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("codebook", None, "embed"))
        shape = (config.num_codebooks, config.codebook_size + 1, config.embed_dim)
        tables = self.param("embedding", init, shape, jnp.float32)[:num_codebooks]
        rows = inputs + (jnp.arange(num_codebooks) * tables.shape[1])[None, :, None]
        x = jnp.take(tables.reshape(-1, config.embed_dim), rows, axis=0)
        if num_levels is not None:
            present = jnp.arange(num_codebooks)[None] < num_levels[:, None]
            x = jnp.where(present[:, :, None, None], x, 0.0)
        return x.sum(axis=1)

    def _logits(self, x: jax.Array, num_codebooks: int) -> jax.Array:
        """(B, T, D) -> (B, Q, T, C), one linear layer for each codebook."""
        config = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0)
        init = nn.with_logical_partitioning(init, ("codebook", "embed", None))
        shape = (config.num_codebooks, config.embed_dim, config.codebook_size)
        kernel = self.param("logits_kernel", init, shape, jnp.float32)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("codebook", None))
        bias = self.param("logits_bias", zeros, (shape[0], shape[2]), jnp.float32)
        logits = jnp.einsum("BTD,QDC->BQTC", x, kernel[:num_codebooks])
        return logits + bias[None, :num_codebooks, None]


def init_cache(config: EncodecLMConfig, params: Any, batch_size: int) -> tuple[KVCache, ...]:
    """The cache before the first frame: in every layer the key and the value of the zero vector, which are biases.

    Args:
      config: the model's.
      params: the model's, with unstacked layers.
      batch_size: rows.
    """
    caches = init_caches(config.transformer, batch_size, config.transformer.window)

    def with_zero_key(layer: Any, cache: KVCache) -> KVCache:
        key, value = (
            jnp.broadcast_to(layer["attention"][role]["bias"][None, None], (batch_size, 1, config.num_heads, head_dim))
            for role in ("key", "value")
        )
        return update_cache(cache, key, value, jnp.int32(0))

    head_dim = config.transformer.query_head_dim
    layers = params["transformer"]["layers"]
    return tuple(with_zero_key(layers[str(index)], cache) for index, cache in enumerate(caches))
