"""The loop: resuming bit for bit, stopping on signals and on bad numbers, and what it leaves on disk."""

import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_run
from process_pair import run_pair

from jaxaudio import sharding
from jaxaudio.train.checkpoint import Checkpointer
from jaxaudio.train.loop import DataEndedError, MetricsWriter, NonFiniteLossError, StopSignal, check_finite

ROOT = pathlib.Path(__file__).parents[2]


def in_a_process(*arguments) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    script = ROOT / "tests" / "train" / "toy_run.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True).returncode


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_killed_at_any_step_ends_with_the_same_metrics_bit_for_bit(tmp_path):
    kill_at = random.randint(2, 19)
    assert in_a_process(tmp_path / "whole", 20) == 0
    assert in_a_process(tmp_path / "killed", 20, kill_at) == -signal.SIGKILL
    interrupted = (tmp_path / "killed" / "metrics.jsonl").read_bytes()
    assert in_a_process(tmp_path / "killed", 20) == 0
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert len(interrupted) < len(whole)
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == whole, f"killed at step {kill_at}"
    with Checkpointer(tmp_path / "killed" / "checkpoints", config={}) as checkpointer:
        assert checkpointer.latest_step == 20


def test_the_loop_computes_what_a_plain_loop_computes_and_writes_it(tmp_path):
    state = toy_run.run(tmp_path, 10)
    expected, batches, losses = toy_run.new_state(), toy_run.new_batches(), {}
    for step in range(1, 11):
        expected, metrics = toy_run.train_step(expected, next(batches), jax.random.key(0))
        losses[step] = float(metrics["loss"])
    np.testing.assert_array_equal(state.params["slope"], expected.params["slope"])
    written = lines(tmp_path / "metrics.jsonl")
    assert {line["step"]: line["train/loss"] for line in written if "train/loss" in line} == {
        step: losses[step] for step in (2, 4, 6, 8, 10)
    }
    assert [line["step"] for line in written if "validation/loss" in line] == [5, 10]
    assert written[-1]["validation/loss"] == toy_run.distance(expected)["loss"]
    timings = lines(tmp_path / "timings.jsonl")
    assert [line["step"] for line in timings] == [2, 4, 6, 8, 10]
    assert all(line["timings/tokens_per_second"] > 0 for line in timings)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_complete_run_says_so_and_trains_no_step(tmp_path, capfd):
    first = toy_run.run(tmp_path, 4)
    metrics, events = (tmp_path / "metrics.jsonl").read_bytes(), list((tmp_path / "tensorboard").iterdir())
    again = toy_run.run(tmp_path, 4, step_fn=lambda *_: pytest.fail("no step is left"))
    np.testing.assert_array_equal(again.params["slope"], first.params["slope"])
    assert f"{tmp_path}: trained to step 4 of 4" in capfd.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert list((tmp_path / "tensorboard").iterdir()) == events


@pytest.mark.parametrize("interval", ["log_every", "evaluate_every", "checkpoint_every"])
@pytest.mark.parametrize("every", [0, -5])
def test_an_interval_below_one_is_refused(tmp_path, interval, every):
    with pytest.raises(ValueError, match=f"{interval} must be at least 1, got {every}$"):
        toy_run.run(tmp_path, 4, **{interval: every})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_this_step_says_how_to_resume_and_exits(tmp_path, capfd, number):
    def step_fn(state, batch, key):
        if int(state.step) + 1 == 7:
            os.kill(os.getpid(), number)
        return toy_run.train_step(state, batch, key)

    former = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        toy_run.run(tmp_path / "stopped", 10, step_fn=step_fn)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is former
    shown = capfd.readouterr().err
    assert "stopped at step 7" in shown
    assert "the same command resumes" in shown
    resumed = toy_run.run(tmp_path / "stopped", 10)
    whole = toy_run.run(tmp_path / "whole", 10)
    np.testing.assert_array_equal(resumed.params["slope"], whole.params["slope"])
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("stopped", "whole")]
    assert metrics[0] == metrics[1]


