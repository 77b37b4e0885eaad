"""Whisper: its published sizes, step by step like the full pass, training on every mesh, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxaudio import sharding
from jaxaudio.models.whisper import SIZES, Whisper, WhisperConfig, init_cache
from jaxaudio.nn.transformer import cross_caches, unstack_layers
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.train.state import abstract_state
from jaxaudio.train.step import make_train_step

CONFIG = WhisperConfig(
    vocab_size=13,
    num_mels=6,
    embed_dim=16,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_frames=20,
    text_length=9,
)
BATCH, LENGTH = 8, 7
MESHES = {"DATA": "data:8", "FSDP": "data:2,fsdp:4", "TENSOR": "data:2,fsdp:2,model:2"}


def make_batch(seed, batch=BATCH):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (batch, LENGTH + 1), dtype=np.int32)
    mel = rng.standard_normal((batch, CONFIG.num_frames, CONFIG.num_mels)).astype(np.float32)
    mask = rng.random((batch, LENGTH)) < 0.8
    batch = {"mel": mel, "inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}
    return jax.tree.map(jnp.asarray, batch)


def draw(path, leaf, rng):
    """Parameters from NumPy, which spares compiling `init`; no bias is zero, and the sinusoids stay."""
    center = 1.0 if path[-1].key == "scale" else 0.0
    return (center + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)


def random_params(config=CONFIG):
    rng = np.random.default_rng(0)
    batch = make_batch(0, batch=1)
    abstract = jax.eval_shape(Whisper(config).init, jax.random.key(0), batch["mel"], batch["inputs"])["params"]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(draw(path, leaf, rng)), nn.meta.unbox(abstract)
    )


def loss_of(config):
    def loss_fn(params, batch, key):
        rngs = None if key is None else {"dropout": key}
        logits = Whisper(config).apply(
            {"params": params}, batch["mel"], batch["inputs"], deterministic=key is None, rngs=rngs
        )
        nats, weight = cross_entropy(logits, batch["targets"], batch["mask"])
        return nats, {"weight": weight}

    return loss_fn


# Table 1 of the paper and the model card, in millions.
NOMINAL = {"small": 244, "medium": 769, "large-v2": 1550, "large-v3": 1550}
# Counted from the published checkpoints, the sinusoids included.
EXACT = {"tiny": 37_760_640, "tiny.en": 37_760_256, "base": 72_593_920, "small.en": 241_734_144, "turbo": 808_878_080}


def num_parameters(config):
    mel, tokens = jnp.zeros((1, 3000, config.num_mels)), jnp.zeros((1, 2), jnp.int32)
    abstract = jax.eval_shape(Whisper(config).init, jax.random.key(0), mel, tokens)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))


def test_sizes_are_the_published_ones():
    for name, size in EXACT.items():
        assert num_parameters(SIZES[name]) == size
    for name, size in NOMINAL.items():
        assert num_parameters(SIZES[name]) == pytest.approx(size * 1e6, rel=0.04)
    assert SIZES["large"] is SIZES["large-v3"]
    assert {config.embed_dim // config.num_heads for config in SIZES.values()} == {64}


def test_step_by_step_equals_the_full_forward_pass():
    model, params, batch = Whisper(CONFIG), random_params(), make_batch(1, batch=2)
    expected = jax.jit(model.apply)({"params": params}, batch["mel"], batch["inputs"])
    variables = {"params": params | {"decoder": unstack_layers(params["decoder"])}}

    @jax.jit
    def remember(mel):
        memory = model.apply({"params": params}, mel, method="encode")
        return cross_caches(CONFIG.decoder, variables["params"]["decoder"]["transformer"], memory)

    @jax.jit
    def step(tokens, memory, cache, position):
        positions = jnp.full((2, 1), position)
        hidden, cache = model.apply(
            variables, tokens, memory, positions=positions, cache=cache, slot=position, method="decode"
        )
        return model.apply(variables, hidden, method="logits"), cache

    memory, cache = remember(batch["mel"]), init_cache(CONFIG, 2, LENGTH)
    for position in range(LENGTH):
        logits, cache = step(batch["inputs"][:, position : position + 1], memory, cache, jnp.int32(position))
        np.testing.assert_allclose(logits[:, 0], expected[:, position], atol=1e-4)


def test_batch_equals_one_by_one():
    model, params, batch = Whisper(CONFIG), random_params(), make_batch(2, batch=3)
    apply = jax.jit(model.apply)
    together = apply({"params": params}, batch["mel"], batch["inputs"])
    for row in range(3):
        alone = apply({"params": params}, batch["mel"][row : row + 1], batch["inputs"][row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_gradient_reaches_every_parameter_but_the_sinusoids_and_one_batch_is_learnt():
    batch, loss_fn, optimizer = make_batch(3), loss_of(CONFIG), optax.adam(3e-3)

    @jax.jit
    def step(params, opt_state):
        (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, None)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss / batch["mask"].sum(), gradient

    params = random_params()
    start, opt_state = params, optimizer.init(params)
    for i in range(250):
        params, opt_state, loss, gradient = step(params, opt_state)
        if i == 0:
            silent = {
                jax.tree_util.keystr(path)
                for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
                if not np.any(np.asarray(leaf))
            }
            assert silent == {"['encoder']['position_embedding']"}
    assert loss < 0.05
    table = "encoder", "position_embedding"
    np.testing.assert_array_equal(params[table[0]][table[1]], start[table[0]][table[1]])


def train(config, table, mesh, num_steps=2):
    """Losses of training steps with dropout and stochastic depth on a mesh."""
    mesh, rules, optimizer = (
        sharding.make_mesh(mesh, jax.devices()[: 1 if mesh == "data:1" else 8]),
        table,
        optax.sgd(0.3),
    )

    def init_params(key):
        batch = make_batch(0, batch=1)
        return Whisper(config).init(key, batch["mel"], batch["inputs"])["params"]

    abstract = abstract_state(init_params, optimizer, mesh, rules)
    rng = np.random.default_rng(0)

    def put(path, leaf):
        value = jnp.zeros(leaf.shape, leaf.dtype) if leaf.dtype == jnp.int32 else draw(path, leaf, rng)
        return jax.device_put(value, leaf.sharding)

    state = jax.tree_util.tree_map_with_path(put, abstract)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    batch_sharding = sharding.batch_sharding(mesh, rules)
    step = make_train_step(loss_of(config), optimizer, shardings=shardings, batch_sharding=batch_sharding)
    with sharding.use(mesh, rules):
        key = jax.device_put(jax.random.key(7), sharding.replicated(mesh))
        losses = []
        for seed in range(num_steps):
            state, metrics = step(state, sharding.shard_batch(make_batch(seed), mesh, rules), key)
            losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
def test_every_table_gives_the_single_device_losses():
    config = dataclasses.replace(CONFIG, dropout_rate=0.1, stochastic_depth_rate=0.3)
    expected = train(config, sharding.DATA, "data:1")
    assert expected[0] != expected[1]
    for table, mesh in MESHES.items():
        assert train(config, sharding.TABLES[table], mesh) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", ["tiny.en", "turbo", "large-v3"])
def test_published_sizes_can_be_sharded_by_every_table(size):
    config = SIZES[size]
    mel, tokens = jnp.zeros((1, 3000, config.num_mels)), jnp.zeros((1, 2), jnp.int32)
    boxed = jax.eval_shape(Whisper(config).init, jax.random.key(0), mel, tokens)["params"]
    for table, mesh in MESHES.items():
        shardings = sharding.tree_shardings(boxed, sharding.make_mesh(mesh), sharding.TABLES[table])
        split = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings))
        assert (split > 0) == (table != "DATA")


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="num_frames must be even and positive, got 21"):
        dataclasses.replace(CONFIG, num_frames=21)
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        dataclasses.replace(CONFIG, vocab_size=0)
    with pytest.raises(ValueError, match=r"alignment head \(2, 0\) is not one of 2 layers x 2"):
        dataclasses.replace(CONFIG, alignment_heads=((2, 0),))
    batch, model = make_batch(0, batch=1), Whisper(CONFIG)
    with pytest.raises(ValueError, match=r"\(batch, 20 frames, 6 mels\), got \(1, 18, 6\)"):
        jax.eval_shape(model.init, jax.random.key(0), batch["mel"][:, :18], batch["inputs"])
    with pytest.raises(ValueError, match="the decoder has 9 positions, got 10 tokens"):
        jax.eval_shape(model.init, jax.random.key(0), batch["mel"], jnp.zeros((1, 10), jnp.int32))
