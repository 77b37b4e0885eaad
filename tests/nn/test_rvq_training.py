import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxaudio.nn.rvq import ResidualVectorQuantizer, RVQConfig
from jaxaudio.ops.codebook_ema import CodebookConfig, init_codebooks, update_codebooks

torch.set_num_threads(1)
Q, C, E, D, B, T = 4, 8, 4, 6, 3, 5
NUM_LEVELS = np.array([1, 4, 2])
STATISTICS = RVQConfig(Q, C, D, D)
SHARED = RVQConfig(Q, C, E, D, projection="shared")
GRADIENT = RVQConfig(Q, C, E, D, projection="per_level", distance="cosine", learned_by="gradient")


@functools.cache
def setup(config):
    """A quantizer, random parameters, latents, and random weights for them as a loss."""
    rng = np.random.default_rng(0)
    z, weights = (jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
    module = ResidualVectorQuantizer(config)
    params = module.init(jax.random.key(0), z, jnp.asarray(NUM_LEVELS))["params"]
    params = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), params)
    return module, params, z, weights


@functools.cache
def gradients(config, quantity):
    """Of the weighted latents, or of a loss of the quantizer, by its parameters and its input."""
    module, params, z, weights = setup(config)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def grad(params, z):
        quantized = module.apply({"params": params}, z, jnp.asarray(NUM_LEVELS))
        return jnp.sum(quantized.latents * weights) if quantity == "latents" else getattr(quantized, quantity)

    return jax.device_get(grad(params, z))


def torch_quantized(config):
    """The training pass by torch's autograd, one level after the other; with the losses of each level (Q, B)."""
    _, params, z, weights = setup(config)
    params = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in params.items()}
    z = torch.tensor(np.asarray(z), requires_grad=True)
    used = torch.arange(Q)[:, None] < torch.tensor(NUM_LEVELS)[None]
    residual = z @ params["in_kernel"] if config is SHARED else z
    total, losses = torch.zeros_like(residual), {"commitment": [], "codebook_loss": []}
    start = residual
    for q in range(Q):
        codebook, inner = params["codebooks"][q], residual
        if config is GRADIENT:
            inner = residual @ params["in_kernel"][q] + params["in_bias"][q]
            similarity = (
                torch.nn.functional.normalize(inner, dim=-1) @ torch.nn.functional.normalize(codebook, dim=-1).T
            )
            vectors = codebook[similarity.argmax(-1)]
        else:
            vectors = codebook[torch.cdist(inner, codebook[None].expand(B, C, -1)).argmin(-1)].detach()
        losses["commitment"].append(((inner - vectors.detach()) ** 2).mean((1, 2)))
        losses["codebook_loss"].append(((vectors - inner.detach()) ** 2).mean((1, 2)))
        out = vectors
        if config is GRADIENT:
            out = (inner + (vectors - inner).detach()) @ params["out_kernel"][q] + params["out_bias"][q]
        total, residual = total + out * used[q, :, None, None], residual - out
    if config is not GRADIENT:
        total = start + (total - start).detach()
    latents = total @ params["out_kernel"] if config is SHARED else total
    losses = {name: torch.stack(values) * used for name, values in losses.items()}
    return params, z, (latents * torch.tensor(np.asarray(weights))).sum(), losses, used


@pytest.mark.parametrize("config", [STATISTICS, SHARED, GRADIENT], ids=["statistics", "shared", "gradient"])
@pytest.mark.parametrize("quantity", ["latents", "commitment", "codebook_loss"])
def test_gradients_equal_torch(config, quantity):
    if quantity == "codebook_loss" and config is not GRADIENT:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients(config, quantity)))
        return
    params, z, latents, losses, used = torch_quantized(config)
    # The public trainers: DAC adds levels up and averages over all rows, EnCodec's averages over what was used.
    count = B if config is GRADIENT else used.sum()
    loss = latents if quantity == "latents" else losses[quantity].sum() / count
    loss.backward()
    found_params, found_z = gradients(config, quantity)
    np.testing.assert_allclose(found_z, np.zeros((B, T, D)) if z.grad is None else z.grad, atol=1e-5)
    for name, value in params.items():
        expected = np.zeros(value.shape) if value.grad is None else value.grad
        np.testing.assert_allclose(found_params[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("config", [STATISTICS, SHARED], ids=["statistics", "shared"])
def test_the_commitment_of_every_level_reaches_the_encoder(config):
    """Where residuals carry gradients, that of the levels behind the first cancels to exactly zero."""
    module, params, z, _ = setup(config)

    @jax.jit
    def of_levels(z):  # each row alone uses one level more
        def loss(z, num_levels):
            quantized = module.apply({"params": params}, z, num_levels)
            return quantized.commitment * jnp.sum(num_levels)

        return jnp.stack([jax.grad(loss)(z, jnp.full(B, levels)) for levels in range(1, Q + 1)])

    sums = np.asarray(of_levels(z))
    for level in range(1, Q):
        alone = sums[level] - sums[level - 1]
        assert np.linalg.norm(alone) > 0.1 * np.linalg.norm(sums[0]), level


def test_every_level_of_dac_is_taught():
    for name, quantities in {
        "codebooks": ("latents", "codebook_loss"),
        "in_kernel": ("latents", "commitment"),
        "out_kernel": ("latents",),
    }.items():
        for quantity in quantities:
            if (name, quantity) == ("codebooks", "latents"):
                continue  # straight through: the codebooks learn from their own loss alone
            norms = np.linalg.norm(gradients(GRADIENT, quantity)[0][name].reshape(Q, -1), axis=1)
            assert np.all(norms > 1e-3), (name, quantity, norms)


def test_straight_through_gradient_is_the_identity():
    _, _, _, weights = setup(STATISTICS)
    params_grad, z_grad = gradients(STATISTICS, "latents")
    np.testing.assert_allclose(z_grad, weights, atol=1e-6)
    assert not np.any(params_grad["codebooks"])


def test_statistics_train_the_quantizer():
    """A quantizer from zeros with rows of 1 to Q levels: levels start one by one, each lowers the error, none dies."""
    module, params, _, _ = setup(STATISTICS)
    config = CodebookConfig(decay=0.8, kmeans_iterations=3, dead_usage=0.1, dead_is_relative=True)
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(3, D))

    @jax.jit
    def step(state, codebooks, z, num_levels, key):
        quantized = module.apply({"params": {"codebooks": codebooks}}, z, num_levels)
        mask = jnp.arange(Q)[None] < num_levels[:, None]
        state, codebooks, metrics = update_codebooks(state, quantized.residuals, quantized.codes, mask, key, config)
        errors = jnp.mean(jnp.square(quantized.residuals), axis=(1, 2, 3))
        return state, codebooks, quantized.codes, metrics | {"errors": errors}

    codebooks = jnp.zeros((Q, C, D))
    state = init_codebooks(codebooks)
    for index in range(30):
        z = jnp.asarray(rng.normal(size=(8, 20, 3)) @ mix, jnp.float32)
        used = codebooks
        num_levels = jnp.asarray(rng.integers(1, Q + 1, 8))
        state, codebooks, codes, metrics = step(state, codebooks, z, num_levels, jax.random.key(index))
    assert np.all(np.diff(metrics["errors"]) < 0)
    assert metrics["errors"][-1] < 0.2 * metrics["errors"][0]
    assert np.all(metrics["dead_codes"] == 0)
    assert np.all(metrics["perplexity"] > 0.7 * C)
    encode = functools.partial(module.apply, {"params": {"codebooks": used}}, method="encode")
    np.testing.assert_array_equal(codes, encode(z, Q))
