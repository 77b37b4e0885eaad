import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule


@pytest.mark.parametrize(("hidden_dim", "peak"), [(256, 6.99e-4), (384, 5.71e-4), (512, 4.94e-4)])
def test_noam_peaks_at_tensor2tensor_values(hidden_dim, peak):
    config = OptimizerConfig(schedule="noam", learning_rate=1.0, warmup_steps=8000, hidden_dim=hidden_dim)
    schedule = make_schedule(config)
    # Update 8000 is the one with 7999 before it.
    assert float(schedule(7999)) == pytest.approx(peak, abs=5e-7)
    assert float(schedule(7998)) < float(schedule(7999)) > float(schedule(8000))
    assert float(schedule(0)) == pytest.approx(8000**-1.5 * hidden_dim**-0.5, rel=1e-5)
    assert float(schedule(31999)) == pytest.approx(32000**-0.5 * hidden_dim**-0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # The learning rates of updates 1 to 6, by hand.
        (OptimizerConfig(learning_rate=2.0), [2, 2, 2, 2, 2, 2]),
        (OptimizerConfig(learning_rate=2.0, warmup_steps=4), [0.5, 1, 1.5, 2, 2, 2]),
        (
            OptimizerConfig(learning_rate=2.0, schedule="linear", warmup_steps=1, num_steps=5, final_fraction=0.5),
            [2, 1.75, 1.5, 1.25, 1, 1],
        ),
        (
            OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=2, num_steps=6),
            [1, 2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0],
        ),
        (
            OptimizerConfig(learning_rate=2.0, schedule="exponential", num_steps=4, final_fraction=0.9**4),
            [1.8, 1.62, 1.458, 1.3122, 1.3122, 1.3122],
        ),
        (
            OptimizerConfig(learning_rate=2.0, schedule="rsqrt", warmup_steps=2),
            [1, 2, 2 * math.sqrt(2 / 3), math.sqrt(2), 2 * math.sqrt(2 / 5), 2 * math.sqrt(1 / 3)],
        ),
        (
            OptimizerConfig(learning_rate=2.0, schedule="noam", warmup_steps=2, hidden_dim=4),
            [0.5 / math.sqrt(2), 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5, 1 / math.sqrt(5), 1 / math.sqrt(6)],
        ),
    ],
)
def test_schedules_by_hand(config, expected):
    np.testing.assert_allclose(jax.vmap(make_schedule(config))(jnp.arange(6)), expected, atol=1e-6)


def test_adam_by_hand():
    config = OptimizerConfig(learning_rate=0.1, b1=0.8, b2=0.9, epsilon=0.5)
    optimizer = make_optimizer(config)
    params = {"kernel": jnp.array([1.0, -1.0])}
    state = optimizer.init(params)
    mean = square = np.zeros(2)
    for step, grad in enumerate(np.array([[3.0, -4.0], [1.0, 2.0]]), start=1):
        mean = 0.8 * mean + 0.2 * grad
        square = 0.9 * square + 0.1 * grad**2
        expected = -0.1 * (mean / (1 - 0.8**step)) / (np.sqrt(square / (1 - 0.9**step)) + 0.5)
        updates, state = optimizer.update({"kernel": jnp.array(grad, jnp.float32)}, state, params)
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


def test_clipping_scales_all_gradients_together():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    # epsilon far above the gradients makes Adam's first update grad / epsilon.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, epsilon=1e6, clip_norm=1.0))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6e-6, -0.8e-6], rtol=1e-4)
    small, _ = optimizer.update(jax.tree.map(lambda g: g / 10, grads), optimizer.init(params), params)
    np.testing.assert_allclose([small["a"][0], small["b"][0]], [-0.3e-6, -0.4e-6], rtol=1e-4)


def test_weight_decay_leaves_biases_and_scales():
    params = {"dense": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2, 2), 3.0)}, "norm": {"scale": jnp.ones(2)}}
    optimizer = make_optimizer(OptimizerConfig(name="adamw", learning_rate=0.5, weight_decay=0.1))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.5 * 0.1 * 3.0, rtol=1e-6)
    assert not updates["dense"]["bias"].any()
    assert not updates["norm"]["scale"].any()


def test_adamw_equals_optax():
    config = OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
    params = {"kernel": jnp.array([[1.0, -2.0]])}
    ours, theirs = (
        make_optimizer(config),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1)),
    )
    our_state, their_state = ours.init(params), theirs.init(params)
    for grad in ([[3.0, 1.0]], [[0.1, 0.2]]):
        our_updates, our_state = ours.update({"kernel": jnp.array(grad)}, our_state, params)
        their_updates, their_state = theirs.update({"kernel": jnp.array(grad)}, their_state, params)
        np.testing.assert_allclose(our_updates["kernel"], their_updates["kernel"], rtol=1e-6)


