"""Checkpoints: exact on any number of devices, kept as promised, and every way to break one has its own error."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import toy_run

from jaxaudio.train import checkpoint
from jaxaudio.train.checkpoint import (
    CheckpointCorruptError,
    Checkpointer,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    library_versions,
    root_reason,
)

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {"embed_dim": 8, "rates": [1, 2.5], "name": None}


def new_state(step=1, embed_dim=8, sharding=None):
    """Leaves of several kinds: float32, bfloat16, int32 counts inside optax's named tuples, an absent part."""
    generator = np.random.default_rng(step)
    params = {
        "layers": {"kernel": jnp.asarray(generator.normal(size=(16, embed_dim)), jnp.float32)},
        "bias": jnp.asarray(generator.normal(size=(embed_dim,)), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    state = {"step": jnp.int32(step), "params": params, "opt_state": optimizer.init(params), "ema_params": None}
    state = StateWithOptimizer(**state)
    return state if sharding is None else jax.device_put(state, sharding(state))


class StateWithOptimizer(toy_run.State):
    opt_state: tuple
    ema_params: dict | None


def over_eight_devices(state):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec("data") if x.ndim and x.shape[0] % 8 == 0 else PartitionSpec()),
        state,
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def in_a_process(code: str, *arguments, devices: int = 1) -> subprocess.CompletedProcess:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'train'}", "XLA_FLAGS": flags}
    prelude = "import sys, jax, numpy as np\nfrom test_checkpoint import *\n"
    command = [sys.executable, "-c", prelude + code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_state_and_its_data_come_back_bit_for_bit_while_training_goes_on(tmp_path):
    batches = toy_run.new_batches()
    next(batches)
    state = toy_run.State(step=jnp.int32(1), params={"w": jnp.arange(4.0)})
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        checkpointer.save(state, batches)
        overwrite(state)  # the next step reuses the buffers while the save is still in the background
        following = next(batches)
    fresh = toy_run.new_batches()
    expected = toy_run.State(step=jnp.int32(1), params={"w": jnp.arange(4.0)})
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        assert_same_bits(checkpointer.restore(abstract(expected), fresh), expected)
    np.testing.assert_array_equal(next(fresh)["x"], following["x"])


@pytest.mark.parametrize(("least_slice", "compiles"), [(0, True), (checkpoint._LEAST_SLICE, False)])
def test_replicas_of_small_arrays_are_saved_whole_and_nothing_compiles(
    least_slice, compiles, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(checkpoint, "_LEAST_SLICE", least_slice)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    state = new_state(embed_dim=40, sharding=lambda _: NamedSharding(mesh, PartitionSpec()))
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        jax.config.update("jax_log_compiles", True)
        try:
            checkpointer.save(state, wait=True)
        finally:
            jax.config.update("jax_log_compiles", False)
        assert ("Compiling jit(slice)" in caplog.text) == compiles
        assert_same_bits(checkpointer.restore(abstract(state)), state)


def test_one_and_eight_devices_restore_each_other_bit_for_bit(tmp_path):
    state = new_state(step=1, sharding=over_eight_devices)
    assert len(state.params["layers"]["kernel"].sharding.device_set) == 8
    with Checkpointer(tmp_path / "eight", config=CONFIG) as checkpointer:
        checkpointer.save(state)
    code = """if True:
        assert jax.device_count() == 1
        with Checkpointer(sys.argv[1] + "/eight", config={}) as checkpointer:
            assert_same_bits(checkpointer.restore(abstract(new_state(step=5))), new_state(step=1))
        with Checkpointer(sys.argv[1] + "/one", config={}) as checkpointer:
            checkpointer.save(new_state(step=2))
    """
    done = in_a_process(code, tmp_path, devices=1)
    assert done.returncode == 0, done.stderr[-2000:]
    with Checkpointer(tmp_path / "one", config=CONFIG) as checkpointer:
        restored = checkpointer.restore(abstract(state))
    assert_same_bits(restored, new_state(step=2))
    assert restored.params["layers"]["kernel"].sharding == state.params["layers"]["kernel"].sharding


def test_config_and_versions_are_plain_json_in_every_checkpoint(tmp_path):
    import json

    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        checkpointer.save(new_state())
    saved = json.loads((tmp_path / "1" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert saved["config"] == CONFIG
    assert saved["versions"] == library_versions()
    assert saved["versions"]["jax"] == jax.__version__


def test_the_last_and_the_best_are_kept_also_after_reopening(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 3.0}
    with Checkpointer(tmp_path, config=CONFIG, keep_last=1, keep_best=1) as checkpointer:
        assert checkpointer.latest_step is None
        assert checkpointer.best_step is None
        for step, loss in losses.items():
            checkpointer.save(new_state(step), metrics={"loss": loss, "other": 0.0}, wait=True)
        assert checkpointer.steps == (2, 4)
    with Checkpointer(tmp_path, config=CONFIG, keep_last=1, keep_best=1) as checkpointer:
        assert (checkpointer.best_step, checkpointer.latest_step) == (2, 4)
        checkpointer.save(new_state(6))  # without metrics it is kept as the last only
        checkpointer.wait()
        assert checkpointer.steps == (2, 6)
        assert_same_bits(checkpointer.restore(abstract(new_state()), step=2), new_state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "6"]


def test_wrong_use_is_refused_with_the_values(tmp_path):
    with pytest.raises(ValueError, match="got 0 and 1"):
        Checkpointer(tmp_path, config=CONFIG, keep_last=0)
    with Checkpointer(tmp_path / "run", config=CONFIG) as checkpointer:
        with pytest.raises(ValueError, match=r"'loss'.*\['accuracy'\]"):
            checkpointer.save(new_state(), metrics={"accuracy": 1.0})
        with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint in .*/run; it has steps \[\]"):
            checkpointer.restore(abstract(new_state()))
        checkpointer.save(new_state(3), wait=True)
        with pytest.raises(CheckpointSaveError, match=r"step 3 is already saved in .*\[3\]"):
            checkpointer.save(new_state(3))
        with pytest.raises(CheckpointNotFoundError, match=r"of step 9 in .*; it has steps \[3\]"):
            checkpointer.restore(abstract(new_state()), step=9)
        with pytest.raises(CheckpointMismatchError, match="without a data iterator"):
            checkpointer.restore(abstract(new_state()), toy_run.new_batches())


def test_a_checkpoint_of_another_model_names_paths_and_shapes(tmp_path):
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        checkpointer.save(new_state(embed_dim=8), wait=True)
        with pytest.raises(CheckpointMismatchError) as caught:
            checkpointer.restore(abstract(new_state(embed_dim=4)))
        other = new_state()
        other = other.replace(params={"weight": jnp.zeros(3), **other.params})
        with pytest.raises(CheckpointMismatchError, match=r"params/weight: expected float32\[3\], found nothing"):
            checkpointer.restore(abstract(other))
        other = new_state()
        other.params["bias"] = other.params["bias"].astype(jnp.float32)
        with pytest.raises(CheckpointMismatchError, match=r"params/bias: expected float32\[8\], found bfloat16\[8\]"):
            checkpointer.restore(abstract(other))
    message = str(caught.value)
    assert "another model" in message
    assert "params/layers/kernel: expected float32[16, 4], found float32[16, 8]" in message
    assert "opt_state/1/0/mu/layers/kernel: expected float32[16, 4], found float32[16, 8]" in message


def test_a_checkpoint_of_another_number_of_processes_names_both_counts(tmp_path):
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        checkpointer.save(new_state(), toy_run.new_batches(), wait=True)
        (file,) = (tmp_path / "1" / "data").glob("process_*")
        file.rename(file.with_name("process_0-of-4.json"))
        (tmp_path / "1" / "data" / "process_3-of-4.json").touch()
        expected = r"iterators of 4 process\(es\), this run has 1; resume with the same number of processes"
        with pytest.raises(CheckpointMismatchError, match=expected):
            checkpointer.restore(abstract(new_state()), toy_run.new_batches())
        assert_same_bits(checkpointer.restore(abstract(new_state())), new_state())


# Orbax's reading threads outlive the event loop of a load that failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["arrays", "tree", "manifest", "removed"])
def test_a_damaged_checkpoint_names_itself_and_the_steps_to_fall_back_on(tmp_path, damage):
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        for step in (1, 2):
            checkpointer.save(new_state(step))
    folder = tmp_path / "2" / "state"
    patterns = {
        "arrays": "**/d/*",
        "tree": "_METADATA",
        "manifest": "manifest.ocdbt",
        "removed": "_METADATA",
    }
    for path in list(folder.glob(patterns[damage])):
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        with pytest.raises(CheckpointCorruptError, match=r"/2 is damaged: .+ resume from one of steps \[1\]"):
            checkpointer.restore(abstract(new_state()))
        assert_same_bits(checkpointer.restore(abstract(new_state()), step=1), new_state(1))
    shutil.rmtree(tmp_path / "1")
    with (
        Checkpointer(tmp_path, config=CONFIG) as checkpointer,
        pytest.raises(CheckpointCorruptError, match="start anew"),
    ):
        checkpointer.restore(abstract(new_state()))


BIG = "toy_run.State(step=jnp.int32({step}), params={{'w': jnp.asarray(np.random.default_rng(0).random(({size},)))}})"


def test_a_full_disk_raises_and_the_previous_checkpoint_survives(tmp_path):
    code = f"""if True:
        import resource
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        checkpointer = Checkpointer(sys.argv[1], config={{}}, keep_last=1, keep_best=0)
        checkpointer.save({BIG.format(step=1, size=100_000)}, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))
        for surface in (checkpointer.wait, lambda: checkpointer.save({BIG.format(step=3, size=10)})):
            checkpointer.save({BIG.format(step=2, size=100_000)})
            with pytest.raises(CheckpointSaveError, match="could not save step 2 in .* bytes free") as caught:
                surface()
            assert "File too large" in str(caught.value) and "remain: [1]" in str(caught.value), caught.value
            assert [path.name for path in pathlib.Path(sys.argv[1]).iterdir()] == ["1"]
            assert checkpointer.latest_step == 1
        checkpointer.save({BIG.format(step=2, size=100_000)})
        with pytest.raises(CheckpointSaveError, match="could not save step 2"):
            checkpointer.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        with Checkpointer(sys.argv[1], config={{}}, keep_last=1, keep_best=0) as checkpointer:
            target = abstract({BIG.format(step=0, size=100_000)})
            assert_same_bits(checkpointer.restore(target), {BIG.format(step=1, size=100_000)})
            checkpointer.save({BIG.format(step=2, size=100_000)}, wait=True)
            assert checkpointer.steps == (2,)
    """
    done = in_a_process(code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_step_and_no_debris(tmp_path):
    code = f"""if True:
        import signal
        checkpointer = Checkpointer(sys.argv[1], config={{}})
        checkpointer.save({BIG.format(step=1, size=1000)}, wait=True)
        big = {BIG.format(step=2, size=16_000_000)}
        jax.block_until_ready(big)
        checkpointer.save(big)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = in_a_process(code, tmp_path)
    assert done.returncode == -9, done.stderr[-3000:]
    assert any("tmp" in path.name for path in tmp_path.iterdir()), "the save was over before the kill"
    with Checkpointer(tmp_path, config={}) as checkpointer:
        assert checkpointer.latest_step == 1
        expected = toy_run.State(step=jnp.int32(1), params={"w": jnp.asarray(np.random.default_rng(0).random((1000,)))})
        assert_same_bits(checkpointer.restore(abstract(expected)), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_root_reason_is_the_deepest_system_error_on_one_line():
    system, wrapper = OSError(28, "No space left on device"), RuntimeError("a handler failed\nwith a page of text")
    wrapper.__cause__ = system
    assert root_reason(wrapper) == "OSError: [Errno 28] No space left on device"
    dump = ValueError("OUT_OF_RANGE: too short [tensorstore_spec='{...}']")
    assert root_reason(dump) == "ValueError: OUT_OF_RANGE: too short"
