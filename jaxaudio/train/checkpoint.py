"""Orbax checkpoints of a run: asynchronous, atomic, the last few and the best, with readable errors.

A checkpoint is a folder named after its step. It holds the train state ("state"), the position of the Grain iterator
("data"), the metrics that ranked it, and in `_CHECKPOINT_METADATA`, as plain JSON under "custom_metadata", the resolved
config and the library versions. Orbax writes to a temporary folder and renames it, so a killed run loses at most the
steps since the last checkpoint. Orbax has checksums over the layout of a checkpoint but not over the array bytes: a
truncated file is found, an altered byte inside an array can go unseen.
"""

import importlib.metadata
import math
import pathlib
import platform
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxaudio import __version__

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
TEMPORARY = ".orbax-checkpoint-tmp"
_LEAST_SLICE = 2**20  # bytes

Scalar = int | float | np.number | jax.Array


class CheckpointError(Exception):
    """A checkpoint could not be written or read."""


class CheckpointSaveError(CheckpointError):
    """Saving failed; the message names the folder, the system's reason, the free bytes and the steps that remain."""


class CheckpointNotFoundError(CheckpointError):
    """The folder holds no checkpoint of the step asked for; the message lists the steps it holds."""


class CheckpointMismatchError(CheckpointError):
    """The checkpoint is of another model or number of processes; the message says what was expected and found."""


class CheckpointCorruptError(CheckpointError):
    """The checkpoint is damaged; the message names it, the reason, and the other steps to fall back on."""


class Checkpointer:
    """The checkpoints of one run, saved in the background.

    Keeps the newest `keep_last`, and the `keep_best` with the lowest `metric` among those saved with metrics. Use it as
    a context manager: leaving it waits for the save in progress. A background save that failed raises at the next save,
    wait or close.

    Args:
      directory: folder of the checkpoints, created if absent; temporary debris of a killed run is removed from it.
      config: the run's resolved config as JSON types; saved in every checkpoint.
      metric: name of the value in `save`'s metrics that ranks checkpoints; lower is better, a value that is not finite
        ranks last.
    Raises:
      ValueError: if keep_last is less than 1 or keep_best is negative.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        config: dict,
        keep_last: int = 2,
        keep_best: int = 1,
        metric: str = "loss",
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last must be >= 1 and keep_best >= 0, got {keep_last} and {keep_best}")
        self.directory = pathlib.Path(directory).absolute()
        self.config = config
        self.metric = metric
        self._pending_step: int | None = None
        policies = ocp.training.preservation_policies
        context = ocp.Context()
        # Devices with the same array write a slice of it each, and XLA compiles every slice: too much for small arrays.
        context.array.saving.min_slice_bytes_for_replica_parallel = _LEAST_SLICE
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), self._best(keep_best)]),
            cleanup_tmp_directories=True,
        )

    def _best(self, count: int) -> Any:
        return ocp.training.preservation_policies.BestN(
            get_metric_fn=self._rank, reverse=True, n=count, keep_checkpoints_without_metrics=False
        )

    def _rank(self, metrics: Mapping[str, float]) -> float:
        value = metrics[self.metric]
        return value if math.isfinite(value) else math.inf

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps with a complete checkpoint, ascending."""
        return tuple(c.step for c in self._orbax.checkpoints if c.step != self._pending_step)

    @property
    def latest_step(self) -> int | None:
        """Newest step with a complete checkpoint, or None."""
        return self.steps[-1] if self.steps else None

    @property
    def best_step(self) -> int | None:
        """Step with the lowest metric among the complete checkpoints saved with metrics, or None."""
        complete = [c for c in self._orbax.checkpoints if c.step in self.steps]
        ranked = [(self._rank(c.metrics), c.step) for c in complete if c.metrics]
        return min(ranked)[1] if ranked else None

    def save(
        self,
        state: Any,
        data_iterator: Any = None,
        metrics: Mapping[str, Scalar] | None = None,
        wait: bool = False,
    ) -> None:
        """Saves `state` under its step; returns once its arrays are copied, the writing goes on in the background.

        Args:
          state: pytree of arrays with an attribute `step`.
          data_iterator: a Grain iterator; its position is saved too, so that resuming repeats and loses no batch.
          metrics: values that rank this checkpoint for keep-best; without them it is kept only as one of the last.
          wait: return only once the checkpoint is complete on disk.
        Raises:
          CheckpointSaveError: this save failed, or the one before it in the background; or the step is already saved.
          ValueError: if metrics lacks the value that ranks checkpoints.
        """
        if metrics is not None and self.metric not in metrics:
            raise ValueError(f"metrics must hold {self.metric!r}, which ranks checkpoints; it holds {sorted(metrics)}")
        self.wait()
        step = int(state.step)
        if step in self.steps:
            raise CheckpointSaveError(f"step {step} is already saved in {self.directory} (steps {list(self.steps)})")
        items = {"state": state} if data_iterator is None else {"state": state, "data": data_iterator}
        self._pending_step = step
        try:
            self._orbax.save_checkpointables_async(
                step,
                items,
                force=True,
                metrics=None if metrics is None else {name: float(value) for name, value in metrics.items()},
                custom_metadata={"config": self.config, "versions": library_versions()},
            )
        except Exception as error:
            raise self._save_error(error) from error
        if wait:
            self.wait()

    def wait(self) -> None:
        """Blocks until the save in progress is complete on disk.

        Raises:
          CheckpointSaveError: if that save failed.
        """
        try:
            self._orbax.wait()
        except Exception as error:
            raise self._save_error(error) from error
        self._pending_step = None

    def close(self) -> None:
        """Waits for the save in progress and releases the background threads.

        Raises:
          CheckpointSaveError: if that save failed.
        """
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _save_error(self, error: Exception) -> CheckpointSaveError:
        step, self._pending_step = self._pending_step, None
        free_bytes = shutil.disk_usage(self.directory).free
        # What the failed save left behind would keep a full disk full.
        shutil.rmtree(self.directory / f"{step}{TEMPORARY}", ignore_errors=True)
        self._orbax.reload()
        return CheckpointSaveError(
            f"could not save step {step} in {self.directory} ({free_bytes:,} bytes free): {root_reason(error)}. "
            f"Checkpoints that remain: {list(self.steps)}; once the cause is gone, run again to resume from the newest"
        )

    def restore(self, abstract_state: Any, data_iterator: Any = None, step: int | None = None) -> Any:
        """Loads a checkpoint with the shardings of `abstract_state`, whatever devices it was saved from.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings (or of arrays), the structure of the result.
          data_iterator: a fresh iterator of the same pipeline; moved in place to the saved position.
          step: which checkpoint; the newest if None.
        Raises:
          CheckpointNotFoundError: there is none, or none of that step.
          CheckpointMismatchError: paths, shapes or dtypes differ, the checkpoint holds no iterator, or its iterator is
            that of another number of processes.
          CheckpointCorruptError: the checkpoint is truncated or damaged.
        """
        self.wait()
        found = self.latest_step if step is None else step
        if found is None or found not in self.steps:
            wanted = "" if step is None else f" of step {step}"
            raise CheckpointNotFoundError(f"no checkpoint{wanted} in {self.directory}; it has steps {list(self.steps)}")
        path = self.directory / str(found)
        if data_iterator is not None:
            check_same_processes(path)
        try:
            metadata = ocp.metadata(path, "state").metadata
        except Exception as error:
            raise self._corrupt_error(found, error) from error
        if metadata is None:
            raise self._corrupt_error(found, ValueError(f"{path / 'state'} has no readable tree"))
        check_same_tree(abstract_state, metadata, path)
        abstract_state = jax.tree.map(_abstract_leaf, abstract_state)
        items = {"state": abstract_state} | ({} if data_iterator is None else {"data": data_iterator})
        try:
            return self._orbax.load_checkpointables(found, items)["state"]
        except Exception as error:
            raise self._corrupt_error(found, error) from error

    def _corrupt_error(self, step: int, error: Exception) -> CheckpointCorruptError:
        others = [other for other in self.steps if other != step]
        advice = (
            f"delete that folder to resume from one of steps {others}" if others else "start anew in another folder"
        )
        path = self.directory / str(step)
        return CheckpointCorruptError(f"{path} is damaged: {root_reason(error)}. To go on, {advice}")


