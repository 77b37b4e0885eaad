"""Adversarial and feature losses equal torch's own losses, assembled as the papers and public codes do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxaudio.ops.adversarial_losses import (
    feature_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    least_squares_discriminator_loss,
    least_squares_generator_loss,
)

RNG = np.random.default_rng(0)
SHAPES = [((2, 7), [(2, 9, 3), (2, 5, 4)]), ((2, 4, 3, 1), [(2, 4, 6, 2), (2, 4, 3, 2), (2, 4, 3, 5)])]


def outputs():
    return [
        (RNG.standard_normal(shape).astype(np.float32), [RNG.standard_normal(s).astype(np.float32) for s in maps])
        for shape, maps in SHAPES
    ]


REAL, FAKE = outputs(), outputs()


def ours(outputs):
    return jax.tree.map(jnp.asarray, outputs)


def logits(outputs):
    return [torch.from_numpy(logits) for logits, _ in outputs]


def close(value, expected):
    np.testing.assert_allclose(value, float(expected), rtol=1e-5)


def test_hinge_losses():
    expected = sum(
        functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
        for real, fake in zip(logits(REAL), logits(FAKE), strict=True)
    )
    close(hinge_discriminator_loss(ours(REAL), ours(FAKE)), expected / 2)
    close(hinge_generator_loss(ours(FAKE)), sum(functional.relu(1 - fake).mean() for fake in logits(FAKE)) / 2)
    close(hinge_generator_loss(ours(FAKE), form="linear"), -sum(fake.mean() for fake in logits(FAKE)) / 2)


def test_hinge_by_hand():
    real, fake = [(jnp.array([[3.0, 0.5]]), [])], [(jnp.array([[-3.0, 0.5]]), [])]
    assert hinge_discriminator_loss(real, fake) == 0.25 + 0.75
    assert hinge_generator_loss(fake) == (4 + 0.5) / 2
    assert hinge_generator_loss(fake, form="linear") == 1.25


def test_least_squares_losses_are_sums():
    real, fake = logits(REAL), logits(FAKE)
    expected = sum(functional.mse_loss(x, torch.ones_like(x)) for x in real)
    expected += sum(functional.mse_loss(x, torch.zeros_like(x)) for x in fake)
    close(least_squares_discriminator_loss(ours(REAL), ours(FAKE)), expected)
    close(least_squares_generator_loss(ours(FAKE)), sum(functional.mse_loss(x, torch.ones_like(x)) for x in fake))


@pytest.mark.parametrize("form", ["mean", "relative", "sum"])
def test_feature_losses(form):
    networks = []
    for (_, real_maps), (_, fake_maps) in zip(REAL, FAKE, strict=True):
        maps = []
        for real, fake in zip(real_maps, fake_maps, strict=True):
            difference = functional.l1_loss(torch.from_numpy(fake), torch.from_numpy(real))
            maps.append(difference / (np.abs(real).mean() if form == "relative" else 1))
        networks.append(sum(maps) if form == "sum" else sum(maps) / len(maps))
    expected = sum(networks) / (1 if form == "sum" else 2)
    close(feature_loss(ours(REAL), ours(FAKE), form=form), expected)


def test_the_recordings_features_get_no_gradient():
    def loss(real):
        return feature_loss(real, ours(FAKE), form="relative")

    gradients = jax.grad(loss)(ours(REAL))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_other_networks_than_the_recordings_are_refused():
    with pytest.raises(ValueError, match=r"\[\[2, 3\], \[2\]\]"):
        feature_loss(ours(REAL), ours(FAKE)[:1])
