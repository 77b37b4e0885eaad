"""The loss balancer of EnCodec: each loss pulls on the reconstruction as strongly as its weight says.

Défossez et al. 2022, https://arxiv.org/abs/2210.13438, section 3.4, equation 5. Used in a generator's step:

    reconstruction, pull_back = jax.vjp(generate, params)
    gradients = {name: jax.grad(loss)(reconstruction) for name, loss in losses.items()}
    balanced = balance(gradients, state, weights)
    (parameter_gradients,) = pull_back(balanced.gradient)

Losses that do not act through the reconstruction (commitment) stay outside: let `generate` return them beside it, and
hand their weights to `pull_back` beside the balanced gradient.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class BalancerState(NamedTuple):
    """Running averages of the gradient norms: decayed sums, and the decayed number of steps that they are of."""

    norm_sums: dict[str, Array]
    count: Array


class Balanced(NamedTuple):
    """What a step of the balancer gives.

    Attributes:
      gradient: with respect to the reconstruction, to be pulled back through the generator.
      state: for the next step.
      shares: of each loss in `gradient`, by norm and before they cancel each other; they sum to 1. On average a share
        is the loss's weight over the sum of the weights, when the balancer rescales.
      norms: running average of each loss's own gradient norm: what a share would follow without rescaling.
    """

    gradient: Array
    state: BalancerState
    shares: dict[str, Array]
    norms: dict[str, Array]


def init_balancer(weights: Mapping[str, float]) -> BalancerState:
    """The state before the first step, for the losses that `weights` names."""
    return BalancerState({name: jnp.zeros(()) for name in weights}, jnp.zeros(()))


def balance(
    gradients: Mapping[str, Float[Array, "B *rest"]],
    state: BalancerState,
    weights: Mapping[str, float],
    *,
    decay: float = 0.999,
    total_norm: float = 1.0,
    epsilon: float = 1e-12,
    rescale: bool = True,
) -> Balanced:
    """Sum over losses i of total_norm * w_i / sum(w) * g_i / average(|g_i|), for gradients of the reconstruction.

    |g_i| is the L2 norm of each row, averaged over the batch, and over steps with a decay whose start is corrected for.
    On a mesh the batch is the global one.

    Args:
      gradients: of each loss with respect to the reconstruction.
      state: from the step before, or `init_balancer`.
      weights: of each loss.
      decay: of the running average.
      total_norm: R of the paper.
      epsilon: added to each average norm.
      rescale: False gives the plain sum of w_i g_i, with the shares and norms still measured.
    Raises:
      ValueError: gradients, weights and state do not name the same losses, or the weights do not sum to a positive
        number; the message carries them.
    """
    if not gradients.keys() == weights.keys() == state.norm_sums.keys():
        raise ValueError(
            f"the balancer needs the same losses everywhere, got gradients of {sorted(gradients)}, "
            f"weights of {sorted(weights)} and a state of {sorted(state.norm_sums)}"
        )
    total_weight = sum(weights.values())
    if not total_weight > 0:
        raise ValueError(f"the balancer's weights must sum to a positive number, got {dict(weights)}")
    norms_now = {name: jnp.mean(_row_norms(gradient)) for name, gradient in gradients.items()}
    count = decay * state.count + 1
    norm_sums = {name: decay * state.norm_sums[name] + norm for name, norm in norms_now.items()}
    norms = {name: norm_sum / count for name, norm_sum in norm_sums.items()}
    scales = {
        name: total_norm * weight / total_weight / (epsilon + norms[name]) if rescale else jnp.asarray(weight)
        for name, weight in weights.items()
    }
    gradient = sum(scales[name] * gradients[name] for name in gradients)
    pulls = {name: scales[name] * norm for name, norm in norms_now.items()}
    total_pull = sum(pulls.values()) + epsilon
    shares = {name: pull / total_pull for name, pull in pulls.items()}
    return Balanced(gradient, BalancerState(norm_sums, count), shares, norms)


def _row_norms(gradient: Array) -> Array:
    rows = gradient.astype(jnp.float32).reshape(gradient.shape[0], -1)
    return jnp.sqrt(jnp.sum(rows**2, axis=-1))
