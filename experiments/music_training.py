"""What the trainings of Music Transformers share: optimizer, rows of a process, the loop, the finished run's card."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.report.card import Card
from jaxaudio.train.checkpoint import Checkpointer
from jaxaudio.train.loop import MetricsWriter, train_loop
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxaudio.train.state import init_state, num_parameters
from jaxaudio.train.step import LossFn, make_eval_step, make_train_step, mean_metrics

PLACEMENT = ("data_dir", "cache_dir", "mesh", "rules", "cpu_devices", "distributed")
DROPOUT = {"dropout_rate": 0.1, "attention_dropout_rate": 0.1, "mlp_dropout_rate": 0.1, "dropout_generator": "hash"}


class Result(NamedTuple):
    """The step with the least validation loss, its folder, and its losses by split, in nats per token."""

    step: int
    checkpoint: pathlib.Path
    nats: dict[str, float]


def noam(embed_dim: int) -> OptimizerConfig:
    """Adam as tensor2tensor's defaults have it, noam with constant 1: the paper's learning rate "0.1"."""
    return OptimizerConfig(
        schedule="noam", learning_rate=1.0, warmup_steps=8000, hidden_dim=embed_dim, b2=0.997, epsilon=1e-9
    )


def check_optimizer(config: Any, embed_dim: int) -> None:
    """Checks that the schedule is of this run.

    Raises:
      ValueError: the optimizer's num_steps or hidden_dim is not the run's; with both.
    """
    for field, ours in (("num_steps", config.num_steps), ("hidden_dim", embed_dim)):
        if getattr(config.optimizer, field) not in (None, ours):
            raise ValueError(f"optimizer.{field} is {getattr(config.optimizer, field)}, but the run's own {ours}")


def rows_of_process(config: Any, mesh: Mesh, rules: sharding.Rules) -> dict[str, int]:
    """The arguments of a pipeline that say which rows of a batch this process reads.

    Raises:
      ValueError: a batch that the processes cannot share.
    """
    shard, num_shards = sharding.process_shard(mesh, rules)
    if config.batch_size % num_shards:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of the {num_shards} processes that read data"
        )
    return {"process_index": shard, "process_count": num_shards, "batch_size": config.batch_size // num_shards}


def train(
    config: Any,
    workdir: pathlib.Path,
    init_params: Callable[[jax.Array], Any],
    loss_fn: LossFn,
    batches: Any,
    evaluation: Callable[[str], Iterable[Mapping[str, Any]]],
    *,
    init_key: jax.Array,
    dropout_key: jax.Array,
    mesh: Mesh,
    rules: sharding.Rules,
) -> Result | None:
    """From the newest checkpoint, or from new parameters, to the config's num_steps; then evaluates the best step.

    Args:
      config: of the run.
      workdir: its folder.
      init_params: key -> parameters.
      loss_fn: sums over a batch, see `make_train_step`; without a key it has no dropout.
      batches: a Grain iterator over the training batches of this process.
      evaluation: split ("valid" or "test") -> its batches.
      init_key, dropout_key: of parameters and of dropout.
      mesh, rules: devices, and where logical axes lie.
    Returns:
      What was reached; None where an earlier start of the same run has written its page.
    """
    optimizer, schedule = make_optimizer(config.optimizer), make_schedule(config.optimizer)
    state, shardings = init_state(init_params, optimizer, init_key, mesh, rules, ema=config.ema_decay is not None)
    batch_sharding = sharding.batch_sharding(mesh, rules)
    train_step = make_train_step(
        loss_fn,
        optimizer,
        shardings=shardings,
        batch_sharding=batch_sharding,
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
        schedule=schedule,
    )
    eval_step = make_eval_step(loss_fn, shardings=shardings, batch_sharding=batch_sharding)
    put = functools.partial(sharding.shard_batch, mesh=mesh, rules=rules)

    def evaluate(state, split):
        return mean_metrics(eval_step(state.eval_params, put(batch)) for batch in evaluation(split))

    if jax.process_index() == 0:
        print(f"{config.row}: {num_parameters(state.params):,} parameters on {mesh.size} devices")
    checkpoints = Checkpointer(workdir / "checkpoints", config=config_lib.to_dict(config))
    with sharding.use(mesh, rules), checkpoints, MetricsWriter(workdir, checkpoints.latest_step or 0) as writer:
        if checkpoints.latest_step == config.num_steps and (workdir / "report.html").exists():
            print(f"complete: open {workdir / 'report.html'}; another --workdir starts a new run")
            return None
        state = train_loop(
            state,
            train_step,
            batches,
            dropout_key,
            num_steps=config.num_steps,
            workdir=workdir,
            checkpointer=checkpoints,
            writer=writer,
            put=put,
            evaluate=functools.partial(evaluate, split="valid"),
            log_every=config.log_every,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
        )
        best = checkpoints.best_step  # the paper's early stopping
        state = checkpoints.restore(state, step=best)
        nats = {split: evaluate(state, split)["loss"] for split in ("valid", "test")}
        return Result(best, workdir / "checkpoints" / str(best), nats)


def trained_card(config: Any, rows: Mapping[str, Any], cards: Sequence[Card], result: Result, mesh: Mesh) -> Card:
    """The card of the config's row with what this run reached, and with the fields that it has otherwise."""
    card = next(card for card in cards if card.command.endswith(f"row={config.row}"))
    changed = config_lib.differences(config_lib.to_dict(rows[config.row]), config_lib.to_dict(config))
    changed = {name: now for name, (_, now) in changed.items() if name not in PLACEMENT}
    overrides = "".join(
        f" {name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in changed.items()
    )
    return dataclasses.replace(
        card,
        reached=result.nats["valid"],
        status="trained by this run",
        steps=result.step,
        hardware=f"{mesh.size} x {jax.devices()[0].device_kind}",
        command=card.command + overrides,
        deviations=(*card.deviations, *([f"Fields unlike the row's:{overrides}."] if changed else [])),
    )
