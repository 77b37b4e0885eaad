"""Music Transformer: every row of Table 2 decodes as it predicts, is causal, and trains all its parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxaudio.models.music_transformer import MusicTransformer, MusicTransformerConfig, init_cache
from jaxaudio.nn.transformer import TransformerConfig, unstack_layers
from jaxaudio.ops.losses import cross_entropy

BASE = TransformerConfig(num_layers=3, embed_dim=16, num_heads=2, mlp_dim=24, head_dim=12)
RELATIVE = dataclasses.replace(BASE, positions="relative", max_distance=9, block_size=8)
ROWS = {
    "baseline": MusicTransformerConfig(48, BASE),
    "cps": MusicTransformerConfig(48, BASE, "concatenated"),
    "cpsi": MusicTransformerConfig(48, BASE, "concatenated", label_period=4),
    "relative": MusicTransformerConfig(48, RELATIVE),
    "pitch_time": MusicTransformerConfig(
        48, dataclasses.replace(RELATIVE, pitch_time=True), "concatenated", label_period=4
    ),
    "local": MusicTransformerConfig(48, dataclasses.replace(RELATIVE, attention="local")),
}
LENGTH = 20


@pytest.fixture(scope="module", params=ROWS)
def case(request):
    model = MusicTransformer(ROWS[request.param])
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 1, 48).at[:, 0].set(0)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), tokens))["params"]
    logits, _ = jax.jit(model.apply)({"params": params}, tokens)
    return model, params, tokens, logits


def test_step_by_step_equals_the_full_forward_pass(case):
    model, params, tokens, logits = case
    step = jax.jit(model.apply)
    cache, variables = init_cache(model.config, 2, LENGTH), {"params": unstack_layers(params)}
    for t in range(LENGTH):
        out, cache = step(variables, tokens[:, t : t + 1], cache=cache, position=jnp.int32(t))
        np.testing.assert_allclose(out[:, 0], logits[:, t], atol=1e-4)


def test_no_token_sees_the_future(case):
    model, params, tokens, logits = case
    changed = tokens.at[:, 13].set((tokens[:, 13] + 5) % 47 + 1)
    other, _ = jax.jit(model.apply)({"params": params}, changed)
    np.testing.assert_array_equal(other[:, :13], logits[:, :13])
    assert np.all(np.any(np.asarray(other[:, 13:] != logits[:, 13:]), axis=(-2, -1)))


def test_batch_equals_one_by_one(case):
    model, params, tokens, logits = case
    for row in range(2):
        alone, _ = jax.jit(model.apply)({"params": params}, tokens[row : row + 1])
        np.testing.assert_allclose(alone[0], logits[row], atol=1e-5)


def test_gradient_reaches_every_parameter_and_one_batch_is_learnt(case):
    model, params, tokens, _ = case
    targets = jnp.concatenate([tokens[:, 1:], tokens[:, 1:2]], axis=1)
    optimizer = optax.adam(2e-2)

    def loss_fn(params):
        nats, weight = cross_entropy(model.apply({"params": params}, tokens)[0], targets, targets > 0)
        return nats / weight

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, update), state, loss, gradient

    state = optimizer.init(params)
    params, state, first, gradient = step(params, state)
    dead = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(g)]
    assert dead == []
    for _ in range(80):
        params, state, loss, _ = step(params, state)
    assert float(first) > 3.0
    assert float(loss) < 0.05


def test_stacked_parameters_cannot_decode():
    model = MusicTransformer(ROWS["baseline"])
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = nn.meta.unbox(model.init(jax.random.key(0), tokens))
    with pytest.raises(ValueError, match="unstack_layers"):
        model.apply(params, tokens, cache=init_cache(model.config, 1, 4), position=jnp.int32(0))


def test_voices_without_concatenation_are_an_error():
    with pytest.raises(ValueError, match="label_period=4"):
        MusicTransformerConfig(48, BASE, label_period=4)
