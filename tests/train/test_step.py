import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_model as toy
from process_pair import run_pair

from jaxaudio import sharding
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxaudio.train.state import init_state
from jaxaudio.train.step import make_eval_step, make_train_step, mean_metrics

KEY = 7


class Run:
    """A mesh, a state and a step, as an experiment wires them."""

    def __init__(self, spec="data:8", rules=sharding.DATA, *, loss_fn=None, optimizer=None, devices=None, **options):
        self.mesh, self.rules = sharding.make_mesh(spec, devices), rules
        optimizer = optimizer or optax.sgd(0.1)
        ema = options.get("ema_decay") is not None
        self.state, self.shardings = init_state(
            toy.init_params, optimizer, jax.random.key(0), self.mesh, rules, ema=ema
        )
        self.batch_sharding = sharding.batch_sharding(self.mesh, rules)
        self.step = make_train_step(
            loss_fn or toy.make_loss(),
            optimizer,
            shardings=self.shardings,
            batch_sharding=self.batch_sharding,
            **options,
        )

    def train(self, batches):
        history = []
        with sharding.use(self.mesh, self.rules):
            for batch in batches:
                arrays = sharding.shard_batch(batch, self.mesh, self.rules)
                self.state, metrics = self.step(self.state, arrays, jax.random.key(KEY))
                history.append({name: float(value) for name, value in metrics.items()})
        return history


def test_step_equals_plain_gradient_descent():
    run, batch = Run(), toy.make_batch()
    before = jax.device_get(run.state.params)
    (metrics,) = run.train([batch])
    loss, grads = jax.value_and_grad(toy.mean_loss)(before, batch)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["weight"] == batch["mask"].sum()
    assert (metrics["accuracy"] * metrics["weight"]) % 1 == pytest.approx(0, abs=1e-4)
    assert int(run.state.step) == 1
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * g, atol=1e-6), run.state.params, before, grads
    )


def test_every_table_gives_the_same_losses():
    batches = [toy.make_batch(seed) for seed in range(3)]
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, clip_norm=1.0))
    single = Run("data:1", optimizer=optimizer, devices=jax.devices()[:1]).train(batches)
    cases = [
        ("data:8", sharding.DATA),
        ("data:2,fsdp:4", sharding.FSDP),
        ("data:2,fsdp:2,model:2", sharding.TENSOR),
    ]
    for spec, rules in cases:
        run = Run(spec, rules, optimizer=optimizer)
        for metrics, expected in zip(run.train(batches), single, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-5), spec
        # Neither parameters nor optimizer state lose their sharding on the way through a step.
        assert jax.tree.map(lambda x: x.sharding, run.state) == run.shardings


def test_accumulation_equals_the_big_batch():
    batch = toy.make_batch(rows=32)
    whole, cut = Run(), Run(accumulate_steps=4)
    expected, metrics = whole.train([batch])[0], cut.train([batch])[0]
    assert metrics == pytest.approx(expected, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), cut.state.params, whole.state.params)


def test_accumulation_moves_no_rows_between_devices():
    run = Run(accumulate_steps=2)
    batch = sharding.shard_batch(toy.make_batch(), run.mesh, run.rules)
    with sharding.use(run.mesh, run.rules):
        program = run.step.lower(run.state, batch, jax.random.key(KEY)).compile().as_text()
    collectives = re.findall(
        r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", program
    )
    assert set(collectives) == {"all-reduce"}


def random_loss(params, batch, key):
    """The loss is a random number, so that the metrics reveal which key the loss function was given."""
    zero = 0 * sum(jnp.sum(p) for p in jax.tree.leaves(params))
    return zero + jax.random.uniform(key), {"weight": jnp.ones(())}


@pytest.mark.parametrize("count", [1, 2])
def test_keys_are_folded_from_step_and_microbatch(count):
    history = Run(loss_fn=random_loss, accumulate_steps=count).train([toy.make_batch()] * 2)
    for step, metrics in enumerate(history):
        key = jax.random.fold_in(jax.random.key(KEY), step)
        keys = [key] if count == 1 else [jax.random.fold_in(key, i) for i in range(count)]
        expected = np.mean([jax.random.uniform(k) for k in keys])
        assert metrics["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_ten_steps_compile_once_and_donate_the_state():
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return toy.make_loss()(params, batch, key)

    schedule = make_schedule(OptimizerConfig(learning_rate=0.3, warmup_steps=3))
    run = Run("data:2,fsdp:2,model:2", sharding.TENSOR, loss_fn=counted, schedule=schedule)
    first = run.state
    history = run.train([toy.make_batch(seed) for seed in range(10)])
    assert len(traces) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert [m["learning_rate"] for m in history[:4]] == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_ema_by_hand():
    run = Run(ema_decay=0.75)
    average = jax.device_get(run.state.params)
    for seed in range(2):
        run.train([toy.make_batch(seed)])
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.asarray(p), average, run.state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.state.ema_params, average)


