"""Decoding beyond the cache's length: each token equals a full forward pass that hides what has left the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxaudio.models.music_transformer import MusicTransformer, MusicTransformerConfig, init_cache
from jaxaudio.nn.transformer import Transformer, init_caches, unstack_layers
from jaxaudio.nn.transformer_config import TransformerConfig

LENGTH, CONTEXT, VOCAB = 20, 7, 13
BASE = TransformerConfig(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, head_dim=12)
RELATIVE = dataclasses.replace(BASE, positions="relative", max_distance=9)
STACKS = {
    "baseline": BASE,
    "relative": RELATIVE,
    "short_table": dataclasses.replace(RELATIVE, max_distance=4),
    "relative_local": dataclasses.replace(RELATIVE, attention="local", block_size=3),
}


def visible(config):
    """What each of LENGTH positions sees, by the rules in words."""
    seen = np.zeros((LENGTH, LENGTH), bool)
    for i in range(LENGTH):
        for j in range(i + 1):
            if config.attention == "local":
                seen[i, j] = i // config.block_size - j // config.block_size <= 1
            else:
                seen[i, j] = i - j < CONTEXT
    return seen


def layer_norm(x, params):
    params = params["layer"]
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def slow_forward(config, params, tokens, seen):
    """Logits (T, V) of one row in float64, pair by pair."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    dim, head_dim = config.embed_dim, config.query_head_dim
    x = params["embedding"]["embedding"][tokens] * np.sqrt(dim) * (tokens > 0)[:, None]
    angles = np.arange(LENGTH)[:, None] / 1e4 ** (np.arange(dim // 2) / (dim // 2 - 1))
    x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["transformer"]["layers"])
        attention, y = layer["attention"], layer_norm(x, layer["attention_norm"])
        query, key, value = (np.einsum("td,dnh->tnh", y, attention[n]["kernel"]) for n in ("query", "key", "value"))
        out = np.zeros_like(value)
        for i in range(LENGTH):
            for head in range(config.num_heads):
                weights = {}
                for j in np.flatnonzero(seen[i]):
                    vector = key[j, head]
                    if config.positions == "relative" and i - j < config.max_distance:
                        vector = vector + attention["relative_embeddings"][head, config.max_distance - 1 - (i - j)]
                    weights[j] = np.exp(query[i, head] @ vector / np.sqrt(head_dim))
                out[i, head] = sum(weight * value[j, head] for j, weight in weights.items()) / sum(weights.values())
        x = x + np.einsum("tnh,nhd->td", out, attention["out"]["kernel"])
        y = layer_norm(x, layer["mlp_norm"])
        y = np.maximum(y @ layer["mlp"]["up"]["kernel"] + layer["mlp"]["up"]["bias"], 0)
        x = x + y @ layer["mlp"]["down"]["kernel"] + layer["mlp"]["down"]["bias"]
    x = layer_norm(x, params["transformer"]["norm"])
    return x @ params["logits"]["kernel"]


def random_params(model):
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), nn.meta.unbox(abstract)
    )


@pytest.mark.parametrize("name", STACKS)
def test_a_full_cache_rolls_on(name):
    config = STACKS[name]
    model = MusicTransformer(MusicTransformerConfig(VOCAB, config))
    params = random_params(model)
    tokens = np.random.default_rng(1).integers(1, VOCAB, LENGTH)
    expected = slow_forward(config, params, tokens, visible(config))
    cache = init_cache(model.config, 1, LENGTH if config.attention == "local" else CONTEXT)
    slots = 2 * config.block_size if config.attention == "local" else CONTEXT
    assert {layer.keys.shape[-2] for layer in cache.layers} == {slots}
    step, variables = jax.jit(model.apply), {"params": unstack_layers(params)}
    for t in range(LENGTH):
        inputs = jnp.asarray(tokens[None, t : t + 1], jnp.int32)
        logits, cache = step(variables, inputs, cache=cache, position=jnp.int32(t))
        np.testing.assert_allclose(logits[0, 0], expected[t], atol=1e-4)
    everything = slow_forward(config, params, tokens, np.tri(LENGTH, dtype=bool))
    assert np.abs(everything[-1] - expected[-1]).max() > 1e-2


def test_a_cache_of_a_window_alone_takes_no_mask():
    config = STACKS["relative_local"]
    config = dataclasses.replace(config, positions="none")
    x, mask = jnp.zeros((1, 1, 16)), jnp.ones((1, 1, 1, 6), bool)
    cache = init_caches(config, 1, LENGTH)
    with pytest.raises(ValueError, match=r"attention='local'\) takes no mask"):
        jax.eval_shape(
            lambda: Transformer(config).init(jax.random.key(0), x, cache=cache, position=jnp.int32(0), mask=mask)
        )
    with pytest.raises(ValueError, match="positions='t5' needs .* got attention='local'"):
        dataclasses.replace(config, positions="t5")
