"""The command: what it prints, its exit status, one line for an error, and nothing heavy for --help."""

import math
import pathlib
import shutil
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr
from matplotlib import image
from safetensors.numpy import load_file
from whisper_small import BYTES, SMALL

import jaxaudio
from jaxaudio import cli
from jaxaudio.convert.export import load
from jaxaudio.convert.whisper import convert_whisper, save_whisper
from jaxaudio.models.whisper import Whisper
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


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper") / "ours"
    mel, tokens = jnp.zeros((1, SMALL.num_frames, SMALL.num_mels)), jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(Whisper(SMALL).init, jax.random.key(0), mel, tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), flax.core.meta.unbox(params))
    save_whisper(folder, SMALL, params, BYTES, dtype="float16")
    return folder


def test_convert_goes_both_ways(whisper_folder, tmp_path, capsys):
    hf, back, file = tmp_path / "hf", tmp_path / "back", tmp_path / "small.pt"
    assert cli.main(["convert", str(whisper_folder), str(hf)]) == 0
    assert capsys.readouterr().out == f"{hf}: float16, from the jaxaudio to the hf layout\n"
    assert cli.main(["convert", str(hf), str(back), "--format", "jaxaudio"]) == 0
    before, after = (load_file(folder / "parameters.safetensors") for folder in (whisper_folder, back))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    assert cli.main(["convert", str(hf), str(file)]) == 0
    assert cli.main(["convert", str(hf), str(back)]) == 1
    assert f"{back}" in capsys.readouterr().err
    assert cli.main(["convert", str(file), str(back), "--format", "hf", "--overwrite"]) == 1
    assert "comes without a tokenizer" in capsys.readouterr().err
    overwrite = ["--overwrite", "--tokenizer", str(hf)]
    assert cli.main(["convert", str(file), str(back), "--format", "hf", *overwrite]) == 0
    assert load_file(back / "model.safetensors").keys() == load_file(hf / "model.safetensors").keys()


def test_inspect_shows_a_whisper(whisper_folder, tmp_path, capsys):
    convert_whisper(whisper_folder, tmp_path / "small.pt")
    tables = []
    for path, layout, heads in (
        (whisper_folder, "jaxaudio", "2 heads"),
        (tmp_path / "small.pt", "openai", "all heads of the last half"),
    ):
        assert cli.main(["inspect", str(path)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["layout", layout] in lines
        assert "size none of the published ones" in map(" ".join, lines)
        assert any(" ".join(line).startswith(f"alignment {heads}") for line in lines)
        kernel = ["encoder/transformer/layers/mlp/up/kernel", "[2,", "80,", "320]", "float16", f"{2 * 80 * 320:,}"]
        assert kernel in lines
        assert '"text_length": 12,' in map(" ".join, lines)
        tables.append(lines[: lines.index([])])
    assert tables[0] == tables[1]
    mel, tokens = jnp.zeros((1, SMALL.num_frames, SMALL.num_mels)), jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(Whisper(SMALL).init, jax.random.key(0), mel, tokens)["params"]
    assert tables[0][-1] == ["total", f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)):,}"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A quarter of a second of stereo at 8 kHz: silence, then full scale on the left and a quarter of it right."""
    path = tmp_path_factory.mktemp("audio") / "take.wav"
    samples = np.zeros((2000, 2), np.int16)
    samples[1500:, 0], samples[1500:1504, 1] = np.tile([32767, -32768, 0, 1], 125), 8192
    soundfile.write(path, samples, 8000, subtype="PCM_16")
    return path


