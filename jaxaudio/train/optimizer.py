"""Optimizers and learning-rate schedules, from one frozen config."""

import dataclasses
import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import optax.contrib


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam, AdamW or Muon with global-norm clipping and a schedule.

    Args:
      name: "adamw" adds `weight_decay` times the parameter to the update, except for biases and norm scales. "muon" is
        for nets of convolutions over time: the kernels (K, I, O) with several channels on both sides take steps of one
        size in all directions (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with the scale 0.2 of
        Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2), all other parameters Adam's with Nesterov.
      learning_rate: the peak, reached after the warm-up; for "noam" the factor c of its formula.
      schedule: what follows the linear warm-up, see `make_schedule`.
      warmup_steps: updates until the peak; 0 starts at the peak.
      num_steps: update at which "cosine", "linear" and "exponential" reach their end.
      final_fraction: their end, as a fraction of the peak.
      hidden_dim: the model width in the formula of "noam".
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      epsilon: added to the root of the mean of squares.
      weight_decay: only with "adamw".
      clip_norm: gradients with a larger global norm are scaled down to it; None leaves them.
      frozen: regular expressions; a parameter in whose path one is found stays as it is, bit for bit, and has no state.
    Raises:
      ValueError: a field that the schedule or optimizer needs is missing, or one that it would ignore is set.
    """

    name: Literal["adam", "adamw", "muon"] = "adam"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear", "exponential", "rsqrt", "noam"] = "constant"
    warmup_steps: int = 0
    num_steps: int | None = None
    final_fraction: float = 0.0
    hidden_dim: int | None = None
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        decays = self.schedule in ("cosine", "linear", "exponential")
        if decays and (self.num_steps is None or self.num_steps <= self.warmup_steps):
            raise ValueError(
                f"schedule {self.schedule!r} needs num_steps > warmup_steps ({self.warmup_steps}), got {self.num_steps}"
            )
        if not decays and (self.num_steps is not None or self.final_fraction):
            raise ValueError(
                f"num_steps={self.num_steps} and final_fraction={self.final_fraction} are for schedules 'cosine',"
                f" 'linear' and 'exponential'; with {self.schedule!r} leave them None and 0.0"
            )
        if self.schedule == "exponential" and not self.final_fraction > 0:
            raise ValueError(f"schedule 'exponential' needs final_fraction > 0, got {self.final_fraction}")
        if (self.schedule == "noam") != (self.hidden_dim is not None):
            raise ValueError(f"hidden_dim is for schedule 'noam' alone, got {self.hidden_dim} with {self.schedule!r}")
        if self.warmup_steps < (self.schedule in ("rsqrt", "noam")):
            raise ValueError(f"schedule {self.schedule!r} cannot have warmup_steps={self.warmup_steps}")
        if self.weight_decay and self.name != "adamw":
            raise ValueError(f"weight_decay={self.weight_decay} is for optimizer 'adamw', got {self.name!r}")


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of an update, given how many updates came before it.

    With s the update counted from 1, w warmup_steps, lr learning_rate and p = (s - w) / (num_steps - w) within [0, 1]:

      all          lr * min(1, s / w) * decay
      constant     decay = 1
      linear       decay = 1 - (1 - final_fraction) p
      cosine       decay = final_fraction + (1 - final_fraction) (1 + cos(pi p)) / 2
      exponential  decay = final_fraction ** p; a factor g for each update is final_fraction = g ** (num_steps - w)
      rsqrt        decay = sqrt(w / max(s, w))
      noam         decay = 1 / sqrt(max(s, w) * hidden_dim); tensor2tensor's, whose `transformer_base` has lr = 2,
                   and whose older "learning_rate = 0.1" is lr = 1 here
    """

    def schedule(count: Any) -> jax.Array:
        step = jnp.asarray(count, jnp.float32) + 1
        warmup = max(config.warmup_steps, 1)
        past = jnp.maximum(step, warmup)
        if config.schedule in ("linear", "cosine", "exponential"):
            progress = jnp.clip((step - config.warmup_steps) / (config.num_steps - config.warmup_steps), 0, 1)
            left = 1 - progress if config.schedule == "linear" else (1 + jnp.cos(jnp.pi * progress)) / 2
            decay = config.final_fraction + (1 - config.final_fraction) * left
            if config.schedule == "exponential":
                decay = config.final_fraction**progress
        elif config.schedule == "rsqrt":
            decay = jnp.sqrt(warmup / past)
        elif config.schedule == "noam":
            decay = 1 / jnp.sqrt(past * config.hidden_dim)
        else:
            decay = 1
        return config.learning_rate * jnp.minimum(1, step / warmup) * decay

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, Adam (Kingma & Ba 2015, algorithm 1) or Muon, decoupled weight decay, learning rate.

    The state's layout depends on no option but `frozen` and "muon", so a checkpoint fits a run that changes the others.

    Raises:
      ValueError: when its state is made, if an expression of `frozen` is found in no parameter's path.
    """
    identity = optax.identity()
    clip = identity if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    if config.name == "muon":
        optimizer = optax.chain(clip, _muon(config))
    else:
        optimizer = optax.chain(
            clip,
            optax.scale_by_adam(config.b1, config.b2, config.epsilon),
            optax.add_decayed_weights(config.weight_decay, mask=_decayed) if config.weight_decay else identity,
            optax.scale_by_learning_rate(make_schedule(config)),
        )
    if not config.frozen:
        return optimizer
    transforms = {"trained": optimizer, "frozen": optax.set_to_zero()}
    return optax.multi_transform(transforms, lambda params: _labels(params, config.frozen))


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    def matrices(params: Any) -> Any:
        def axes(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
            is_kernel = "kernel" in jax.tree_util.keystr(path) and leaf.ndim == 3 and min(leaf.shape[1:]) > 1
            return optax.contrib.MuonDimensionNumbers((0, 1), 2) if is_kernel else None

        return jax.tree_util.tree_map_with_path(axes, params)

    return optax.contrib.muon(
        make_schedule(config),
        consistent_rms=0.2,
        eps=config.epsilon,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=matrices,
    )


def _labels(params: Any, frozen: tuple[str, ...]) -> Any:
    """ "trained" or "frozen" for each parameter, a box counted whole."""
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    for expression in frozen:
        if not any(re.search(expression, path) for path in paths):
            raise ValueError(f"frozen: {expression!r} is in no parameter's path, such as {', '.join(paths[:5])}")
    labels = ["frozen" if any(re.search(expression, path) for expression in frozen) else "trained" for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_box), labels)


def _decayed(params: Any) -> Any:
    """True for every parameter but biases and norm scales, by name: a stacked bias has two dimensions like a kernel."""

    def is_decayed(path: tuple, _: Any) -> bool:
        return not {"bias", "scale"} & set(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))

    return jax.tree_util.tree_map_with_path(is_decayed, params)
