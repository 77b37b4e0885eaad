"""Losses as sums with their weights, so that averages over microbatches and devices are exact."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*B T V"], targets: Int[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of -ln p(target) in nats over the kept positions, and how many they are. Computed in float32.

    Args:
      logits: unnormalised scores.
      targets: ids below V, already shifted (the model never shifts).
      mask: True where the position counts.
    Returns:
      (sum of nats, number of kept positions); their ratio is nats per token.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(mask, nats, 0.0)), jnp.sum(mask.astype(jnp.float32))
