"""A codec of one matrix each way, two codebooks between them, and a discriminator of two layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxaudio.ops.codebook_ema import CodebookConfig, init_codebooks, update_codebooks
from jaxaudio.train.adversarial import AdversarialLosses, Generated

Q, C, E, T, HOP, ROWS = 2, 8, 4, 6, 4, 16
CODEBOOKS = CodebookConfig(decay=0.9, kmeans_iterations=2, dead_usage=0.1, dead_is_relative=True)


def init_params(key):
    encoder_key, decoder_key = jax.random.split(key)
    kernel = functools.partial(nn.with_logical_partitioning, nn.initializers.normal(0.5))
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None, "codebook", "codebook_dim"))
    return {
        "encoder": kernel(("conv", "embed"))(encoder_key, (HOP, E)),
        "quantizer": {"codebooks": zeros(None, (Q, C, E))},
        "decoder": kernel(("embed", "conv"))(decoder_key, (E, HOP)),
    }


def init_disc_params(key):
    key, head_key = jax.random.split(key)
    return {
        "kernel": nn.with_logical_partitioning(nn.initializers.normal(0.5), ("conv", "embed"))(key, (2 * HOP, 8)),
        "head": nn.with_logical_partitioning(nn.initializers.normal(0.5), ("embed",))(head_key, (8,)),
    }


def generate(params, batch, key):
    x = batch["waveform"]
    z = jnp.tanh(x.reshape(-1, T, HOP) @ params["encoder"])
    num_levels = jax.random.randint(key, (len(x),), 1, Q + 1)
    mask = jnp.arange(Q)[None] < num_levels[:, None]
    residual, quantized, commitment, codes, residuals = z, 0.0, 0.0, [], []
    for level, codebook in enumerate(params["quantizer"]["codebooks"]):
        distances = jnp.sum(jnp.square(residual[:, :, None] - codebook[None, None]), axis=-1)
        codes.append(jnp.argmin(distances, axis=-1))
        chosen = jnp.where(mask[:, level, None, None], jax.lax.stop_gradient(codebook)[codes[-1]], 0.0)
        commitment += jnp.mean(jnp.square(residual - chosen) * mask[:, level, None, None])
        residuals.append(residual)
        residual, quantized = residual - chosen, quantized + chosen
    z = z + jax.lax.stop_gradient(quantized - z)
    learned = jax.lax.stop_gradient((jnp.stack(residuals), jnp.stack(codes, 1).astype(jnp.int32), mask))
    return Generated(x, (z @ params["decoder"]).reshape(x.shape), {"commitment": commitment}, learned)


def discriminate(disc_params, x):
    features = nn.leaky_relu(x.reshape(len(x), -1, 2 * HOP) @ disc_params["kernel"])
    return [(features @ disc_params["head"], [features])]


def update(params, state, quantized, key):
    state, codebooks, metrics = update_codebooks(state, *quantized, key, CODEBOOKS)
    return params | {"quantizer": {"codebooks": codebooks}}, state, metrics


def start_codebooks(params):
    return init_codebooks(params["quantizer"]["codebooks"])


def l1(target, x):
    return jnp.mean(jnp.abs(target - x))


def generator_hinge(real, fake):
    return sum(jnp.mean(nn.relu(1 - logits)) for logits, _ in fake)


def feature_distance(real, fake):
    return sum(l1(maps[0], others[0]) for (_, maps), (_, others) in zip(real, fake, strict=True))


def discriminator_hinge(real, fake):
    return sum(
        jnp.mean(nn.relu(1 - logits)) + jnp.mean(nn.relu(1 + others))
        for (logits, _), (others, _) in zip(real, fake, strict=True)
    )


def make_losses(**options):
    return AdversarialLosses(
        **{
            "reconstruction": {"l1": l1, "l2": lambda target, x: jnp.mean(jnp.square(target - x))},
            "adversarial": {"adversarial": generator_hinge, "feature": feature_distance},
            "discriminator": discriminator_hinge,
            "weights": {"l1": 0.5, "l2": 2.0, "adversarial": 0.2, "feature": 0.3},
            "penalty_weights": {"commitment": 0.25},
            "rescale": False,
        }
        | options
    )


def make_batch(seed=0, rows=ROWS):
    phase = np.random.default_rng(seed).uniform(0, 2 * np.pi, (rows, 1))
    return {"waveform": np.sin(phase + np.arange(T * HOP) * 0.7).astype(np.float32)}
