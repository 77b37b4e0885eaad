import functools
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_codec as toy
from jax.sharding import PartitionSpec

from jaxaudio import sharding
from jaxaudio.train.adversarial import init_adversarial_state, make_adversarial_step
from jaxaudio.train.checkpoint import Checkpointer
from jaxaudio.train.loop import MetricsWriter, NonFiniteLossError, train_loop
from jaxaudio.train.step import make_eval_step

KEY = 7
PLAIN = {"losses": toy.make_losses(), "disc_first": True, "disc_probability": 1.0}  # as DAC trains
BALANCED = {  # as EnCodec does
    "losses": toy.make_losses(rescale=True),
    "disc_first": False,
    "disc_probability": 0.5,
    "ema_decay": 0.75,
    "schedule": lambda step: 0.5 * (step + 1),
}
ALONE = BALANCED | {"adversarial": False}
CHOSEN = BALANCED | {"num_discriminators": 3}  # EnCodec's, for three bandwidths
KINDS = {"plain": PLAIN, "balanced": BALANCED, "alone": ALONE, "chosen": CHOSEN}
FSDP = 8, "data:2,fsdp:4", "FSDP"
SHARDED = "balanced", *FSDP


class Run:
    """A mesh, a state and a step, as an experiment wires them."""

    def __init__(self, num_devices=1, spec="data:-1", table="DATA", *, losses=None, num_discriminators=None, **options):
        self.mesh, self.rules = sharding.make_mesh(spec, jax.devices()[:num_devices]), sharding.TABLES[table]
        self.losses, self.traces = losses or toy.make_losses(), []
        optimizers = optax.adam(1e-2), optax.adam(3e-3)
        self.state, self.shardings = init_adversarial_state(
            toy.init_params,
            toy.init_disc_params,
            self.losses,
            *optimizers,
            jax.random.key(0),
            self.mesh,
            self.rules,
            num_discriminators=num_discriminators,
            init_codebooks=toy.start_codebooks,
            ema="ema_decay" in options,
        )
        self.first_state = jax.device_get(self.state)

        def generate(params, batch, key):
            self.traces.append(1)
            made = toy.generate(params, batch, key)
            return made if num_discriminators is None else made._replace(disc_index=batch["disc_index"][0])

        self.batch_sharding = sharding.batch_sharding(self.mesh, self.rules)
        self.step = make_adversarial_step(
            generate,
            toy.discriminate,
            self.losses,
            *optimizers,
            shardings=self.shardings,
            batch_sharding=self.batch_sharding,
            update_codebooks=toy.update,
            **options,
        )

    def put(self, batch):
        return sharding.shard_batch(batch, self.mesh, self.rules)

    def train(self, batches):
        history = []
        with sharding.use(self.mesh, self.rules):
            for batch in batches:
                self.state, metrics = self.step(self.state, self.put(batch), jax.random.key(KEY))
                history.append({name: float(value) for name, value in metrics.items()})
        return history


@functools.cache
def compiled_run(kind, *args):
    return Run(*args, **KINDS[kind])


def new_run(*args):
    """A run at its start, its step compiled only once for all tests."""
    run = compiled_run(*args)
    run.state = jax.device_put(run.first_state, run.shardings)
    return run


def part(stacked, index):
    return jax.tree.map(lambda x: x[index], stacked)