def library_versions() -> dict[str, str]:
    """Versions of Python, jaxaudio and the libraries that decide what a run computes; an absent library is left out."""
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES if name in installed}
    return {"python": platform.python_version(), "jaxaudio": __version__, **libraries}


def check_same_processes(path: pathlib.Path) -> None:
    """Compares the number of processes whose data iterators a checkpoint holds with that of this run.

    Raises:
      CheckpointMismatchError: they differ, or the checkpoint holds none.
    """
    if not (path / "data").is_dir():
        raise CheckpointMismatchError(f"{path} was saved without a data iterator; restore it without one")
    # Grain writes one file for each process, process_INDEX-of-COUNT.json.
    counts = {int(file.stem.rpartition("-")[2]) for file in (path / "data").glob("process_*-of-*.json")}
    if counts and counts != {jax.process_count()}:
        raise CheckpointMismatchError(
            f"{path} holds the data iterators of {max(counts)} process(es), this run has {jax.process_count()}; "
            "resume with the same number of processes"
        )


def check_same_tree(expected: Any, found: Any, path: pathlib.Path) -> None:
    """Compares paths, shapes and dtypes of a state with those of a checkpoint's metadata.

    Orbax's own error for a mismatch speaks of incompatible handlers and names neither path nor shape.

    Raises:
      CheckpointMismatchError: they differ; the message lists up to ten paths with what was expected and found.
    """
    expected_leaves, found_leaves = _describe_leaves(expected), _describe_leaves(found)
    lines = [
        f"{name}: expected {expected_leaves.get(name, 'nothing')}, found {found_leaves.get(name, 'nothing')}"
        for name in sorted(expected_leaves.keys() | found_leaves.keys())
        if expected_leaves.get(name) != found_leaves.get(name)
    ]
    if lines:
        shown = lines[:10] + ([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])
        raise CheckpointMismatchError(
            f"{path} is a checkpoint of another model or optimizer; {len(lines)} arrays differ:\n  "
            + "\n  ".join(shown)
        )


def _describe_leaves(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding Orbax would ask for the devices of the saving process, which may not exist here.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def root_reason(error: BaseException) -> str:
    """One line for a chain of errors: the deepest with the system's words, without TensorStore's dump of its state."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    root = next((e for e in reversed(chain) if isinstance(e, OSError | ValueError) and str(e)), error)
    return re.split(r" \[(?:tensorstore_spec|source locations)=|\n", f"{type(root).__name__}: {root}")[0]
