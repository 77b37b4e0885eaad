"""The training loop of every experiment, and what stands around it.

That is: metrics on disk, a progress bar, stop signals, and the check that stops a run whose loss is not finite.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxaudio.data.files import atomic_path
from jaxaudio.train.checkpoint import Checkpointer, Scalar


class NonFiniteLossError(Exception):
    """A metric of a training step is NaN or infinite; the message names the step, the metric and the batch's file."""


class DataEndedError(Exception):
    """The data ended before the last step; the message names both steps."""


class MetricsWriter:
    """Writes a run's numbers: metrics.jsonl, timings.jsonl and TensorBoard.

    metrics.jsonl holds one JSON object per line, {"step": 20, "train/loss": 0.51, ...}: values that a repeated run
    reproduces bit for bit, as the shortest decimals that read back as the same numbers. Everything that depends on the
    clock goes to timings.jsonl. With several processes only the first one writes.

    Args:
      workdir: the run's folder.
      resume_step: step of the checkpoint that will be restored, 0 for a new run; lines of later steps, which will be
        computed again, are dropped.
    """

    def __init__(self, workdir: str | pathlib.Path, resume_step: int = 0):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._files = {}
        for name in ("metrics", "timings"):
            path = workdir / f"{name}.jsonl"
            _drop_lines_after(path, resume_step)
            self._files[name] = path.open("a", encoding="utf-8")
        self._folder, self._resume_step = workdir / "tensorboard", resume_step

    def write(self, step: int, values: Mapping[str, Scalar], *, prefix: str) -> None:
        """Appends deterministic values of one step under "prefix/name" to metrics.jsonl and TensorBoard."""
        self._append("metrics", step, values, prefix)

    def write_timings(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Appends values that depend on the clock under "timings/name" to timings.jsonl and TensorBoard."""
        self._append("timings", step, values, "timings")

    @functools.cached_property
    def _tensorboard(self) -> Any:
        """Made by the first value, because every new writer leaves a file, also one of a run that is complete."""
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=self._resume_step + 1)

    def _append(self, file: str, step: int, values: Mapping[str, Scalar], prefix: str) -> None:
        if not self._writes:
            return
        values = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        self._files[file].write(json.dumps({"step": step, **values}) + "\n")
        self._files[file].flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._writes:
            if "_tensorboard" in vars(self):
                self._tensorboard.close()
            for file in self._files.values():
                file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    # A killed process may leave a last line without its newline; it belongs to a step that will be computed again.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


class ProgressBar:
    """A bar on standard error with the loss, tokens per second and the time left; only on the first process.

    Args:
      first_step: steps already done when the bar starts.
      num_steps: steps of the whole run.
    """

    def __init__(self, first_step: int, num_steps: int):
        from tqdm import tqdm

        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            # A log file is not a terminal: there one line every half minute is enough.
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            disable=jax.process_index() != 0,
        )

    def update(self) -> None:
        """Counts one step."""
        self._bar.update()

    def show(self, loss: float, tokens_per_second: float) -> None:
        """Shows the newest loss and speed."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)

    def print(self, message: str) -> None:
        """Prints a line above the bar."""
        if not self._bar.disable:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a request to save and stop; the second one kills the process.

    `received` is the signal's number, 0 before it arrives. Use it as a context manager: leaving it brings the former
    handlers back.
    """

    def __enter__(self) -> "StopSignal":
        self.received = 0
        self._former = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        # os.write: printing inside a signal handler may re-enter a locked buffer.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving after this step; a second signal stops at once\n".encode())

    def agreed(self) -> int:
        """The signal that any process received, 0 if none; every process must call this at the same step."""
        if jax.process_count() == 1:
            return self.received
        return int(multihost_utils.process_allgather(np.int32(self.received)).max())


def check_finite(step: int, metrics: Mapping[str, float], batch: Any, workdir: str | pathlib.Path) -> None:
    """Stops the run at a step whose metrics are not finite, keeping its batch in workdir/nonfinite_step_N.npz.

    Args:
      step: number of the step, counted from 1.
      metrics: its metrics on the host.
      batch: this process's part of its batch, a dictionary of numpy arrays.
    Raises:
      NonFiniteLossError: a metric is NaN or infinite.
    """
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if not bad:
        return
    suffix = "" if jax.process_count() == 1 else f"_process_{jax.process_index()}"
    path = pathlib.Path(workdir) / f"nonfinite_step_{step}{suffix}.npz"
    with atomic_path(path) as temporary:
        np.savez(temporary, **batch)
    raise NonFiniteLossError(f"step {step} gave {bad}; its batch is in {path}. Checkpoints are from before this step")


def train_loop(
    state: Any,
    train_step: Callable[..., Any],
    batches: Iterator[Mapping[str, np.ndarray]],
    key: jax.Array,
    *,
    num_steps: int,
    workdir: str | pathlib.Path,
    checkpointer: Checkpointer,
    writer: MetricsWriter,
    put: Callable[[Any], Any] | None = None,
    evaluate: Callable[[Any], Mapping[str, Scalar]] | None = None,
    log_every: int = 20,
    evaluate_every: int | None = None,
    checkpoint_every: int = 1000,
) -> Any:
    """Trains from the newest checkpoint, or from `state`, to `num_steps`; returns the last state.

    Steps count from 1. A step's metrics are read while the device works on the next step, so reading never stalls it. A
    step that is not finite is therefore found one step late, but before it is logged, evaluated or saved.

    Args:
      state: a new train state; donated to the first step.
      train_step: (state, batch, key) -> (state, metrics); metrics are float32 scalars, "loss" among them. It folds the
        step into the key.
      batches: a Grain iterator over dictionaries of numpy arrays, this process's part of each batch.
      key: the run's key for training.
      put: this process's part of a batch -> the batch on the devices, such as `sharding.shard_batch` with its mesh and
        rules; None leaves it to `train_step`.
      evaluate: state -> metrics, called every `evaluate_every` steps and after the last. They are written as
        "validation/..." and rank the checkpoint that follows for keep-best.
      checkpoint_every: steps between checkpoints; evaluated steps and the last one are saved as well.
    Raises:
      NonFiniteLossError, DataEndedError, CheckpointError: see there.
      ValueError: an interval is less than 1.
      SystemExit: SIGTERM or SIGINT came and the state is saved; the status is 128 + the signal's number, as shells have
        it.
    """
    for name, every in (("log", log_every), ("evaluate", evaluate_every), ("checkpoint", checkpoint_every)):
        if every is not None and every < 1:
            raise ValueError(f"{name}_every must be at least 1, got {every}")
    first_step = checkpointer.latest_step or 0
    if first_step:
        state = checkpointer.restore(state, batches)
        if jax.process_index() == 0:
            verb = "resuming from" if first_step < num_steps else "trained to"
            print(f"{workdir}: {verb} step {first_step} of {num_steps}", file=sys.stderr)
        if first_step >= num_steps:
            return state

    bar = ProgressBar(first_step, num_steps)
    unread = None  # (step, metrics on the device, batch) of the step before
    tokens, since = 0, time.perf_counter()
    with StopSignal() as stop, contextlib.closing(bar):
        for step in range(first_step + 1, num_steps + 1):
            batch = _next_batch(batches, step, num_steps)
            state, metrics = train_step(state, batch if put is None else put(batch), key)
            if unread is not None:
                _read(*unread, workdir)
            unread = step, metrics, batch
            tokens += _count_tokens(batch)
            bar.update()

            is_last = step == num_steps
            is_logging = is_last or step % log_every == 0
            is_evaluating = evaluate is not None and (is_last or _is_due(step, evaluate_every))
            # Asking the other processes costs a round trip, so they agree on stopping only when they log.
            stopping = stop.agreed() if is_logging or jax.process_count() == 1 else 0
            is_saving = is_last or is_evaluating or stopping != 0 or step % checkpoint_every == 0
            if not (is_logging or is_saving):
                continue

            values, unread = _read(*unread, workdir), None
            if is_logging:
                seconds = time.perf_counter() - since
                writer.write(step, values, prefix="train")
                writer.write_timings(step, {"seconds": seconds, "tokens_per_second": tokens / seconds})
                bar.show(values["loss"], tokens / seconds)
            scores = None
            if is_evaluating:
                scores = evaluate(state)
                writer.write(step, scores, prefix="validation")
                bar.print(f"step {step}: validation " + ", ".join(f"{k} {float(v):.4f}" for k, v in scores.items()))
            if is_saving:
                checkpointer.save(state, batches, scores, wait=is_last or stopping != 0)
            if stopping:
                bar.print(f"stopped at step {step}, saved in {checkpointer.directory}; the same command resumes")
                raise SystemExit(128 + stopping)
            if is_logging or is_evaluating:
                tokens, since = 0, time.perf_counter()
    return state


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _next_batch(batches: Iterator, step: int, num_steps: int) -> Mapping[str, np.ndarray]:
    try:
        return next(batches)
    except StopIteration:
        raise DataEndedError(f"the data ended before step {step} of {num_steps}; let the pipeline repeat") from None


def _read(step: int, metrics: Mapping[str, jax.Array], batch: Any, workdir: str | pathlib.Path) -> dict[str, float]:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    check_finite(step, values, batch, workdir)
    return values


def _count_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Targets of a batch over all processes: its mask where it has one, else the size of its largest array."""
    counted = batch["mask"].sum() if "mask" in batch else max(array.size for array in batch.values())
    return int(counted) * jax.process_count()
