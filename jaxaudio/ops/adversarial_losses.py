"""Losses between recordings and reconstructions as discriminators judge them: hinge, least squares and features.

`real` and `fake` are what `nn.discriminators.Discriminators` returns for recordings and for reconstructions: one
(logits, feature_maps) for each sub-discriminator. Every inner average is over a whole array, rows included, so crops
should be equally long; nothing is masked. Losses of microbatches of equal size average to the loss of the batch.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Outputs = Sequence[tuple[Any, Sequence[Any]]]


def hinge_discriminator_loss(real: Outputs, fake: Outputs) -> Float[Array, ""]:
    """Mean over sub-discriminators of mean(max(0, 1 - D(x))) + mean(max(0, 1 + D(x^))).

    SoundStream equation 2, EnCodec section 3.4.
    """
    return _mean([_hinge(logits) for logits, _ in real]) + _mean([_hinge(-logits) for logits, _ in fake])


def hinge_generator_loss(fake: Outputs, *, form: Literal["hinge", "linear"] = "hinge") -> Float[Array, ""]:
    """Mean over sub-discriminators of the mean of what the generator makes small.

    Args:
      fake: of reconstructions.
      form: "hinge", max(0, 1 - D(x^)), as the papers print (SoundStream equation 3, EnCodec section 3.4); or "linear",
        -D(x^), which audiocraft trains with.
    """
    return _mean([_hinge(logits) if form == "hinge" else -jnp.mean(logits) for logits, _ in fake])


def least_squares_discriminator_loss(real: Outputs, fake: Outputs) -> Float[Array, ""]:
    """Sum over sub-discriminators of mean((1 - D(x))^2) + mean(D(x^)^2): DAC's code, where its paper says hinge."""
    return sum(jnp.mean((1 - logits) ** 2) for logits, _ in real) + sum(jnp.mean(logits**2) for logits, _ in fake)


def least_squares_generator_loss(fake: Outputs) -> Float[Array, ""]:
    """Sum over sub-discriminators of mean((1 - D(x^))^2): DAC's code."""
    return sum(jnp.mean((1 - logits) ** 2) for logits, _ in fake)


def feature_loss(
    real: Outputs, fake: Outputs, *, form: Literal["mean", "relative", "sum"] = "mean"
) -> Float[Array, ""]:
    """Mean absolute difference of the feature maps; the recording's are constants.

    Args:
      real, fake: of recordings and of their reconstructions.
      form: "mean" over the maps of a sub-discriminator and then over these (SoundStream equation 4, audiocraft);
        "relative", the same with each difference divided by the map's mean absolute value for the recording (EnCodec
        equation 2); or "sum" over all maps (DAC's code).
    Raises:
      ValueError: the numbers of sub-discriminators or of their feature maps differ; the message carries them.
    """
    counts = [[len(maps) for _, maps in outputs] for outputs in (real, fake)]
    if counts[0] != counts[1]:
        raise ValueError(f"expected the same feature maps of recordings and reconstructions, got {counts} of them")
    networks = [
        [_difference(ours, theirs, form == "relative") for theirs, ours in zip(real_maps, fake_maps, strict=True)]
        for (_, real_maps), (_, fake_maps) in zip(real, fake, strict=True)
    ]
    if form == "sum":
        return sum(sum(differences) for differences in networks)
    return _mean([_mean(differences) for differences in networks])


def _hinge(logits: jax.Array) -> jax.Array:
    return jnp.mean(jnp.maximum(0, 1 - logits))


def _difference(fake: jax.Array, real: jax.Array, relative: bool) -> jax.Array:
    real = jax.lax.stop_gradient(real)
    difference = jnp.mean(jnp.abs(fake - real))
    return difference / jnp.mean(jnp.abs(real)) if relative else difference


def _mean(values: Sequence[jax.Array]) -> jax.Array:
    return sum(values) / len(values)
