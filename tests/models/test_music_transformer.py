"""Music Transformer: every row of Table 2 decodes as it predicts, is causal, and trains all its parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxaudio.models.music_transformer import MusicTransformer, MusicTransformerConfig, init_cache
from jaxaudio.nn.layers import TokenEmbedding
from jaxaudio.nn.transformer import unstack_layers
from jaxaudio.nn.transformer_config import TransformerConfig
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


def random_params(model, tokens):
    """Parameters of the model's shapes from NumPy, without compiling `init`; no bias is zero."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(model.init, jax.random.key(1), tokens)["params"]

    def draw(path, leaf):
        is_norm = path[-1].key == "scale"
        deviation = 0.1 if is_norm or path[-1].key == "bias" else model.config.transformer.embed_dim**-0.5
        return jnp.asarray(is_norm + deviation * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract))


@functools.cache
def build(name):
    model = MusicTransformer(ROWS[name])
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 1, 48).at[:, 0].set(0)
    params = random_params(model, tokens)
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens)[0])
    return model, params, tokens, forward, forward(tokens)


@pytest.mark.parametrize("name", ROWS)
def test_step_by_step_equals_the_full_forward_pass(name):
    model, params, tokens, _, logits = build(name)
    step = jax.jit(model.apply)
    cache, variables = init_cache(model.config, 2, LENGTH), {"params": unstack_layers(params)}
    for t in range(LENGTH):
        out, cache = step(variables, tokens[:, t : t + 1], cache=cache, position=jnp.int32(t))
        np.testing.assert_allclose(out[:, 0], logits[:, t], atol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_no_token_sees_the_future_or_another_row(name):
    _, _, tokens, forward, logits = build(name)
    changed = tokens.at[0, 13].set((tokens[0, 13] + 5) % 47 + 1)
    other = forward(changed)
    np.testing.assert_array_equal(other[0, :13], logits[0, :13])
    assert np.all(np.any(np.asarray(other[0, 13:] != logits[0, 13:]), axis=-1))
    np.testing.assert_array_equal(other[1], logits[1])


@pytest.mark.parametrize("name", ["baseline", "pitch_time"])  # pitch_time: dense first, then blockwise
def test_batch_equals_one_by_one(name):
    _, _, tokens, forward, logits = build(name)
    for row in range(2):
        np.testing.assert_allclose(forward(tokens[row : row + 1])[0], logits[row], atol=1e-5)


@pytest.mark.parametrize("name", ["cpsi", "relative", "pitch_time", "local"])  # cpsi has baseline's and cps's layers
def test_gradient_reaches_every_parameter_and_one_batch_is_learnt(name):
    model, params, tokens, _, _ = build(name)
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
    for _ in range(60):
        params, state, loss, _ = step(params, state)
    assert float(first) > 3.0
    assert float(loss) < 0.05


def test_initial_deviations_are_those_of_tensor2tensor():
    transformer = dataclasses.replace(RELATIVE, num_layers=1, embed_dim=64, head_dim=36)
    model = MusicTransformer(MusicTransformerConfig(500, transformer))
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    layer = params["transformer"]["layers"]
    assert np.std(params["embedding"]["embedding"]) == pytest.approx(64**-0.5, rel=0.05)
    assert np.std(layer["attention"]["relative_embeddings"]) == pytest.approx(36**-0.5, rel=0.1)
    # Uniform with the variance 2 / (inputs + outputs); heads count as outputs.
    assert np.std(layer["mlp"]["up"]["kernel"]) == pytest.approx((2 / (64 + 24)) ** 0.5, rel=0.05)
    assert np.std(layer["attention"]["query"]["kernel"]) == pytest.approx((2 / (64 + 72)) ** 0.5, rel=0.05)
    assert not np.any(layer["mlp"]["up"]["bias"])
    assert np.all(layer["mlp_norm"]["layer"]["scale"] == 1)


def test_padding_and_start_are_the_zero_vector():
    model = MusicTransformer(ROWS["baseline"])
    tokens = jnp.array([[0, 0, 7]])
    params = random_params(model, tokens)
    embed = TokenEmbedding(48, BASE.embed_dim)
    x = embed.apply({"params": params["embedding"]}, tokens)
    np.testing.assert_array_equal(x[0, :2], np.zeros((2, BASE.embed_dim)))
    np.testing.assert_allclose(x[0, 2], 4.0 * params["embedding"]["embedding"][7], rtol=1e-6)  # sqrt(16)


def test_stacked_parameters_cannot_decode():
    model = MusicTransformer(ROWS["baseline"])
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = random_params(model, tokens)
    with pytest.raises(ValueError, match="unstack_layers"):
        model.apply({"params": params}, tokens, cache=init_cache(model.config, 1, 4), position=jnp.int32(0))


def test_labels_without_concatenation_are_an_error():
    with pytest.raises(ValueError, match="label_period=4"):
        MusicTransformerConfig(48, BASE, label_period=4)
