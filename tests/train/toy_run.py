"""A run small enough for tests: a line fitted to batches from Grain.

As a script: toy_run.py WORKDIR NUM_STEPS [KILL_AT].
"""

import os
import pathlib
import signal
import sys

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxaudio.train.checkpoint import Checkpointer
from jaxaudio.train.loop import MetricsWriter, train_loop


class State(flax.struct.PyTreeNode):
    """The smallest train state: a step and parameters."""

    step: jax.Array
    params: dict[str, jax.Array]


def new_state() -> State:
    return State(step=jnp.int32(0), params={"slope": jnp.zeros(3), "offset": jnp.zeros(())})


def example(index: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(index).normal(size=3).astype(np.float32)
    return {"x": x, "y": np.float32(x @ np.float32([1.0, -2.0, 0.5]) + 0.25), "mask": np.bool_(index % 5 != 0)}


def new_batches(num_examples: int | None = None):
    data = grain.MapDataset.range(100).seed(0).shuffle()
    data = data.repeat() if num_examples is None else data[:num_examples]
    return iter(data.map(example).batch(4, drop_remainder=True).to_iter_dataset())


@jax.jit
def train_step(state: State, batch: dict[str, jax.Array], key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    noise = 0.01 * jax.random.normal(jax.random.fold_in(key, state.step), batch["y"].shape)

    def loss_fn(params):
        error = batch["x"] @ params["slope"] + params["offset"] - batch["y"] - noise
        return jnp.sum(jnp.where(batch["mask"], error**2, 0)) / jnp.sum(batch["mask"])

    loss, gradient = jax.value_and_grad(loss_fn)(state.params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    return State(step=state.step + 1, params=params), {"loss": loss}


def distance(state: State) -> dict[str, float]:
    return {"loss": float(jnp.sum((state.params["slope"] - jnp.array([1.0, -2.0, 0.5])) ** 2))}


def run(workdir: pathlib.Path, num_steps: int, step_fn=train_step, batches=None, **options) -> State:
    options = {"log_every": 2, "evaluate_every": 5, "checkpoint_every": 3, "evaluate": distance} | options
    with (
        Checkpointer(workdir / "checkpoints", config={"num_steps": num_steps}) as checkpointer,
        MetricsWriter(workdir, checkpointer.latest_step or 0) as writer,
    ):
        return train_loop(
            new_state(),
            step_fn,
            new_batches() if batches is None else batches,
            jax.random.key(0),
            num_steps=num_steps,
            workdir=workdir,
            checkpointer=checkpointer,
            writer=writer,
            **options,
        )


def killing_itself_at(kill_at: int):
    """`train_step`, but the process is gone, without any clean-up, when it is asked for step `kill_at`."""

    def step_fn(state, batch, key):
        if int(state.step) + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(state, batch, key)

    return step_fn


if __name__ == "__main__":
    kill_at = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    run(pathlib.Path(sys.argv[1]), int(sys.argv[2]), step_fn=killing_itself_at(kill_at) if kill_at else train_step)
