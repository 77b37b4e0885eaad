"""Music Transformer: every row of Table 2, and the one with a melody, decodes as it predicts and trains whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxaudio.models.music_transformer import (
    AccompanimentConfig,
    AccompanimentTransformer,
    Memory,
    MusicTransformer,
    MusicTransformerConfig,
    init_accompaniment_cache,
    init_cache,
)
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
    "accompaniment": AccompanimentConfig(
        30,
        dataclasses.replace(BASE, num_layers=2, attention="full"),
        MusicTransformerConfig(48, dataclasses.replace(RELATIVE, num_layers=2, cross_attention=True)),
    ),
}
LENGTH = 20
MELODY = np.random.default_rng(1).integers(1, 30, (2, 9), dtype=np.int32)
MELODY[1, 6:] = 0  # padding


def random_params(model, *inputs):
    """Parameters of the model's shapes from NumPy, without compiling `init`; no bias is zero."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(model.init, jax.random.key(1), *inputs)["params"]

    def draw(path, leaf):
        is_norm = path[-1].key == "scale"
        deviation = 0.1 if is_norm or path[-1].key == "bias" else BASE.embed_dim**-0.5
        return jnp.asarray(is_norm + deviation * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract))


def predict(model, params, tokens, melody=MELODY):
    """Logits of any row."""
    if isinstance(model, AccompanimentTransformer):
        return model.apply({"params": params}, jnp.asarray(melody), tokens)
    return model.apply({"params": params}, tokens)[0]


def decoder(model, params, melody=MELODY):
    """What decodes a row: the model, its parameters and an empty cache."""
    if isinstance(model, AccompanimentTransformer):
        init = jax.jit(init_accompaniment_cache, static_argnums=(0, 3))
        cache = init(model.config, params, melody, LENGTH)
        return MusicTransformer(model.config.decoder), {"params": unstack_layers(params["decoder"])}, cache
    return model, {"params": unstack_layers(params)}, init_cache(model.config, 2, LENGTH)


@functools.cache
def build(name):
    config = ROWS[name]
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 1, 48).at[:, 0].set(0)
    if isinstance(config, AccompanimentConfig):
        model, inputs = AccompanimentTransformer(config), (jnp.asarray(MELODY), tokens)
    else:
        model, inputs = MusicTransformer(config), (tokens,)
    params = random_params(model, *inputs)
    compiled = jax.jit(lambda tokens, melody: predict(model, params, tokens, melody))

    def forward(tokens, melody=MELODY):
        return compiled(tokens, melody)

    return model, params, tokens, forward, forward(tokens)


@pytest.mark.parametrize("name", ROWS)
def test_step_by_step_equals_the_full_forward_pass(name):
    model, params, tokens, _, logits = build(name)
    model, variables, cache = decoder(model, params)
    step = jax.jit(model.apply)
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


# cpsi has baseline's and cps's layers.
@pytest.mark.parametrize("name", ["cpsi", "relative", "pitch_time", "local", "accompaniment"])
def test_gradient_reaches_every_parameter_and_one_batch_is_learnt(name):
    model, params, tokens, _, _ = build(name)
    targets = jnp.concatenate([tokens[:, 1:], tokens[:, 1:2]], axis=1)
    optimizer = optax.adam(2e-2)

    def loss_fn(params):
        nats, weight = cross_entropy(predict(model, params, tokens), targets, targets > 0)
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


def test_padding_of_the_melody_changes_nothing():
    _, _, tokens, forward, logits = build("accompaniment")
    np.testing.assert_allclose(forward(tokens[1:], MELODY[1:, :6])[0], logits[1], atol=1e-5)


def test_every_position_hears_the_whole_melody_of_its_row():
    _, _, tokens, forward, logits = build("accompaniment")
    changed = MELODY.copy()
    changed[0, 8] = MELODY[0, 8] % 29 + 1
    other = np.asarray(forward(tokens, changed))
    assert np.all(np.any(other[0] != logits[0], axis=-1))
    np.testing.assert_array_equal(other[1], logits[1])


def test_the_order_of_the_melody_matters():
    _, _, tokens, forward, logits = build("accompaniment")
    assert np.max(np.abs(forward(tokens, MELODY[:, ::-1])[0] - logits[0])) > 0.01


def test_decoding_without_the_melody_in_the_cache_is_an_error():
    config = ROWS["accompaniment"].decoder
    tokens, memory = jnp.zeros((2, 1), jnp.int32), Memory(jnp.zeros((2, 9, 16)), jnp.asarray(MELODY > 0))
    options = {"cache": init_cache(config, 2, LENGTH), "position": jnp.int32(0)}
    init = functools.partial(jax.eval_shape, MusicTransformer(config).init, jax.random.key(0), tokens)
    with pytest.raises(ValueError, match=r"cross_caches of the memory, got an array of shape \(2, 9, 16\)"):
        init(memory=memory, **options)
    with pytest.raises(ValueError, match="cross_attention=True does not go with memory of shape None"):
        init(**options)


@pytest.mark.parametrize(
    ("encoder", "decoder", "match"),
    [
        ({"attention": "causal"}, {}, "got 'causal', 'none', False"),
        ({"positions": "t5"}, {}, "got 'full', 't5', False"),
        ({"cross_attention": True}, {}, "got 'full', 'none', True"),
        ({"embed_dim": 32}, {}, "embed_dim 32 is not the decoder's 16"),
        ({}, {"cross_attention": False}, "cross_attention=False"),
        ({}, {"pitch_time": True}, "pitch_time=True"),
    ],
)
def test_halves_that_do_not_go_together_are_an_error(encoder, decoder, match):
    good = ROWS["accompaniment"]
    stack = dataclasses.replace(good.decoder.transformer, **decoder)
    with pytest.raises(ValueError, match=match):
        AccompanimentConfig(
            30, dataclasses.replace(good.encoder, **encoder), dataclasses.replace(good.decoder, transformer=stack)
        )