def reference(state, batches, losses, disc_first, disc_probability, adversarial=True, num_discriminators=None, **_):
    """The two optimizers by hand, in the order of the papers; the balancer from its formula. Yields (state, values).

    Of several discriminators each is trained alone, with its own optimizer.
    """
    params, codebooks = state.params, state.codebooks
    optimizer, disc_optimizer = optax.adam(1e-2), optax.adam(3e-3)
    discs = [state.disc_params]
    if num_discriminators:
        discs = [part(state.disc_params, index) for index in range(num_discriminators)]
    opt_state, disc_opt_states = optimizer.init(params), [disc_optimizer.init(disc_params) for disc_params in discs]
    sums = dict.fromkeys(losses.weights if adversarial else losses.reconstruction, 0.0)

    def terms(x_hat, x, disc_params):
        distances = {name: loss(x, x_hat) for name, loss in losses.reconstruction.items()}
        if not adversarial:
            return distances
        judged = toy.discriminate(disc_params, x), toy.discriminate(disc_params, x_hat)
        return distances | {name: loss(*judged) for name, loss in losses.adversarial.items()}

    def disc_loss(disc_params, x, x_hat):
        return toy.discriminator_hinge(toy.discriminate(disc_params, x), toy.discriminate(disc_params, x_hat))

    def total(params, batch, key, disc_params, factors):
        made = toy.generate(params, batch, key)
        values = terms(made.reconstruction, made.target, disc_params) | made.penalties
        return sum(factors[name] * value for name, value in values.items()), values

    disc_grad, total_grad = jax.jit(jax.value_and_grad(disc_loss)), jax.jit(jax.grad(total, has_aux=True))
    term_grads, generate, update = jax.jit(jax.jacrev(terms)), jax.jit(toy.generate), jax.jit(toy.update)
    for step, batch in enumerate(batches):
        key, disc_key, codebook_key = jax.random.split(jax.random.fold_in(jax.random.key(KEY), step), 3)
        made = generate(params, batch, jax.random.clone(key))
        index = int(batch["disc_index"][0]) if num_discriminators else 0
        met = discs[index]
        if jax.random.uniform(disc_key) < disc_probability and adversarial:
            _, grads = disc_grad(discs[index], made.target, made.reconstruction)
            updates, disc_opt_states[index] = disc_optimizer.update(grads, disc_opt_states[index])
            discs[index] = optax.apply_updates(discs[index], updates)
        if disc_first:
            met = discs[index]
        factors = dict(losses.weights)
        if losses.rescale:
            for name, grad in term_grads(made.reconstruction, made.target, met).items():
                sums[name] = 0.999 * sums[name] + 0.001 * np.linalg.norm(grad, axis=-1).mean()
                average = sums[name] / (1 - 0.999 ** (step + 1))
                factors[name] = losses.weights[name] / sum(losses.weights.values()) / average
        grads, values = total_grad(params, batch, key, met, factors | losses.penalty_weights)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        params, codebooks, _ = update(params, codebooks, made.quantized, codebook_key)
        values["discriminator_loss"] = disc_grad(met, made.target, made.reconstruction)[0] if adversarial else 0.0
        values["grad_norm"] = optax.tree.norm(grads)
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *discs) if num_discriminators else discs[0]
        yield (params, stacked, codebooks), {name: float(value) for name, value in values.items()}


def make_batches(kind):
    """Five; of three discriminators to choose from the second judges none."""
    batches = [toy.make_batch(seed) for seed in range(5)]
    if kind == "chosen":
        for batch, index in zip(batches, (2, 0, 2, 2, 0), strict=True):
            batch["disc_index"] = np.full(toy.ROWS, index, np.int32)
    return batches


@pytest.mark.parametrize(("kind", "devices"), [("plain", ()), ("balanced", ()), ("alone", ()), ("chosen", FSDP)])
def test_step_equals_two_optimizers_by_hand(kind, devices):
    run, batches = new_run(kind, *devices), make_batches(kind)
    expected = list(reference(run.first_state, batches, **KINDS[kind]))
    average = run.first_state.params
    for step, (batch, (state, values)) in enumerate(zip(batches, expected, strict=True)):
        (metrics,) = run.train([batch])
        assert {name: metrics[name] for name in values} == pytest.approx(values, rel=1e-4, abs=1e-6)
        weights = run.losses.weights | run.losses.penalty_weights
        assert metrics["loss"] == pytest.approx(sum(weights[name] * metrics[name] for name in weights), rel=1e-5)
        assert sum(metrics[f"share/{name}"] for name in run.losses.weights) == pytest.approx(1, rel=1e-5)
        assert {"perplexity/0", "perplexity/1", "dead_codes/0", "dead_codes/1"} <= metrics.keys()
        found = run.state.params, run.state.disc_params, run.state.codebooks
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, state)
        if kind != "plain":
            average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, state[0])
            assert metrics["learning_rate"] == 0.5 * (step + 1)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run.state.ema_params, average)
    assert int(run.state.step) == 5