def test_inspect_shows_audio(recording, capsys):
    assert cli.main(["inspect", str(recording)]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (rows["container"], rows["codec"]) == ("wav", "pcm_16")
    assert rows["channels"] == "2"
    assert rows["bit"] == "depth        16"
    assert rows["sample"] == "rate      8000 Hz"
    assert rows["heard"] == f"at         16000 Hz, resampled by soxr {soxr.__version__} VHQ"
    assert rows["samples"] == "2,000 per channel"
    assert rows["duration"] == "0.250 s (0 min 0.250 s)"
    assert rows["peak"] == "0.00 dBFS"
    energy = 125 * ((32767 / 32768) ** 2 + 1 + 1 / 32768**2) + 4 * 0.25**2
    assert rows["RMS"] == f"{10 * math.log10(energy / 4000):.2f} dBFS"
    assert rows["clipped"] == "250 samples of 4,000 at full scale"
    # All but 500 instants, of which each fourth is 0 on the left and, from the second on, on the right.
    assert rows["digital"] == f"silence  {100 * (1500 + 124) / 2000:.2f} % of the time"
    assert rows["not"] == "finite       0 samples"


def test_plot_draws_a_part(recording, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "a.png"
    assert cli.main(["plot", "spectrogram", str(recording), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert image.imread(out).shape[2] == 4
    drawn = []
    monkeypatch.setattr(
        "jaxaudio.report.spectrogram.plot_spectrogram",
        lambda blocks, *rest, **named: drawn.append((np.concatenate(list(blocks)), rest, named)),
    )
    samples = soundfile.read(recording, dtype="float32")[0].mean(axis=1)
    for options, start, end in (([], 0, 2000), (["0.1875"], 1500, 2000), (["0.1", "0.0875"], 800, 1500)):
        flags = [text for pair in zip(("--start", "--duration"), options, strict=False) for text in pair]
        assert cli.main(["plot", "spectrogram", str(recording), *flags]) == 0
        waveform, rest, named = drawn.pop()
        np.testing.assert_array_equal(waveform, samples[start:end])
        assert rest == (8000, str(recording.with_suffix(".png")))
        assert named == {"start_s": start / 8000}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "TEXT"], "finds audio in it"),
        (["inspect", "EMPTY"], "is empty (0 bytes)"),
        (["inspect", "NOWHERE"], "there is no such file or folder"),
        (["inspect", "FOLDER"], "no checkpoint in"),
        (["convert", "FOLDER", "NOWHERE"], "no config.json"),
        (["convert", "nonsense", "NOWHERE"], "'nonsense' is no file or folder"),
        (["plot", "spectrogram", "TEXT"], "finds audio in it"),
        (["plot", "spectrogram", "AUDIO", "--start", "0.25"], "--start 0.25: expected a second"),
        (["plot", "spectrogram", "AUDIO", "--duration", "0"], "--duration 0.0: expected more than 0 s"),
        (["plot", "spectrogram", "AUDIO", "--out", "NOWHERE"], "NOWHERE"),
    ],
)
def test_what_files_lack_is_one_line(arguments, message, recording, tmp_path, capsys):
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "TEXT").write_text("no audio\n" * 20)
    (tmp_path / "EMPTY").write_bytes(b"")
    paths = {name: str(tmp_path / name) for name in ("FOLDER", "TEXT", "EMPTY", "NOWHERE")} | {"AUDIO": str(recording)}
    assert cli.main([paths.get(argument, argument) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxaudio {arguments[0]}: ")
    assert message in line


@pytest.mark.parametrize("arguments", [[], ["exprot"], ["export"], ["inspect", "a", "--select", "b"], ["plot"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main(arguments)
    assert exit_status.value.code == 2
    assert "usage: jaxaudio" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], ["transcribe", "convert", "inspect", "plot", "export"]),
        (["export", "--help"], ["CHECKPOINT", "--select REGEX", "--ema", ".safetensors"]),
        (["inspect", "--help"], ["CHECKPOINT_OR_AUDIO"]),
        (["transcribe", "--help"], ["FILE", "--manifest LIST.jsonl", "--beam_size", "(default: 5)"]),
        (["convert", "--help"], ["IN", "OUT", "--format {hf,jaxaudio}", "--overwrite"]),
        (["plot", "spectrogram", "--help"], ["FILE", "--out", "--start S", "--duration S"]),
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
