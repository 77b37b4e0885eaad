"""The one Transformer of the house: Whisper, T5, MusicGen, AudioLM, Music Transformer and Qwen2 are its configurations.

Letters, here and in every einsum: B batch, T query, S key, D embed_dim, N num_heads, K num_kv_heads, H head_dim,
F mlp_dim, V vocab_size, L layers, R relative distances.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaudio.nn.layers import Dropout, Norm, Projection, constrain
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops import dropout as dropout_ops
from jaxaudio.ops import positions as position_ops
from jaxaudio.ops import relative_attention as relative_ops
from jaxaudio.ops.attention import (
    KVCache,
    attention,
    cached_attention,
    causal_mask,
    init_cache,
    roll_cache,
    slot_positions,
    update_cache,
    weighted_values,
)
from jaxaudio.ops.local_attention import local_attention

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def _projection(config: TransformerConfig, role: str, name: str | None = None) -> Projection:
    """The projection of one role in attention: "query", "key", "value" or "out"."""
    if role == "out":
        shape, axes = (config.num_heads, config.value_dim, config.embed_dim), ("heads", "head_dim", "embed")
        return Projection(shape, axes, 2, config.attention_out_bias, config.dtype, config.kernel_init, name=name)
    heads, axis = (config.num_heads, "heads") if role == "query" else (config.kv_heads, "kv_heads")
    shape = (config.embed_dim, heads, config.value_dim if role == "value" else config.query_head_dim)
    bias = config.attention_bias and (role != "key" or config.attention_key_bias)
    return Projection(shape, ("embed", axis, "head_dim"), 1, bias, config.dtype, config.kernel_init, name=name)


class Attention(nn.Module):
    """Multi-head attention, to itself or to a memory, with the positions that act on the logits."""

    config: TransformerConfig
    cross: bool = False
    pitch_time: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | KVCache | None = None,
        *,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        pitches: jax.Array | None = None,
        cache: KVCache | None = None,
        position: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends from x (B, T, D) to itself, to `memory` (B, S, D), or to the cache.

        Args:
          x: inputs.
          memory: encoder outputs for cross attention, or their keys and values from `cross_caches`.
          mask: (#B, #N, #T, S), True = attend; combined with the causal mask, but in its place with a cache.
          bias: (#B, #N, T, S) added to the scaled logits.
          pitches: (B, T), or (B, S) with a cache, for `pitch_time`.
          cache: keys and values before `position`; the ones of x are written into the cache that is returned.
          position: index of x's first position, with a cache.
          deterministic: no dropout.
        Returns:
          ((B, T, D), updated cache or None).
        """
        config = self.config
        query = _projection(config, "query", name="query")(x)
        query = constrain(query, "act_batch", "act_length", "act_heads", "act_head_dim")
        if self.cross:
            self.sow("queries", "cross", query)  # for alignment with the memory; costs nothing unless asked for
        if isinstance(memory, KVCache):
            everything = jnp.ones((1, 1, 1, memory.keys.shape[-2]), bool)
            mask = everything if mask is None else mask
            out = cached_attention(query, memory, jnp.int32(0), mask=mask, scale=config.attention_scale)
            return self._joined(out), None
        source = x if memory is None else memory
        if config.zero_key and cache is None:
            source = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
        key = _projection(config, "key", name="key")(source)
        value = _projection(config, "value", name="value")(source)
        key = constrain(key, "act_batch", "act_length", "act_kv_heads", "act_head_dim")
        value = constrain(value, "act_batch", "act_length", "act_kv_heads", "act_head_dim")
        if config.positions == "rotary" and not self.cross:
            where = (jnp.arange(x.shape[1]) + (0 if position is None else position))[None]
            query, key = (position_ops.rotate(y, where, base=config.rotary_base) for y in (query, key))
        if cache is not None:
            out, cache = self._cached(query, key, value, cache, position, mask, bias, pitches)
        else:
            out = self._full(query, key, value, mask, bias, pitches, deterministic)
        return self._joined(out), cache

    def _joined(self, out: jax.Array) -> jax.Array:
        out = constrain(out, "act_batch", "act_length", "act_heads", "act_head_dim")
        return _projection(self.config, "out", name="out")(out)

    def _table(self, name: str, rows: int) -> jax.Array:
        """A table of relative embeddings (N, rows, H); tensor2tensor's initial deviation is H^-1/2."""
        head_dim = self.config.query_head_dim
        init = nn.with_logical_partitioning(nn.initializers.normal(head_dim**-0.5), ("heads", "relative", "head_dim"))
        table = self.param(name, init, (self.config.num_heads, rows, head_dim), jnp.float32)
        return table.astype(self.config.dtype)

    def _pitch_time_logits(self, query, query_pitch, query_step, key_pitch, key_step):
        # All distances within max_distance tokens, four to a step; all intervals of two octaves either way.
        time = self._table("time_embeddings", -(-self.config.max_distance // 4))
        pitch = self._table("pitch_embeddings", 49)
        return relative_ops.pitch_time_logits(query, time, pitch, query_pitch, query_step, key_pitch, key_step)

    def _cached(self, query, key, value, cache, position, mask, bias, pitches):
        """Attention to the positions that the cache holds and to new ones, and the cache with these."""
        config, size, length = self.config, cache.keys.shape[-2], query.shape[1]
        where, window_start = position + jnp.arange(length), None
        if config.window is not None:
            window_start = where - (config.window - 1)
        elif config.attention == "local":
            window_start = (where // config.block_size - 1) * config.block_size
        first_slot, key_positions = position, slot_positions(size, where[-1])
        if window_start is not None and length > 1:  # a piece may wrap around a cache that holds but a window
            seen, cache = roll_cache(cache, key, value, position)
            first_slot, key_positions = jnp.int32(size), position - size + jnp.arange(size + length)
        else:
            seen = cache = update_cache(cache, key, value, position)
        if config.positions == "relative":
            table = self._table("relative_embeddings", config.max_distance)
            bias = relative_ops.cached_relative_logits(query, table, first_slot, len(key_positions))
        if self.pitch_time:
            query_pitch = jax.lax.dynamic_slice_in_dim(pitches, position % size, length, axis=1)
            bias = bias + self._pitch_time_logits(query, query_pitch, where // 4, pitches, key_positions // 4)
        out = cached_attention(
            query,
            seen,
            position,
            bias=bias,
            key_positions=key_positions,
            window_start=window_start,
            mask=mask,
            scale=config.attention_scale,
        )
        return out, cache

    def _full(self, query, key, value, mask, bias, pitches, deterministic):
        config, length = self.config, query.shape[1]
        use_dropout = config.attention_dropout_rate > 0 and not deterministic
        drop = {
            "dropout_rate": config.attention_dropout_rate,
            "dropout_key": self.make_rng("dropout") if use_dropout else None,
            "dropout_generator": config.dropout_generator,
        }
        if config.positions == "relative" and not self.cross:
            return self._relative(query, key, value, pitches, drop)
        is_local = config.attention == "local" and not self.cross
        if is_local and mask is None and bias is None:
            return local_attention(
                query, key, value, block_size=config.block_size, scale=config.attention_scale, **drop
            )
        if config.attention != "full" and not self.cross:
            causal = causal_mask(length, key.shape[1], window=config.window)
            if is_local:
                block = jnp.arange(length) // config.block_size
                causal &= block[:, None] - block[None, :] <= 1
            mask = causal[None, None] if mask is None else mask & causal[None, None]
        return attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            scale=config.attention_scale,
            implementation=config.attention_implementation,
            **drop,
        )

    def _relative(self, query, key, value, pitches, drop):
        config = self.config
        table = self._table("relative_embeddings", config.max_distance)
        form = "local" if config.attention == "local" else config.relative_form
        if self.pitch_time and form == "blockwise":
            form = "skew"  # pitch intervals need the logits stored
        if form in ("gather", "skew"):
            bias = None
            if self.pitch_time:
                step = jnp.arange(query.shape[1]) // 4
                bias = self._pitch_time_logits(query, pitches, step, pitches, step)
            weights = relative_ops.relative_attention_weights(query, key, table, form=form, bias=bias)
            self.sow("attention_weights", "self", weights)  # for pictures; costs nothing unless asked for
            if drop["dropout_key"] is not None:
                weights = dropout_ops.dropout(
                    drop["dropout_key"], weights, drop["dropout_rate"], drop["dropout_generator"]
                )
            return weighted_values(weights, value)
        return relative_ops.relative_attention(
            query, key, value, table, form=form, block_size=config.block_size, **drop
        )


def _norm(config: TransformerConfig, name: str) -> Norm:
    return Norm(config.norm, config.norm_epsilon, config.norm_bias, config.dtype, name=name)


class MLP(nn.Module):
    """Position-wise feed-forward network, plain or gated."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        config = self.config

        def up(name: str) -> Projection:
            shape = (config.embed_dim, config.mlp_dim)
            return Projection(shape, ("embed", "mlp"), 1, config.mlp_bias, config.dtype, config.kernel_init, name=name)

        hidden = ACTIVATIONS[config.activation](up("gate" if config.gated_mlp else "up")(x))
        if config.gated_mlp:
            hidden = hidden * up("up")(x)
        hidden = constrain(hidden, "act_batch", "act_length", "act_mlp")
        hidden = Dropout(config.mlp_dropout_rate, config.dropout_generator)(hidden, deterministic=deterministic)
        shape = (config.mlp_dim, config.embed_dim)
        return Projection(shape, ("mlp", "embed"), 1, config.mlp_bias, config.dtype, config.kernel_init, name="down")(
            hidden
        )


class Block(nn.Module):
    """Self-attention, optional cross-attention and MLP, each with a norm and a residual sum."""

    config: TransformerConfig
    deterministic: bool = True
    pitch_time: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        survival: jax.Array,
        memory: jax.Array | KVCache | None = None,
        mask: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        pitches: jax.Array | None = None,
        cache: KVCache | None = None,
        position: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """(B, T, D) -> ((B, T, D), cache); survival is the probability () that a residual branch stays, for stochastic
        depth; the other arguments as in `Attention` and `Transformer`.
        """
        config = self.config
        x = constrain(x, "act_batch", "act_length", "act_embed")

        def residual(x: jax.Array, name: str, layer: Callable) -> jax.Array:
            norm = _norm(config, f"{name}_norm")
            y = layer(norm(x) if config.norm_position == "pre" else x)
            if config.layer_scale is not None:
                init = nn.with_logical_partitioning(nn.initializers.constant(config.layer_scale), ("embed",))
                y = y * self.param(f"{name}_scale", init, (config.embed_dim,), jnp.float32).astype(y.dtype)[None, None]
            y = Dropout(config.dropout_rate, config.dropout_generator)(y, deterministic=self.deterministic)
            if config.stochastic_depth_rate and not self.deterministic:
                stays = jax.random.bernoulli(self.make_rng("dropout"), survival, (len(y), 1, 1))
                y = jnp.where(stays, y / survival.astype(y.dtype), 0)
            return x + y if config.norm_position == "pre" else norm(x + y)

        def self_attention(y: jax.Array) -> jax.Array:
            nonlocal cache
            y, cache = Attention(config, pitch_time=self.pitch_time, name="attention")(
                y,
                mask=mask,
                bias=bias,
                pitches=pitches,
                cache=cache,
                position=position,
                deterministic=self.deterministic,
            )
            return y

        def cross_attention(y: jax.Array) -> jax.Array:
            layer = Attention(config, cross=True, name="cross_attention")
            return layer(y, memory, mask=memory_mask, deterministic=self.deterministic)[0]

        x = residual(x, "attention", self_attention)
        if config.cross_attention:
            x = residual(x, "cross_attention", cross_attention)
        x = residual(x, "mlp", lambda y: MLP(config, name="mlp")(y, deterministic=self.deterministic))
        return x, cache


class Transformer(nn.Module):
    """A stack of blocks, scanned over stacked parameters, and the final norm of pre-norm stacks.

    Parameters that `unstack_layers` took apart run layer by layer instead. With a cache (decoding) they must be such,
    because slicing a stacked array at every token copies it. A `pitch_time` first layer has parameters of its own.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        memory: jax.Array | tuple[KVCache, ...] | None = None,
        mask: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        pitches: jax.Array | None = None,
        cache: tuple[KVCache, ...] | None = None,
        position: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, tuple[KVCache, ...] | None]:
        """Runs all blocks.

        Args:
          x: (B, T, D) embedded inputs.
          memory: (B, S, D) encoder outputs, for `cross_attention`; with a cache, their `cross_caches`.
          mask: (#B, #N, #T, T) self-attention mask, True = attend, on top of the causal one; with a cache
            (#B, #N, #T, cache length), in its place.
          memory_mask: (#B, #N, #T, S) cross-attention mask.
          pitches: (B, T), or (B, cache length) with a cache, for `pitch_time`.
          cache: one KVCache per layer, see `init_caches`; x then continues it at `position`.
          position: index of x's first position in the cache.
          deterministic: no dropout.
        Returns:
          ((B, T, D), updated caches or None).
        Raises:
          ValueError: `memory` and the config's cross_attention or the cache do not go together; a mask for relative
            positions; or a cache of another number of layers, or with what decoding does not have: dropout, full
            attention, or stacked parameters.
        """
        config = self.config
        self._check(memory, mask, cache, deterministic)
        bias = self._t5_bias(x.shape[1], cache, position) if config.positions == "t5" else None
        num_first = int(config.pitch_time)
        new_caches = []
        if config.pitch_time:
            block = Block if cache is not None else self._block(in_scan=False)
            first = block(config, deterministic, pitch_time=True, name="first_layer")
            first_cache = None if cache is None else cache[0]
            x, new_cache = first(x, jnp.float32(1), memory, mask, memory_mask, bias, pitches, first_cache, position)
            new_caches.append(new_cache)
        if cache is None and "0" not in self.variables.get("params", {}).get("layers", {}):
            survival = 1 - config.stochastic_depth_rate * jnp.arange(1, config.num_layers + 1) / config.num_layers
            layers = self._scanned(config.num_layers - num_first, deterministic)
            x, _ = layers(x, survival[num_first:], memory, mask, memory_mask, bias)
        else:
            memories = memory if isinstance(memory, tuple) else [memory] * config.num_layers
            caches = [None] * config.num_layers if cache is None else cache
            for index, layer_cache in enumerate(caches[num_first:]):
                inputs = (x, jnp.float32(1), memories[index], mask, memory_mask, bias, None, layer_cache, position)
                x, new_cache = self._unstacked_layer(index, inputs)
                new_caches.append(new_cache)
        if config.norm_position == "pre" and config.final_norm:
            x = _norm(config, "norm")(x)
        return x, None if cache is None else tuple(new_caches)

    def _check(self, memory, mask, cache, deterministic):
        config = self.config
        if mask is not None and config.positions == "relative":
            raise ValueError("relative attention is causal and takes no mask; pad on the right instead")
        if config.cross_attention != (memory is not None):
            shape = memory.shape if isinstance(memory, jax.Array) else memory
            raise ValueError(f"cross_attention={config.cross_attention} does not go with memory of shape {shape}")
        if cache is None and isinstance(memory, tuple):
            raise ValueError("without a cache the memory is one array, got a tuple of keys and values")
        if cache is not None and isinstance(memory, jax.Array):
            raise ValueError(f"decoding takes the cross_caches of the memory, got an array of shape {memory.shape}")
        for name, caches in (("caches", cache), ("cross_caches", memory)):
            if isinstance(caches, tuple) and len(caches) != config.num_layers:
                raise ValueError(f"a stack of {config.num_layers} layers needs as many {name}, got {len(caches)}")
        if cache is not None and (not deterministic or config.attention == "full"):
            raise ValueError(
                f"decoding with a cache is causal and without dropout, got attention={config.attention!r}, "
                f"{deterministic=}"
            )
        if config.zero_key and mask is not None:
            raise ValueError(f"zero_key attention is causal and takes no mask, got one of shape {mask.shape}")
        if cache is not None and mask is not None and (config.window is not None or config.attention == "local"):
            raise ValueError(
                f"a cache of a window alone (window={config.window}, attention={config.attention!r}) takes no mask"
            )

    def _unstacked_layer(self, index, inputs):
        layers = self.variables["params"]["layers"]
        if str(index) not in layers:
            raise ValueError(f"decoding needs unstacked layers, see unstack_layers; found {sorted(layers)}")
        block, params = Block(self.config, parent=None), {"params": layers[str(index)]}
        if not self.is_mutable_collection("queries"):
            return block.apply(params, *inputs)
        out, sown = block.apply(params, *inputs, mutable=["queries"])
        self.put_variable("queries", str(index), sown["queries"]["cross_attention"]["cross"][0])
        return out

    def _block(self, *, in_scan: bool) -> type[nn.Module]:
        """Block, rematerialised as the config says; a scan's body needs no guard against common subexpressions."""
        if self.config.remat_policy is None:
            return Block
        policy = getattr(jax.checkpoint_policies, self.config.remat_policy)
        return nn.remat(Block, prevent_cse=not in_scan, policy=policy)

    def _scanned(self, length: int, deterministic: bool) -> nn.Module:
        scanned = nn.scan(
            self._block(in_scan=True),
            variable_axes={"params": 0, "attention_weights": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=length,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self.config, deterministic, name="layers")

    def _t5_bias(self, length, cache, position):
        """(1, N, T, S) logit bias of T5's one table."""
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(config.embed_dim**-0.5), ("relative", "heads"))
        table = self.param("relative_bias", init, (config.num_buckets, config.num_heads), jnp.float32)
        query = jnp.arange(length) + (0 if position is None else position)
        key = query if cache is None else slot_positions(cache[0].keys.shape[-2], query[-1])
        buckets = position_ops.t5_buckets(
            key[None, :] - query[:, None],
            num_buckets=config.num_buckets,
            max_distance=config.max_distance,
            bidirectional=config.attention == "full",
        )
        return table[buckets].transpose(2, 0, 1)[None]


def init_caches(config: TransformerConfig, batch_size: int, length: int) -> tuple[KVCache, ...]:
    """One empty KVCache per layer for the last `length` positions; for `config.window` of them, or two blocks of local
    attention, where no position sees farther.
    """
    length = config.window or length
    if config.attention == "local":
        length = min(length, 2 * config.block_size)
    dtype = jnp.dtype(config.dtype)
    return tuple(
        init_cache(batch_size, length, config.kv_heads, config.query_head_dim, config.value_dim, dtype)
        for _ in range(config.num_layers)
    )


def cross_caches(config: TransformerConfig, params: Any, memory: jax.Array) -> tuple[KVCache, ...]:
    """Keys and values of an encoder's output (B, S, D), for each layer's cross-attention; `params` are a Transformer's,
    with unstacked layers.
    """

    def filled(layer: Any) -> KVCache:
        key, value = (
            _projection(config, role).apply({"params": layer["cross_attention"][role]}, memory)
            for role in ("key", "value")
        )
        cache = init_cache(*memory.shape[:2], config.kv_heads, config.query_head_dim, config.value_dim, key.dtype)
        return update_cache(cache, key, value, jnp.int32(0))

    return tuple(filled(params["layers"][str(index)]) for index in range(config.num_layers))


def unstack_layers(params: Any) -> Any:
    """Takes every stacked subtree named "layers" apart into {"0": ..., "1": ...}; an unstacked one stays as it is.

    Decoding reads a layer's weights at every token; as separate arrays they are read in place.
    """
    if not isinstance(params, dict):
        return params
    out = {}
    for name, value in params.items():
        if name != "layers" or "0" in value:
            out[name] = unstack_layers(value)
            continue
        length = jax.tree.leaves(value)[0].shape[0]
        out[name] = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], value) for i in range(length)}
    return out