def test_only_the_chosen_discriminator_changes():
    run, learned = new_run("chosen", *FSDP), []
    before = jax.device_get((run.state.disc_params, run.state.disc_opt_state))
    kernels = before[0]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[1], kernels[2])
    for batch in make_batches("chosen"):
        (metrics,) = run.train([batch])
        after = jax.device_get((run.state.disc_params, run.state.disc_opt_state))
        for index in range(3):
            changes = index == batch["disc_index"][0] and bool(metrics["discriminator_learns"])
            pairs = zip(jax.tree.leaves(part(before, index)), jax.tree.leaves(part(after, index)), strict=True)
            assert {not np.array_equal(*pair) for pair in pairs} == {changes}
            if changes:
                learned.append(index)
        before = after
    assert {*learned} == {0, 2}


def test_discriminators_that_are_not_asked_stay_as_they_are():
    run = new_run("alone")
    history = run.train(make_batches("alone"))
    for name in ("adversarial", "feature", "discriminator_loss", "discriminator_learns", "disc_grad_norm"):
        assert {metrics[name] for metrics in history} == {0.0}, name
    assert {metrics[f"share/{name}"] for metrics in history for name in run.losses.adversarial} == {0.0}
    first = run.first_state.disc_params, run.first_state.disc_opt_state
    jax.tree.map(np.testing.assert_array_equal, (run.state.disc_params, run.state.disc_opt_state), first)


def test_discriminators_learn_as_often_as_asked():
    run = new_run("balanced")
    history, changed = [], []
    for seed in range(40):
        before = jax.device_get(run.state.disc_params)
        history += run.train([toy.make_batch(seed)])
        changed.append(not np.array_equal(before["kernel"], run.state.disc_params["kernel"]))
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(KEY), step), 3)[1] for step in range(40)]
    assert changed == [bool(jax.random.uniform(key) < 0.5) for key in keys]
    assert [m["discriminator_learns"] for m in history] == changed
    assert [m["disc_grad_norm"] > 0 for m in history] == changed
    assert all(m["discriminator_loss"] > 0 for m in history)
    assert 12 <= sum(changed) <= 28


def test_every_mesh_gives_the_same_run():
    batches = [toy.make_batch(seed) for seed in range(4)]
    single = new_run("balanced")
    expected = single.train(batches)
    for run in (new_run("balanced", 8), new_run(*SHARDED)):
        for metrics, one in zip(run.train(batches), expected, strict=True):
            assert metrics == pytest.approx(one, rel=1e-5, abs=1e-6), run.mesh
        assert jax.tree.map(lambda x: x.sharding, run.state) == run.shardings
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run.state, single.state)


def test_state_is_born_sharded():
    run = new_run(*SHARDED)
    split = PartitionSpec(None, "fsdp")
    adam, disc_adam = run.state.opt_state[0], run.state.disc_opt_state[0]
    trees = [(run.state.params, adam.mu, adam.nu, run.state.ema_params), (run.state.disc_params, disc_adam.mu)]
    for name, alike in zip(("encoder", "kernel"), trees, strict=True):
        assert {tree[name].sharding.spec for tree in alike} == {split}
    assert run.state.codebooks.sums.sharding.is_fully_replicated
    assert run.state.eval_params is run.state.ema_params
    assert run.state.replace(ema_params=None).eval_params is run.state.params


