"""One update of the parameters, blind to the model: gradients of a loss, accumulated, averaged exactly, applied.

A loss function returns sums, not means: `loss_fn(params, batch, key) -> (loss_sum, {"weight": count, ...})`, each a
scalar summed over the batch. Microbatches and devices then weigh every token the same, however the mask falls on them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxaudio import sharding
from jaxaudio.train.state import TrainState

LossFn = Callable[[Any, Any, jax.Array | None], tuple[Any, Mapping[str, Any]]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    shardings: TrainState,
    batch_sharding: NamedSharding,
    accumulate_steps: int = 1,
    ema_decay: float | None = None,
    schedule: optax.Schedule | None = None,
) -> Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled `train_step(state, batch, key) -> (state, metrics)`; call it within `sharding.use`.

    The state passed in is donated: its buffers are reused, it cannot be read again. Pass the same key at every step;
    the loss gets fold_in(key, state.step), and of that fold_in(.., microbatch) when accumulating.

    Args:
      loss_fn: sums of the loss and of other metrics over a batch, with "weight" the count that all are divided by.
      optimizer: its updates are added to the parameters, in the parameters' own dtype.
      shardings: of the state, from `init_state`.
      batch_sharding: of every array in the batch, from `sharding.batch_sharding`.
      accumulate_steps: the batch is cut into this many microbatches, one after the other; row r is in microbatch
        r % accumulate_steps, so that no row leaves its device.
      ema_decay: d in ema = d * ema + (1 - d) * params after each update; needs a state made with ema=True.
      schedule: adds "learning_rate" to the metrics.
    Returns:
      train_step; its metrics are float32 scalars: "loss" and loss_fn's other sums divided by the weight, "weight",
      "grad_norm" (before any clipping), and "learning_rate".
    Raises:
      ValueError: accumulate_steps < 1, or ema_decay without ema_params in the state or the other way round. By
        train_step, when first called: a batch that cannot be cut, or loss_fn's sums without "weight" or with our names.
      RuntimeError: by train_step, on more than one device outside of `sharding.use`.
    """
    if accumulate_steps < 1:
        raise ValueError(f"accumulate_steps must be at least 1, got {accumulate_steps}")
    if (ema_decay is None) != (shardings.ema_params is None):
        raise ValueError(f"ema_decay={ema_decay} with {'no ' * (ema_decay is not None)}ema_params in the state")
    grad_fn = jax.value_and_grad(lambda *args: _float32_sums(loss_fn(*args)), has_aux=True)

    def gradients(params: Any, batch: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        (_, sums), grads = grad_fn(params, batch, key)
        return jax.lax.with_sharding_constraint(grads, shardings.params), sums

    def accumulated_gradients(params: Any, batch: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        microbatches = jax.tree.map(lambda x: _microbatches(x, accumulate_steps, batch_sharding), batch)

        def add(total: Any, scanned: tuple) -> tuple[Any, None]:
            index, microbatch = scanned
            return jax.tree.map(jnp.add, total, gradients(params, microbatch, jax.random.fold_in(key, index))), None

        one = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], microbatches), key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulate_steps), microbatches))[0]

    def train_step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        require_mesh(batch_sharding)
        step_key = jax.random.fold_in(key, state.step)
        sum_gradients = gradients if accumulate_steps == 1 else accumulated_gradients
        grads, sums = sum_gradients(state.params, batch, step_key)
        grads = jax.tree.map(lambda grad: (grad / sums["weight"]).astype(grad.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        metrics = _means(sums) | {"grad_norm": optax.tree.norm(grads)}
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params), metrics

    replicated = sharding.replicated(batch_sharding.mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def make_eval_step(
    loss_fn: LossFn, *, shardings: Any, batch_sharding: NamedSharding
) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """The compiled `eval_step(params, batch) -> sums`; call it within `sharding.use`.

    Args:
      loss_fn: the same as for training; its key is None, which means no dropout.
      shardings: of a state with `params`, from `init_state` or `init_adversarial_state`.
      batch_sharding: of every array in the batch.
    Returns:
      eval_step; its sums are float32 scalars: "loss", "weight" and loss_fn's others. `mean_metrics` averages them.
    Raises:
      ValueError, RuntimeError: by eval_step, as `make_train_step`.
    """

    def eval_step(params: Any, batch: Any) -> dict[str, jax.Array]:
        require_mesh(batch_sharding)
        return _float32_sums(loss_fn(params, batch, None))[1]

    replicated = sharding.replicated(batch_sharding.mesh)
    return jax.jit(eval_step, in_shardings=(shardings.params, batch_sharding), out_shardings=replicated)


def mean_metrics(sums: Iterable[Mapping[str, jax.Array]]) -> dict[str, float]:
    """The weighted means over many batches of `eval_step`'s sums, and their total "weight".

    Raises:
      ValueError: no batch, or a total weight of 0.
    """
    totals: dict[str, float] = {}
    for batch_sums in sums:
        for name, value in batch_sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    if not totals.get("weight"):
        raise ValueError(f"nothing to average: the sums over all batches are {totals}")
    return _means(totals)


def _means(sums: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if name == "weight" else value / sums["weight"] for name, value in sums.items()}


def _float32_sums(result: tuple[Any, Mapping[str, Any]]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a loss function returned, as (loss, all sums with the loss among them)."""
    loss, others = result
    reserved = {"loss", "grad_norm", "learning_rate"} & set(others)
    if reserved or "weight" not in others:
        raise ValueError(f"loss_fn's sums must have 'weight' and not {sorted(reserved)}, got {sorted(others)}")
    sums = {name: jnp.asarray(value, jnp.float32) for name, value in {"loss": loss, **others}.items()}
    return sums["loss"], sums


def _microbatches(array: jax.Array, count: int, batch_sharding: NamedSharding) -> jax.Array:
    """(B, ...) to (count, B / count, ...), each microbatch split over the devices as the batch was."""
    rows = array.shape[0]
    num_shards = rows // batch_sharding.shard_shape(array.shape)[0]
    if rows % (count * num_shards):
        raise ValueError(f"{rows} rows cannot be cut into {count} microbatches over {num_shards} shards of the batch")
    stacked = jnp.swapaxes(array.reshape(rows // count, count, *array.shape[1:]), 0, 1)
    spec = PartitionSpec(None, *batch_sharding.spec)
    return jax.lax.with_sharding_constraint(stacked, NamedSharding(batch_sharding.mesh, spec))


def require_mesh(batch_sharding: NamedSharding) -> None:
    """Checks that a step is traced within `sharding.use`.

    Raises:
      RuntimeError: it is not, and there is more than one device.
    """
    if batch_sharding.mesh.size > 1 and jax.sharding.get_abstract_mesh().empty:
        raise RuntimeError(
            "call the step within sharding.use(mesh, rules); outside, the model's constraints do nothing"
        )
