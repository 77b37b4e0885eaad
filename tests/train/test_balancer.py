"""The balancer equals its equation over many steps, and a balanced step equals autodiff of the losses it amounts to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxaudio.train.balancer import balance, init_balancer

WEIGHTS = {"time": 0.1, "mel": 1.0, "adversarial": 3.0, "feature": 3.0}


def weighted_history(norms, decay):
    """The average of all steps so far, each step back weighing `decay` times less."""
    factors = decay ** np.arange(len(norms) - 1, -1, -1)
    return float(np.dot(factors, norms) / factors.sum())


@pytest.mark.parametrize("options", [{}, {"total_norm": 2.5, "decay": 0.9}, {"rescale": False}])
def test_twenty_steps_equal_torchs_gradients_over_their_history(options):
    total_norm, decay = options.get("total_norm", 1.0), options.get("decay", 0.999)
    step_fn = jax.jit(lambda gradients, state: balance(gradients, state, WEIGHTS, **options))
    state, history = init_balancer(WEIGHTS), {name: [] for name in WEIGHTS}
    rng = np.random.default_rng(0)
    for step in range(20):
        slopes = {
            name: torch.from_numpy(scale * (1 + step) * rng.standard_normal((3, 50, 2)))
            for name, scale in zip(WEIGHTS, (1e-3, 5.0, 0.2, 1e2), strict=True)
        }
        expected = 0
        for name, slope in slopes.items():
            x = torch.zeros(3, 50, 2, dtype=torch.float64, requires_grad=True)
            (gradient,) = torch.autograd.grad((slope * x).sum(), x)
            history[name].append(float(gradient.norm(dim=(1, 2)).mean()))
            scale = total_norm * WEIGHTS[name] / 7.1 / weighted_history(history[name], decay)
            expected = expected + (scale if options.get("rescale", True) else WEIGHTS[name]) * gradient
        balanced = step_fn({name: jnp.asarray(slope, jnp.float32) for name, slope in slopes.items()}, state)
        state = balanced.state
        np.testing.assert_allclose(balanced.gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        for name, norm in balanced.norms.items():
            np.testing.assert_allclose(norm, weighted_history(history[name], decay), rtol=1e-5)


def test_one_step_by_hand():
    # Rows of norms 5 and 0 average to 2.5, those of 1 and 1 to 1; the weights are in the ratio 1 : 3.
    gradients = {"a": jnp.array([[3.0, 4.0], [0.0, 0.0]]), "b": jnp.array([[0.0, 1.0], [-1.0, 0.0]])}
    balanced = balance(gradients, init_balancer({"a": 1.0, "b": 3.0}), {"a": 1.0, "b": 3.0})
    np.testing.assert_allclose(balanced.gradient, [[0.3, 0.4 + 0.75], [-0.75, 0.0]], rtol=1e-6)
    assert {name: float(norm) for name, norm in balanced.norms.items()} == {"a": 2.5, "b": 1.0}
    np.testing.assert_allclose([balanced.shares["a"], balanced.shares["b"]], [0.25, 0.75], rtol=1e-6)


def test_the_parameters_gradient_is_that_of_the_rescaled_losses():
    key = jax.random.key(0)
    params = {"w": jax.random.normal(jax.random.fold_in(key, 0), (6, 8)), "b": jnp.ones(8)}
    inputs, target = (jax.random.normal(jax.random.fold_in(key, i), (4, n)) for i, n in ((1, 6), (2, 8)))

    def generate(params):
        reconstruction = jnp.tanh(inputs @ params["w"] + params["b"][None])
        return reconstruction, jnp.sum(params["w"] ** 2)  # the latter stands for a commitment loss

    def losses(x):
        hidden = jnp.sin(x @ jnp.ones((8, 3)))
        return {"l1": jnp.mean(jnp.abs(x - target)), "a": jnp.mean(hidden), "b": 7 * jnp.mean(hidden**2)}

    weights = {"l1": 0.1, "a": 2.0, "b": 1.0}

    @jax.jit
    def step(params):
        (reconstruction, commitment), pull_back = jax.vjp(generate, params)
        gradients = {name: jax.grad(lambda x, name=name: losses(x)[name])(reconstruction) for name in weights}
        balanced = balance(gradients, init_balancer(weights), weights)
        return balanced, pull_back((balanced.gradient, jnp.full_like(commitment, 0.25)))[0]

    balanced, ours = step(params)

    def total(params):
        reconstruction, commitment = generate(params)
        factors = {name: weights[name] / 3.1 / balanced.norms[name] for name in weights}
        return sum(factors[name] * value for name, value in losses(reconstruction).items()) + 0.25 * commitment

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, jax.grad(total)(params))


def test_the_batch_is_global_on_a_mesh():
    rows = jax.random.normal(jax.random.key(3), (8, 10))
    gradients, weights = {"a": rows, "b": rows**2}, {"a": 1.0, "b": 2.0}
    alone = balance(gradients, init_balancer(weights), weights)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(gradients, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    over_mesh = jax.jit(lambda gradients: balance(gradients, init_balancer(weights), weights))(spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), over_mesh, alone)


def test_names_and_weights_that_do_not_fit_are_refused():
    gradients = {"mel": jnp.ones((1, 2))}
    with pytest.raises(ValueError, match=r"weights of \['mel', 'time'\]"):
        balance(gradients, init_balancer({"mel": 1.0}), {"mel": 1.0, "time": 1.0})
    with pytest.raises(ValueError, match=r"a state of \['time'\]"):
        balance(gradients, init_balancer({"time": 1.0}), {"mel": 1.0})
    with pytest.raises(ValueError, match=r"positive number, got \{'mel': 0.0\}"):
        balance(gradients, init_balancer({"mel": 1.0}), {"mel": 0.0})