def test_overfits_one_batch_compiling_once():
    run, batch = new_run("plain"), toy.make_batch(rows=toy.ROWS)
    first = run.state
    history = run.train([batch] * 200)
    assert history[-1]["l2"] < 0.1 * history[0]["l2"]
    assert history[-1]["l1"] < 0.4 * history[0]["l1"]
    assert history[-1]["perplexity/0"] > 3
    assert len(run.traces) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


def test_eval_step_reads_the_generator():
    run = new_run("balanced")

    def loss_fn(params, batch, key):
        assert key is None
        made = toy.generate(params, batch, jax.random.key(0))
        return jnp.sum(jnp.abs(made.target - made.reconstruction)), {"weight": jnp.float32(made.target.size)}

    evaluate = make_eval_step(loss_fn, shardings=run.shardings, batch_sharding=run.batch_sharding)
    with sharding.use(run.mesh, run.rules):
        sums = evaluate(run.state.eval_params, run.put(toy.make_batch()))
    made = toy.generate(run.state.params, toy.make_batch(), jax.random.key(0))
    assert float(sums["loss"] / sums["weight"]) == pytest.approx(float(toy.l1(made.target, made.reconstruction)))


def batches_from(broken):
    def example(index):
        return {"waveform": toy.make_batch(index, rows=1)["waveform"][0] * (np.nan if index == broken else 1)}

    return iter(grain.MapDataset.range(40).seed(0).shuffle().repeat().map(example).batch(8).to_iter_dataset())


def train_in(workdir, num_steps, broken=None):
    run = new_run(*SHARDED)
    with (
        sharding.use(run.mesh, run.rules),
        Checkpointer(workdir / "checkpoints", config={}) as checkpointer,
        MetricsWriter(workdir, checkpointer.latest_step or 0) as writer,
    ):
        return train_loop(
            run.state,
            run.step,
            batches_from(broken),
            jax.random.key(KEY),
            num_steps=num_steps,
            workdir=workdir,
            checkpointer=checkpointer,
            writer=writer,
            put=run.put,
            log_every=1,
        )


def test_resuming_reproduces_the_run_bit_for_bit(tmp_path):
    train_in(tmp_path / "resumed", 3)
    resumed = train_in(tmp_path / "resumed", 6)
    whole = train_in(tmp_path / "whole", 6)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("resumed", "whole")]
    assert lines[0] == lines[1]
    assert "train/share/feature" in json.loads(lines[0].splitlines()[-1])


def test_a_step_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"step \d gave .*'loss': nan"):
        train_in(tmp_path, 6, broken=3)


def test_errors():
    with pytest.raises(ValueError, match=r"losses and weights must have the same names, got .*'l2'\] and \['l1'\]"):
        toy.make_losses(weights={"l1": 1.0})
    with pytest.raises(ValueError, match=r"disc_probability must be in \(0, 1\], got 0.0"):
        Run(disc_probability=0.0)
    run = Run(8)
    wiring = {"shardings": run.shardings, "batch_sharding": run.batch_sharding}
    make = functools.partial(make_adversarial_step, toy.generate, toy.discriminate, toy.make_losses())
    with pytest.raises(ValueError, match="ema_decay=0.9 with no ema_params in the state"):
        make(optax.sgd(0.1), optax.sgd(0.1), ema_decay=0.9, **wiring)
    with pytest.raises(ValueError, match=r"penalties and weights must have the same names, got \['commitment'\] and"):
        Run(losses=toy.make_losses(penalty_weights={"commit": 1.0})).train([toy.make_batch()])
    with pytest.raises(RuntimeError, match="within sharding.use"):
        run.step(run.state, run.put(toy.make_batch()), jax.random.key(KEY))
    rules = {name: axes for name, axes in sharding.DATA.items() if name != "conv"}
    with pytest.raises(sharding.ShardingError, match="params/decoder: unknown logical axis 'conv'"):
        init_adversarial_state(
            toy.init_params,
            toy.init_disc_params,
            toy.make_losses(),
            optax.sgd(0.1),
            optax.sgd(0.1),
            jax.random.key(0),
            run.mesh,
            rules,
        )