def test_a_second_signal_kills(tmp_path):
    code = """if True:
        import os, signal
        from jaxaudio.train.loop import StopSignal
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert "SIGTERM: saving after this step" in done.stderr
    assert "still here" not in done.stdout


def test_no_signal_is_zero():
    with StopSignal() as stop:
        assert stop.agreed() == 0


@pytest.mark.parametrize("bad_step", [3, 4, 10])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_batch(tmp_path, bad_step):
    seen = []

    def step_fn(state, batch, key):
        seen.append(batch)
        state, metrics = toy_run.train_step(state, batch, key)
        return state, {"loss": jnp.where(state.step == bad_step, jnp.nan, metrics["loss"])}

    with pytest.raises(
        NonFiniteLossError, match=rf"step {bad_step} gave .*'loss': nan.*nonfinite_step_{bad_step}\.npz"
    ):
        toy_run.run(tmp_path, 10, step_fn=step_fn)
    # One step late at most: the device was already given the next batch when the bad number was read.
    assert len(seen) <= bad_step + 1
    kept = np.load(tmp_path / f"nonfinite_step_{bad_step}.npz")
    for name, array in seen[bad_step - 1].items():
        np.testing.assert_array_equal(kept[name], array)
    with Checkpointer(tmp_path / "checkpoints", config={}) as checkpointer:
        assert checkpointer.latest_step is None or checkpointer.latest_step < bad_step


def test_check_finite_lets_numbers_pass_and_names_what_is_not(tmp_path):
    check_finite(1, {"loss": 1.0, "grad_norm": 0.0}, {}, tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"step 8 gave \{'grad_norm': inf\}"):
        check_finite(8, {"loss": 1.0, "grad_norm": float("inf")}, {"x": np.arange(3)}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nonfinite_step_8.npz"]


def test_data_that_ends_early_is_an_error_with_both_steps(tmp_path):
    with pytest.raises(DataEndedError, match="before step 4 of 10"):
        toy_run.run(tmp_path, 10, batches=toy_run.new_batches(num_examples=12))


def test_resuming_drops_lines_after_the_restored_step_and_half_written_ones(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            # 0.1 as float32 is another number than 0.1: it must come back exactly.
            writer.write(step, {"loss": np.float32(0.1) * step}, prefix="train")
            writer.write_timings(step, {"seconds": 1.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"loss": 7.0}, prefix="train")
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": float(np.float32(0.1))},
        {"step": 2, "train/loss": float(np.float32(0.1) * 2)},
        {"step": 3, "train/loss": 7.0},
    ]
    assert [line["step"] for line in lines(tmp_path / "timings.jsonl")] == [1, 2]
    with MetricsWriter(tmp_path, resume_step=0):
        assert lines(tmp_path / "metrics.jsonl") == lines(tmp_path / "timings.jsonl") == []


def test_keep_best_is_chosen_by_the_evaluation(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 5.0, 4.0])
    toy_run.run(tmp_path, 10, evaluate=lambda state: {"loss": next(scores)}, evaluate_every=2, checkpoint_every=100)
    with Checkpointer(tmp_path / "checkpoints", config={}) as checkpointer:
        assert checkpointer.best_step == 4
        assert checkpointer.steps == (4, 8, 10)


@pytest.mark.slow
def test_two_processes_train_one_run_and_the_first_exports_it_alone(tmp_path):
    first, second = run_pair("two_process_run.py", tmp_path)
    assert (first["step"], second["step"]) == (4, 4)
    assert first["exported"] == ["Embed_0/embedding", "down/kernel", "up/bias", "up/kernel"]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    files = ["checkpoints", "config.json", "metrics.jsonl", "parameters.safetensors", "parameters.safetensors.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "tensorboard", "timings.jsonl"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


def test_each_batch_is_put_on_the_devices_as_asked_before_its_step(tmp_path):
    mesh = sharding.make_mesh("data:-1")
    put = functools.partial(sharding.shard_batch, mesh=mesh, rules=sharding.DATA)
    seen = []

    def step_fn(state, batch, key):
        seen.append(batch)
        return state.replace(step=state.step + 1), {"loss": jnp.float32(1)}

    def run(rows, workdir):
        batch = {"x": np.arange(rows * 3.0, dtype=np.float32).reshape(rows, 3), "y": np.zeros(rows, np.float32)}
        batches = toy_run.grain.MapDataset.source([0]).repeat().map(lambda _: batch).to_iter_dataset()
        toy_run.run(workdir, 1, step_fn=step_fn, batches=iter(batches), put=put, evaluate=None)
        return batch

    batch = run(16, tmp_path / "fits")
    assert seen[0]["x"].sharding == sharding.batch_sharding(mesh, sharding.DATA)
    np.testing.assert_array_equal(seen[0]["x"], batch["x"])
    with pytest.raises(sharding.ShardingError, match=r"x of shape \(15, 3\): rows must be a multiple of 8"):
        run(15, tmp_path / "does_not_fit")