def test_muon_by_hand():
    """Kernels of several channels: Newton-Schulz of the momentum (Jordan et al. 2024); others: Adam with Nesterov."""
    rng = np.random.default_rng(0)
    params = {"conv": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones(5)}, "conv_in": {"kernel": jnp.ones((3, 1, 5))}}
    config = OptimizerConfig(name="muon", learning_rate=0.1, b1=0.8, b2=0.9)
    optimizer, adam = make_optimizer(config), optax.adam(0.1, b1=0.8, b2=0.9, nesterov=True)
    state, adam_state = optimizer.init(params), adam.init(params)
    momentum = np.zeros((12, 5))
    for step in range(1, 4):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params)
        grad = np.asarray(grads["conv"]["kernel"], np.float64).reshape(12, 5)
        momentum = 0.95 * momentum + 0.05 * grad
        x = 0.95 * momentum / (1 - 0.95 ** (step + 1)) + 0.05 * grad / (1 - 0.95**step)
        x = x / np.linalg.norm(x)
        for _ in range(5):
            square = x.T @ x
            x = x @ (3.4445 * np.eye(5) - 4.7750 * square + 2.0315 * square @ square)
        updates, state = optimizer.update(grads, state, params)
        others, adam_state = adam.update(grads, adam_state, params)
        np.testing.assert_allclose(updates["conv"]["kernel"].reshape(12, 5), -0.1 * 0.2 * 12**0.5 * x, atol=1e-5)
        np.testing.assert_allclose(updates["conv"]["bias"], others["conv"]["bias"], rtol=1e-5)
        np.testing.assert_allclose(updates["conv_in"]["kernel"], others["conv_in"]["kernel"], rtol=1e-5)


def test_the_state_layout_does_not_depend_on_the_options():
    params = {"kernel": jnp.zeros((2, 2))}
    plain = make_optimizer(OptimizerConfig()).init(params)
    full = make_optimizer(OptimizerConfig(name="adamw", weight_decay=0.1, clip_norm=1.0)).init(params)
    paths = [[jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in (plain, full)]
    assert paths[0] == paths[1]


def test_frozen_parameters_stay_bit_for_bit_and_have_no_state():
    config = OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.1, clip_norm=1.0, frozen=("^base/", "pos"))
    rng = np.random.default_rng(0)
    new = {"kernel": jnp.asarray(rng.standard_normal(3), jnp.float32)}
    base = {"base": {"kernel": jnp.asarray(rng.standard_normal(3), jnp.float32)}, "position": jnp.ones(2)}
    grads = {"kernel": jnp.ones(3)}
    optimizer, alone = make_optimizer(config), make_optimizer(dataclasses.replace(config, frozen=()))
    params = base | {"new": new}
    state, lone_state = optimizer.init(params), alone.init(new)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(leaf.size for leaf in jax.tree.leaves(lone_state))
    # Their gradients do not count in the norm that is clipped, which is why the other update is that of `alone`.
    updates, _ = optimizer.update(
        {"base": base["base"], "position": jnp.ones(2), "new": grads}, state, base | {"new": new}
    )
    lone_updates, _ = alone.update(grads, lone_state, new)
    np.testing.assert_array_equal(updates["new"]["kernel"], lone_updates["kernel"])
    after = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(after["base"]["kernel"], base["base"]["kernel"])
    np.testing.assert_array_equal(after["position"], base["position"])
    with pytest.raises(ValueError, match=r"frozen: 'nothing' is in no parameter's path, such as base/kernel, position"):
        make_optimizer(OptimizerConfig(frozen=("nothing",))).init(base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosine"}, r"'cosine' needs num_steps > warmup_steps \(0\), got None"),
        ({"schedule": "exponential", "num_steps": 5}, r"'exponential' needs final_fraction > 0, got 0.0"),
        ({"schedule": "linear", "warmup_steps": 5, "num_steps": 5}, r"needs num_steps > warmup_steps \(5\), got 5"),
        ({"num_steps": 10}, "num_steps=10 and final_fraction=0.0 are for"),
        ({"schedule": "rsqrt", "warmup_steps": 1, "final_fraction": 0.1}, "final_fraction=0.1 are for .* with 'rsqrt'"),
        ({"schedule": "noam", "warmup_steps": 1}, "hidden_dim is for schedule 'noam' alone, got None with 'noam'"),
        ({"hidden_dim": 256}, "got 256 with 'constant'"),
        ({"schedule": "rsqrt"}, "'rsqrt' cannot have warmup_steps=0"),
        ({"warmup_steps": -1}, "'constant' cannot have warmup_steps=-1"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 is for optimizer 'adamw', got 'adam'"),
    ],
)
def test_options_without_effect_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)