def test_bfloat16_compute_keeps_float32_state():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2))
    bfloat16 = Run(loss_fn=toy.make_loss(jnp.bfloat16), optimizer=optimizer, accumulate_steps=2, ema_decay=0.9)
    history = bfloat16.train([toy.make_batch()] * 2)
    floats = [x for x in jax.tree.leaves(bfloat16.state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    expected = Run(optimizer=optimizer).train([toy.make_batch()])[0]["loss"]
    assert history[0]["loss"] == pytest.approx(expected, rel=2e-2)
    assert history[0]["loss"] != expected
    assert history[1]["loss"] < history[0]["loss"]


def test_eval_step_sums_average_exactly_over_batches():
    run, batches = Run("data:2,fsdp:2,model:2", sharding.TENSOR), [toy.make_batch(seed) for seed in range(3)]
    keys = []

    def loss_fn(params, batch, key):
        keys.append(key)
        return toy.make_loss()(params, batch, key)

    eval_step = make_eval_step(loss_fn, shardings=run.shardings, batch_sharding=run.batch_sharding)
    with sharding.use(run.mesh, run.rules):
        sums = [eval_step(run.state.params, sharding.shard_batch(b, run.mesh, run.rules)) for b in batches]
    metrics = mean_metrics(sums)
    together = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    params = nn.meta.unbox(toy.init_params(jax.random.key(0)))
    assert metrics["loss"] == pytest.approx(float(toy.mean_loss(params, together)), rel=1e-5)
    assert metrics["weight"] == together["mask"].sum()
    assert 0 <= metrics["accuracy"] <= 1
    assert keys == [None]


def test_errors():
    with pytest.raises(ValueError, match="accumulate_steps must be at least 1, got 0"):
        Run(accumulate_steps=0)
    run = Run()
    wiring = {"shardings": run.shardings, "batch_sharding": run.batch_sharding}
    with pytest.raises(ValueError, match="ema_decay=0.9 with no ema_params in the state"):
        make_train_step(toy.make_loss(), optax.sgd(0.1), ema_decay=0.9, **wiring)
    averaged = wiring | {"shardings": run.shardings.replace(ema_params=run.shardings.params)}
    with pytest.raises(ValueError, match="ema_decay=None with ema_params in the state"):
        make_train_step(toy.make_loss(), optax.sgd(0.1), **averaged)
    with pytest.raises(ValueError, match="16 rows cannot be cut into 3 microbatches over 8 shards"):
        Run(accumulate_steps=3).train([toy.make_batch()])
    with pytest.raises(ValueError, match=r"must have 'weight' and not \[\], got \['count'\]"):
        Run(loss_fn=lambda params, batch, key: (jnp.zeros(()), {"count": 1})).train([toy.make_batch()])
    with pytest.raises(ValueError, match=r"and not \['loss'\], got \['loss', 'weight'\]"):
        Run(loss_fn=lambda params, batch, key: (jnp.zeros(()), {"weight": 1, "loss": 2})).train([toy.make_batch()])
    with pytest.raises(ValueError, match="nothing to average: the sums over all batches are {}"):
        mean_metrics([])
    with pytest.raises(ValueError, match="'weight': 0.0"):
        mean_metrics([{"loss": jnp.zeros(()), "weight": jnp.zeros(())}])
    batch = sharding.shard_batch(toy.make_batch(), run.mesh, run.rules)
    with pytest.raises(RuntimeError, match="within sharding.use"):
        run.step(run.state, batch, jax.random.key(KEY))
    with pytest.raises(RuntimeError, match="within sharding.use"):
        make_eval_step(toy.make_loss(), **wiring)(run.state.params, batch)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one():
    first, second = run_pair("two_processes.py")
    assert (first["data:2,fsdp:2"]["shard"], second["data:2,fsdp:2"]["shard"]) == ([0, 2], [1, 2])
    assert (first["model:4"]["shard"], second["model:4"]["shard"]) == ([0, 1], [0, 1])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2))
    history = Run("data:1", optimizer=optimizer, devices=jax.devices()[:1]).train(toy.make_batch(i) for i in range(3))
    for result in (*first.values(), *second.values()):
        assert result["losses"] == pytest.approx([metrics["loss"] for metrics in history], rel=1e-5)
