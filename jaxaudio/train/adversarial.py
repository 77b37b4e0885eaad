"""One update of a generator and of the discriminators that judge it, blind to the models and to the losses' forms.

A step has two losses and two optimizers. The losses that act on the generator through what it made (distances to the
target, adversarial and feature losses) meet there: the gradient of each with respect to the reconstruction is measured,
weighed by `balancer.balance` and pulled back through the generator at once. Penalties that do not act through the
reconstruction (commitment) join that pull with their own weights. Codebooks that learn without gradients are updated
last, from what the forward pass quantized.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from jaxaudio import sharding
from jaxaudio.train.balancer import BalancerState, balance, init_balancer
from jaxaudio.train.state import InitParams, init_sharded
from jaxaudio.train.step import require_mesh


class Generated(NamedTuple):
    """What an experiment's `generate(params, batch, key)` returns.

    Attributes:
      target: (B, ...) what the reconstruction should be; real to the discriminators.
      reconstruction: (B, ...) float32; fake to them.
      penalties: scalar losses by name that are no functions of the reconstruction.
      quantized: what `update_codebooks` needs, gradients stopped; None without it.
      disc_index: () int32 below `num_discriminators`, the one that judges this batch and learns from it; None where
        there is one for all batches.
    """

    target: Any
    reconstruction: Any
    penalties: Mapping[str, Any]
    quantized: Any = None
    disc_index: Any = None


Generate = Callable[[Any, Any, jax.Array], Generated]
Discriminate = Callable[[Any, Any], Any]  # (disc_params, waveform) -> judgement, such as [(logits, feature maps), ...]
Loss = Callable[[Any, Any], Any]  # of target and reconstruction, or of the judgements of both; () float32
UpdateCodebooks = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class AdversarialLosses:
    """The losses of a step, each a mean over the batch.

    Attributes:
      reconstruction: by name, of (target, reconstruction).
      adversarial: by name, of the judgements of (target, reconstruction): what the generator minimises, and the
        distance of their feature maps.
      discriminator: of the judgements of (target, reconstruction): what the discriminators minimise.
      weights: of each loss in `reconstruction` and `adversarial`.
      penalty_weights: of each of the generator's penalties.
      rescale: True rescales gradients so that the weights are parts of the whole (EnCodec's balancer); False takes the
        weights as factors.
      balancer_decay: of the running averages of gradient norms; less than EnCodec's follows a short training.

    Raises:
      ValueError: a loss without a weight or the other way round; the message names them.
    """

    reconstruction: Mapping[str, Loss]
    adversarial: Mapping[str, Loss]
    discriminator: Loss
    weights: Mapping[str, float]
    penalty_weights: Mapping[str, float]
    rescale: bool
    balancer_decay: float = 0.999

    def __post_init__(self):
        _require_same_names("losses", [*self.reconstruction, *self.adversarial], self.weights)


class AdversarialState(struct.PyTreeNode):
    """What one update reads and writes; a tree of arrays, or of their shapes or shardings.

    step: () int32, the number of updates done.
    params: the generator's parameters, without boxes, its codebooks among them.
    opt_state: the state of their optimizer.
    disc_params: the discriminators' parameters; of several to choose from, stacked along a new first axis.
    disc_opt_state: the state of their optimizer, stacked in the same way.
    balancer: running norms of the losses' gradients.
    codebooks: statistics of codebooks that learn without gradients, or None.
    ema_params: exponential moving average of params, or None.
    """

    step: Any
    params: Any
    opt_state: Any
    disc_params: Any
    disc_opt_state: Any
    balancer: BalancerState
    codebooks: Any = None
    ema_params: Any = None

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate with: the average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def init_adversarial_state(
    init_params: InitParams,
    init_disc_params: InitParams,
    losses: AdversarialLosses,
    optimizer: optax.GradientTransformation,
    disc_optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    rules: sharding.Rules,
    *,
    num_discriminators: int | None = None,
    init_codebooks: Callable[[Any], Any] | None = None,
    ema: bool = False,
) -> tuple[AdversarialState, AdversarialState]:
    """A new state, and the tree of its shardings; the same numbers on every mesh.

    Args:
      init_params: from a key to the generator's parameters with logical axes.
      init_disc_params: the same for the discriminators.
      losses: of the step that will use the state.
      optimizer: of the generator.
      disc_optimizer: of the discriminators.
      key: split here, for the generator and for the discriminators.
      mesh: from `sharding.make_mesh`.
      rules: one of the tables of `sharding`.
      num_discriminators: how many there are of what init_disc_params makes, each with its own key and its own state of
        the optimizer, for `Generated.disc_index` to choose from; None makes one that judges every batch.
      init_codebooks: from the generator's parameters, without boxes, to the statistics of its codebooks.
      ema: whether to keep an average of the generator's parameters; it starts equal to them.
    Raises:
      ShardingError: as `sharding.tree_shardings`, with the path of the parameter.
    """

    def init_disc(key: jax.Array) -> tuple[Any, Any]:
        disc_params = init_disc_params(key)
        return disc_params, disc_optimizer.init(disc_params)

    def build(key: jax.Array) -> AdversarialState:
        params_key, disc_key = jax.random.split(key)
        params = init_params(params_key)
        if num_discriminators is None:
            disc_params, disc_opt_state = init_disc(disc_key)
        else:
            stacked = jax.vmap(init_disc)(jax.random.split(disc_key, num_discriminators))
            disc_params, disc_opt_state = nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: None})
        return AdversarialState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            disc_params=disc_params,
            disc_opt_state=disc_opt_state,
            balancer=init_balancer(losses.weights),
            codebooks=None if init_codebooks is None else init_codebooks(nn.meta.unbox(params)),
            ema_params=params if ema else None,
        )

    return init_sharded(build, key, mesh, rules)


def make_adversarial_step(
    generate: Generate,
    discriminate: Discriminate,
    losses: AdversarialLosses,
    optimizer: optax.GradientTransformation,
    disc_optimizer: optax.GradientTransformation,
    *,
    shardings: AdversarialState,
    batch_sharding: NamedSharding,
    adversarial: bool = True,
    disc_probability: float = 1.0,
    disc_first: bool = True,
    update_codebooks: UpdateCodebooks | None = None,
    ema_decay: float | None = None,
    schedule: optax.Schedule | None = None,
) -> Callable[[AdversarialState, Any, jax.Array], tuple[AdversarialState, dict[str, jax.Array]]]:
    """The compiled `train_step(state, batch, key) -> (state, metrics)`; call it within `sharding.use`.

    The state passed in is donated. Pass the same key at every step: fold_in(key, state.step) is split in three, for
    `generate`, for the choice whether the discriminators learn, and for `update_codebooks`.

    Args:
      generate: (params, batch, key) -> Generated.
      discriminate: (disc_params, waveform) -> judgement, with the parameters of one discriminator of several.
      losses: of the judgements and of the reconstruction.
      optimizer: of the generator, its clipping included.
      disc_optimizer: of the discriminators.
      shardings: of the state, from `init_adversarial_state`.
      batch_sharding: of every array in the batch.
      adversarial: False leaves the discriminators as they are and unasked: their losses are 0.
      disc_probability: that the discriminators learn from a step; 2/3 in EnCodec's section 3.4.
      disc_first: the generator meets the discriminators after their update, as in DAC; else before it.
      update_codebooks: (params, codebook state, quantized, key) -> (params with the new codebooks, state, metrics).
      ema_decay: d in ema = d * ema + (1 - d) * params after each update; needs a state made with ema=True.
      schedule: the generator's; adds "learning_rate" to the metrics.
    Returns:
      train_step. Its metrics are float32 scalars: every loss and penalty by name, "loss" their weighted sum,
      "share/NAME" how much of the pull on the reconstruction is each loss's, "discriminator_loss" by the discriminators
      that the generator met, "discriminator_learns" 1 or 0, "grad_norm" and "disc_grad_norm" before any clipping (the
      latter 0 where they do not learn), "learning_rate", and those of `update_codebooks`, (Q,) values as "NAME/0" ...
    Raises:
      ValueError: disc_probability outside (0, 1], or ema_decay without ema_params in the state or the other way round.
        By train_step, when first called: a penalty without a weight or the other way round.
      RuntimeError: by train_step, on more than one device outside of `sharding.use`.
    """
    if not 0 < disc_probability <= 1:
        raise ValueError(f"disc_probability must be in (0, 1], got {disc_probability}")
    if (ema_decay is None) != (shardings.ema_params is None):
        raise ValueError(f"ema_decay={ema_decay} with {'no ' * (ema_decay is not None)}ema_params in the state")

    def learn_to_discriminate(state: AdversarialState, generated: Generated) -> tuple[Any, Any, jax.Array]:
        choose = functools.partial(_choose, index=generated.disc_index)
        put_back = functools.partial(_put_back, index=generated.disc_index)

        def loss(disc_params: Any) -> jax.Array:
            judge = functools.partial(discriminate, choose(disc_params))
            return losses.discriminator(judge(generated.target), judge(generated.reconstruction))

        grads = choose(jax.lax.with_sharding_constraint(jax.grad(loss)(state.disc_params), shardings.disc_params))
        disc_params = choose(state.disc_params)
        # The others are not in this update: gradients of zero would still move them by their momentum.
        updates, opt_state = disc_optimizer.update(grads, choose(state.disc_opt_state), disc_params)
        disc_params = put_back(state.disc_params, optax.apply_updates(disc_params, updates))
        return disc_params, put_back(state.disc_opt_state, opt_state), optax.tree.norm(grads)

    def maybe_learn(learns: jax.Array, state: AdversarialState, generated: Generated) -> tuple[Any, Any, jax.Array]:
        keep = state.disc_params, state.disc_opt_state, jnp.zeros(())
        if not adversarial:
            return keep
        if disc_probability == 1:
            return learn_to_discriminate(state, generated)
        return jax.lax.cond(learns, lambda: learn_to_discriminate(state, generated), lambda: keep)

    def train_step(state: AdversarialState, batch: Any, key: jax.Array) -> tuple[AdversarialState, dict[str, Any]]:
        require_mesh(batch_sharding)
        generate_key, disc_key, codebook_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        generated, pull_back = _generate(generate, losses, state.params, batch, generate_key)
        learns = adversarial & (jax.random.uniform(disc_key) < disc_probability)
        disc_params, disc_opt_state, disc_grad_norm = maybe_learn(learns, state, generated)
        met = disc_params if disc_first else state.disc_params
        judge = functools.partial(discriminate, _choose(met, generated.disc_index)) if adversarial else None
        gradient, balancer, metrics = _judge(judge, losses, generated, state.balancer)
        grads = jax.lax.with_sharding_constraint(pull_back(gradient), shardings.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, codebooks = optax.apply_updates(state.params, updates), state.codebooks
        metrics |= {"discriminator_learns": learns, "disc_grad_norm": disc_grad_norm}
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step)
        if update_codebooks is not None:
            params, codebooks, others = update_codebooks(params, codebooks, generated.quantized, codebook_key)
            metrics |= _scalars(others)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        state = AdversarialState(
            state.step + 1, params, opt_state, disc_params, disc_opt_state, balancer, codebooks, ema_params
        )
        return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    replicated = sharding.replicated(batch_sharding.mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def _generate(
    generate: Generate, losses: AdversarialLosses, params: Any, batch: Any, key: jax.Array
) -> tuple[Generated, Callable[[jax.Array], Any]]:
    """What the generator makes, and the function from a gradient of its reconstruction to one of its parameters."""

    def forward(params: Any) -> tuple[tuple[Any, Any], Generated]:
        generated = generate(params, batch, key)
        return (generated.reconstruction, dict(generated.penalties)), generated

    (_, penalties), pull_back, generated = jax.vjp(forward, params, has_aux=True)
    _require_same_names("penalties", penalties, losses.penalty_weights)
    weights = {name: jnp.asarray(losses.penalty_weights[name], value.dtype) for name, value in penalties.items()}
    return generated, lambda gradient: pull_back((gradient, weights))[0]


def _judge(
    judge: Callable[[Any], Any] | None, losses: AdversarialLosses, generated: Generated, state: BalancerState
) -> tuple[jax.Array, BalancerState, dict[str, jax.Array]]:
    """The gradient of the reconstruction, the balancer's new state, and all losses' values and shares."""
    target, reconstruction = generated.target, generated.reconstruction
    values = dict.fromkeys(losses.adversarial, jnp.zeros(()))
    grads = dict.fromkeys(losses.adversarial, jnp.zeros_like(reconstruction))
    discriminator_loss = jnp.zeros(())
    for name, loss in losses.reconstruction.items():
        values[name], grads[name] = jax.value_and_grad(functools.partial(loss, target))(reconstruction)
    if judge is not None:
        real = judge(target)
        fake, pull_back = jax.vjp(judge, reconstruction)
        for name, loss in losses.adversarial.items():
            values[name], judgement_grads = jax.value_and_grad(functools.partial(loss, real))(fake)
            (grads[name],) = pull_back(judgement_grads)
        discriminator_loss = losses.discriminator(real, fake)
    balanced = balance(grads, state, losses.weights, rescale=losses.rescale)
    values |= generated.penalties
    weights = {**losses.weights, **losses.penalty_weights}
    metrics = {"loss": sum(weights[name] * value for name, value in values.items())} | values
    metrics |= {f"share/{name}": share for name, share in balanced.shares.items()}
    metrics["discriminator_loss"] = discriminator_loss
    return balanced.gradient, balanced.state, metrics


def _choose(stacked: Any, index: jax.Array | None) -> Any:
    if index is None:
        return stacked
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)


def _put_back(stacked: Any, chosen: Any, index: jax.Array | None) -> Any:
    if index is None:
        return chosen
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), stacked, chosen)


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Each value (Q,) as Q scalars, "NAME/0" and so on; scalars as they are."""
    scalars = {}
    for name, value in metrics.items():
        scalars |= {name: value} if value.ndim == 0 else {f"{name}/{q}": value[q] for q in range(len(value))}
    return scalars


def _require_same_names(what: str, values: Iterable[str], weights: Iterable[str]) -> None:
    if set(values) != set(weights):
        raise ValueError(f"{what} and weights must have the same names, got {sorted(values)} and {sorted(weights)}")
