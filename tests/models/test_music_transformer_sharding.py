"""Music Transformer on eight devices: every table of axes trains it as one device does."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaudio import sharding
from jaxaudio.models.music_transformer import (
    AccompanimentConfig,
    AccompanimentTransformer,
    MusicTransformer,
    MusicTransformerConfig,
)
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.train.state import abstract_state
from jaxaudio.train.step import make_train_step

BATCH, LENGTH, VOCAB = 8, 24, 12
BASELINE = TransformerConfig(
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    dropout_rate=0.1,
    attention_dropout_rate=0.2,
    mlp_dropout_rate=0.1,
)
RELATIVE = dataclasses.replace(BASELINE, positions="relative", max_distance=10, block_size=8, dropout_generator="hash")
MODELS = {
    "baseline": MusicTransformerConfig(VOCAB, BASELINE),
    "relative": MusicTransformerConfig(VOCAB, RELATIVE),
    # The first layer takes the dense form, the others the blockwise one, this time with JAX's own generator.
    "pitch_time": MusicTransformerConfig(
        VOCAB, dataclasses.replace(RELATIVE, pitch_time=True, dropout_generator="jax"), "concatenated", label_period=4
    ),
    "accompaniment": AccompanimentConfig(
        VOCAB,
        dataclasses.replace(BASELINE, attention="full"),
        MusicTransformerConfig(VOCAB, dataclasses.replace(RELATIVE, cross_attention=True)),
    ),
}
MESHES = {"DATA": "data:8", "FSDP": "data:2,fsdp:4", "TENSOR": "data:2,fsdp:2,model:2"}


def make_batch(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (BATCH, LENGTH + 1), dtype=np.int32)
    mask = rng.random((BATCH, LENGTH)) < 0.8
    melody = rng.integers(1, VOCAB, (BATCH, 10), dtype=np.int32) * (np.arange(10) < rng.integers(3, 11, (BATCH, 1)))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask, "melody": melody.astype(np.int32)}


def run(config, rules, mesh, num_steps=3):
    """Metrics of training steps with dropout on, wired as the experiment does, and the compiled program's text."""
    optimizer, has_melody = optax.sgd(0.5), isinstance(config, AccompanimentConfig)
    model = AccompanimentTransformer(config) if has_melody else MusicTransformer(config)

    def loss_fn(params, batch, key):
        inputs = (batch["melody"], batch["inputs"]) if has_melody else (batch["inputs"],)
        out = model.apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": key})
        logits = out if has_melody else out[0]
        nats, weight = cross_entropy(logits, batch["targets"], batch["mask"])
        return nats, {"weight": weight}

    def init_params(key):
        return model.init(key, *[jnp.zeros((1, LENGTH), jnp.int32)] * (1 + has_melody))["params"]

    abstract = abstract_state(init_params, optimizer, mesh, rules)
    rng = np.random.default_rng(0)

    def draw(path, leaf):  # spares compiling `init` on every mesh
        if leaf.dtype == jnp.int32:
            return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jax.device_put((center + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), leaf.sharding)

    state = jax.tree_util.tree_map_with_path(draw, abstract)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = make_train_step(loss_fn, optimizer, shardings=shardings, batch_sharding=sharding.batch_sharding(mesh, rules))
    history = []
    with sharding.use(mesh, rules):
        key = jax.device_put(jax.random.key(7), sharding.replicated(mesh))
        batches = [sharding.shard_batch(make_batch(seed), mesh, rules) for seed in range(num_steps)]
        compiled = step.lower(state, batches[0], key).compile()
        for batch in batches:
            state, metrics = compiled(state, batch, key)
            history.append({name: float(value) for name, value in metrics.items()})
    return history, compiled.as_text()


@functools.cache
def single_device(name):
    return run(MODELS[name], sharding.DATA, sharding.make_mesh("data:1", jax.devices()[:1]))[0]


@functools.cache
def eight_devices(name, table):
    return run(MODELS[name], sharding.TABLES[table], sharding.make_mesh(MESHES[table]))


CASES = [(name, table) for name in ("baseline", "relative", "accompaniment") for table in MESHES]
CASES.append(("pitch_time", "TENSOR"))


@pytest.mark.parametrize(("name", "table"), CASES)
def test_every_table_gives_the_single_device_losses(name, table):
    history, expected = eight_devices(name, table)[0], single_device(name)
    for metrics, single in zip(history, expected, strict=True):
        assert metrics == pytest.approx(single, rel=1e-5)
    assert history[0]["loss"] != history[1]["loss"]


def collectives_by_loop_depth(program):
    """{number of loops around: names of collectives} of a compiled program, and the greatest depth of its loops."""
    bodies, entry = {}, None
    for match in re.finditer(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL):
        bodies[match.group(2)] = match.group(3)
        entry = match.group(2) if match.group(1) else entry
    found, deepest, todo, seen = {}, 0, [(entry, 0)], set()
    while todo:
        name, depth = todo.pop()
        if (name, depth) in seen:
            continue
        seen.add((name, depth))
        deepest = max(deepest, depth)
        for line in bodies[name].splitlines():
            for kind in re.findall(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\S*\(", line):
                found.setdefault(depth, []).append(kind)
            loop = " while(" in line
            callees = re.findall(r"(?:body|condition|to_apply|calls|computation)=%?([\w.-]+)", line)
            todo += [(callee, depth + loop) for callee in callees]
    return found, deepest


def test_attention_loops_of_a_data_parallel_step_talk_to_no_other_device():
    """The stack is one loop over layers, whose gradients may be summed inside; the loops within it are attention's."""
    found, deepest = collectives_by_loop_depth(eight_devices("relative", "DATA")[1])
    assert deepest >= 3  # layers, query blocks, key blocks
    assert sum(map(len, found.values())) > 0
    assert {depth: kinds for depth, kinds in found.items() if depth > 1} == {}


def test_every_row_of_the_experiment_can_be_sharded_by_every_table():
    from experiments.music_transformer_jsb import ROWS

    for row in ROWS.values():
        model = MusicTransformer(row.model)
        boxed = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
        for table, mesh in MESHES.items():
            shardings = sharding.tree_shardings(boxed, sharding.make_mesh(mesh), sharding.TABLES[table])
            split = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings))
            assert (split > 0) == (table != "DATA")
