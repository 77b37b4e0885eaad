"""The command: what it prints, its exit status, one line for an error, and nothing heavy for --help."""

import pathlib
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaudio
from jaxaudio import cli
from jaxaudio.convert.export import load
from jaxaudio.train.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[1]


class State(flax.struct.PyTreeNode):
    """As much of a train state as a checkpoint needs."""

    step: jax.Array
    params: dict
    ema_params: dict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    params = {"decoder": {"layers": {"kernel": jnp.arange(24.0).reshape(2, 3, 4)}}, "bias": jnp.ones(5)}
    average = jax.tree.map(lambda x: x / 2, params)
    with Checkpointer(folder / "checkpoints", config={"num_layers": 2}) as checkpointer:
        checkpointer.save(State(step=jnp.int32(30), params=params, ema_params=average))
    return folder


def command(*arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "jaxaudio.cli", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_export_writes_what_is_selected(run, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    assert cli.main(["export", str(run), str(out), "--select", "layers/1"]) == 0
    assert "1 arrays, 12 numbers, params of step 30" in capsys.readouterr().out
    np.testing.assert_array_equal(load(out)["decoder/layers/1/kernel"], np.arange(12.0, 24.0).reshape(3, 4))
    assert cli.main(["export", str(run), str(tmp_path / "a.npz"), "--ema"]) == 0
    np.testing.assert_array_equal(load(tmp_path / "a.npz")["bias"], np.full(5, 0.5))


def test_inspect_prints_the_table(run, capsys):
    assert cli.main(["inspect", str(run / "checkpoints" / "30")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["path", "shape", "dtype", "parameters"]
    assert ["decoder/layers/kernel", "[2,", "3,", "4]", "float32", "24"] in [line.split() for line in lines]
    assert ["total", "29"] in [line.split() for line in lines]
    text = "\n".join(lines)
    assert f"checkpoint  {run / 'checkpoints' / '30'}" in text
    assert "steps       30" in text
    assert '"num_layers": 2' in text
    assert f"jaxaudio {jaxaudio.__version__}" in text


def test_an_error_is_one_line_and_status_1(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "damaged")
    manifest = tmp_path / "damaged" / "checkpoints" / "30" / "state" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:20])
    for arguments, message in [
        (["export", run, tmp_path / "a.npz", "--select", "absent"], "'absent' is in none of 3 paths"),
        (["inspect", tmp_path / "damaged"], "30 is damaged"),
    ]:
        done = command(*arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"jaxaudio {arguments[0]}: ")
        assert message in done.stderr


def test_a_full_disk_is_one_line_too(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["export", str(run), str(tmp_path / "file" / "a.npz")]) == 1
    assert "jaxaudio export: [Errno" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["exprot"], ["export"], ["inspect", "a", "--select", "b"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main(arguments)
    assert exit_status.value.code == 2
    assert "usage: jaxaudio" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], ["export", "inspect"]),
        (["export", "--help"], ["CHECKPOINT", "--select REGEX", "--ema", ".safetensors"]),
        (["inspect", "--help"], ["CHECKPOINT"]),
        (["--version"], [f"jaxaudio {jaxaudio.__version__}"]),
    ],
)
def test_help_and_version_import_nothing_heavy(arguments, shown):
    code = """if True:
        import sys
        from jaxaudio import cli
        try:
            cli.main(sys.argv[1:])
        finally:
            print([name for name in ("jax", "flax", "numpy", "orbax", "grain", "torch") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    for text in shown:
        assert text in done.stdout


def test_malloc_thresholds_are_raised_on_glibc_and_left_alone_elsewhere(monkeypatch):
    code = """if True:
        import ctypes, re
        from jaxaudio.cli import raise_malloc_thresholds
        libc = ctypes.CDLL("libc.so.6")
        assert raise_malloc_thresholds()
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        block = libc.malloc(256 << 20)
        maps = [line.split() for line in open("/proc/self/maps")]
        heap = next(line for line in maps if line[-1] == "[heap]")
        first, last = (int(end, 16) for end in heap[0].split("-"))
        print(first <= block < last)
    """
    if sys.platform == "linux":
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        # A block of 256 MiB comes from the heap, which is kept, instead of a mapping of its own.
        assert done.stdout.strip() == "True", done.stderr

    def no_glibc(name):
        raise OSError(name)

    monkeypatch.setattr(cli.ctypes, "CDLL", no_glibc)
    assert cli.raise_malloc_thresholds() is False
