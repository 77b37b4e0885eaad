"""The experiments on chorales, small: every row trains, a killed run ends like an uninterrupted one, a page appears."""

import html.parser
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import __main__ as cards
from experiments import chorale_report, music_transformer_jsb, quickstart
from jaxaudio import config as configs
from jaxaudio.convert.export import inspect_checkpoint, load, to_tree
from jaxaudio.data.chorales import decode_tokens, grid_to_notes, read_chorale_midi
from jaxaudio.data.midi import read_midi
from jaxaudio.data.music21_chorales import Music21Chorales
from jaxaudio.models.music_transformer import MusicTransformer

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    "model.transformer.num_layers=2",
    "model.transformer.embed_dim=16",
    "model.transformer.num_heads=2",
    "model.transformer.mlp_dim=16",
    "length=32",
    "batch_size=8",
    "num_steps=2",
    "log_every=1",
    "prime_tokens=16",
    "sample_tokens=48",
]


def chorales(number: int, seed: int) -> tuple[np.ndarray, ...]:
    """Random walks in four voices that move every other step."""
    rng = np.random.default_rng(seed)
    grids = []
    for _ in range(number):
        walk = np.cumsum(rng.integers(-2, 3, (10, 4)), axis=0) + np.array([70, 65, 58, 48])
        grids.append(np.repeat(np.clip(walk, 36, 81), 2, axis=0).astype(np.int32))
    return tuple(grids)


@pytest.fixture
def jsb(monkeypatch):
    splits = {"train": chorales(16, 0), "valid": chorales(4, 1), "test": chorales(3, 2)}
    monkeypatch.setattr(music_transformer_jsb, "load_jsb", lambda *_: splits)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("row", music_transformer_jsb.ROWS)
def test_every_row_trains_two_steps(row, jsb, monkeypatch, tmp_path):
    results = []
    monkeypatch.setattr(chorale_report, "finish", lambda *_, nats, card, **__: results.append((nats, card)))
    schedule = "optimizer.hidden_dim=16" if row != "small" else "optimizer.num_steps=2"
    warmup = "optimizer.warmup_steps=1"
    config = configs.override(music_transformer_jsb.ROWS[row], [*TINY, schedule, warmup])
    music_transformer_jsb.main(config, tmp_path)
    [(nats, card)] = results
    assert row in card.system
    assert "model.transformer.embed_dim=16" in card.command
    assert "embed_dim=16" in card.deviations[-1]
    # Untrained, the loss is near that of guessing among 48 ids.
    assert all(abs(loss - np.log(48)) < 1.5 for loss in [nats, *losses(tmp_path)])
    assert len(losses(tmp_path)) == 2


def test_a_finished_run_has_music_parameters_and_a_page(jsb, tmp_path, capsys):
    config = configs.override(music_transformer_jsb.ROWS["relative"], [*TINY, "optimizer.hidden_dim=16"])
    music_transformer_jsb.main(config, tmp_path)
    midi = sorted((tmp_path / "samples").glob("*.mid"))
    assert len(midi) == len(list((tmp_path / "samples").glob("*.wav"))) == 6
    assert all(read_midi(path) for path in midi)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<audio") == 6
    assert text.count("<svg") == 10  # ladder, losses, six rolls, the two continuations side by side, attention
    assert not re.search(r'(?:src|href)="https?:', text)
    html.parser.HTMLParser().feed(text)

    # The checkpoint's own config rebuilds the model, and the exported parameters are the checkpoint's.
    summary = inspect_checkpoint(tmp_path)
    rebuilt = configs.from_dict(music_transformer_jsb.Config, summary.config)
    assert rebuilt == config == configs.from_json(music_transformer_jsb.Config, (tmp_path / "config.json").read_text())
    params = to_tree(load(tmp_path / "parameters.safetensors"))
    abstract = jax.eval_shape(
        lambda: MusicTransformer(rebuilt.model).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, nn.meta.unbox(abstract))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes

    capsys.readouterr()
    music_transformer_jsb.main(config, tmp_path)
    assert "complete" in capsys.readouterr().out


def test_quickstart_from_scores_to_page_and_again(monkeypatch, tmp_path, capsys):
    splits = {"train": chorales(16, 0), "valid": chorales(4, 1), "test": chorales(3, 2)}
    names = {split: tuple(f"bwv{number}.mxl" for number in range(len(grids))) for split, grids in splits.items()}
    monkeypatch.setattr(quickstart, "load_music21", lambda _: Music21Chorales(splits, names, {}, "0"))
    tiny = [*TINY, "optimizer.num_steps=2", "optimizer.warmup_steps=1"]
    config = configs.override(quickstart.Config(), tiny)
    quickstart.main(config, tmp_path)
    assert "best n-gram" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "samples").glob("*.mid")} == {
        *(f"chorale_{number}.mid" for number in range(1, 5)),
        "continuation_of_bwv0.mid",
        "continuation_of_bwv1.mid",
    }
    assert "not the JSB split" in (tmp_path / "report.html").read_text()
    # The continuation begins with its prime: 16 tokens are 4 steps of the held-out chorale.
    grid = read_chorale_midi(tmp_path / "samples" / "continuation_of_bwv0.mid")
    np.testing.assert_array_equal(grid[:4], splits["test"][0][:4])

    quickstart.main(config, tmp_path)
    assert "complete" in capsys.readouterr().out
    (tmp_path / "report.html").unlink()
    quickstart.main(config, tmp_path)
    assert (tmp_path / "report.html").exists()


def test_attention_is_drawn_for_a_note_when_the_middle_is_a_rest():
    config = configs.override(music_transformer_jsb.ROWS["relative"], [*TINY, "optimizer.hidden_dim=16"])
    model = MusicTransformer(config.model)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    tokens = np.array([*[30] * 8, *[1] * 8, *[31] * 4])
    piece = chorale_report.Piece("piece", tokens, grid_to_notes(decode_tokens(tokens)), np.zeros(1), None)
    assert chorale_report.attention_figure(model, params, piece, 12).figure.axes


@pytest.mark.parametrize(
    ("override", "match"),
    [
        (["prime_tokens=18"], "prime_tokens must be a positive multiple of 4, got 18"),
        (["prime_tokens=48"], "prime_tokens 48 must be less than sample_tokens 48"),
        (["num_steps=3"], "3"),
    ],
)
def test_fields_that_do_not_fit_are_errors_before_training(override, match):
    tiny = [text for text in TINY if text.split("=")[0] != override[0].split("=")[0]]
    schedule = ["optimizer.num_steps=2", "optimizer.warmup_steps=1"]
    with pytest.raises(configs.ConfigError, match=match):
        configs.override(quickstart.Config(), [*tiny, *schedule, *override])


SCRIPT = """
import pathlib, sys
from jaxaudio import sharding
sharding.split_cpu(2)
from experiments import chorale_report, music_transformer_jsb
from jaxaudio import config
from tests.experiments.test_chorale_experiments import TINY, chorales
music_transformer_jsb.load_jsb = lambda *_: {"train": chorales(16, 0), "valid": chorales(4, 1), "test": chorales(3, 2)}
chorale_report.finish = lambda *_, **__: None
overrides = [text for text in TINY if "num_steps" not in text and "batch_size" not in text]
overrides += ["num_steps=40", "batch_size=2", "checkpoint_every=7", "evaluate_every=20"]
overrides += ["optimizer.num_steps=40", "optimizer.warmup_steps=1"]
config = config.override(music_transformer_jsb.ROWS["small"], overrides)
music_transformer_jsb.main(config, pathlib.Path(sys.argv[1]))
"""


def start(workdir):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        # The runs are of one program, compiled by the first.
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(workdir)], cwd=ROOT, env=environment, stderr=log)


def test_a_killed_run_ends_with_the_metrics_of_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(timeout=300) == 0
    process, stop_at = start(killed), random.randrange(2, 38)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or f'"step": {stop_at},' not in metrics.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start(killed).wait(timeout=300) == 0
    assert metrics.read_bytes() == (whole / "metrics.jsonl").read_bytes(), f"killed after step {stop_at}"


def test_cards_name_their_rows_and_values_have_evidence():
    table = cards.all_cards()
    table = [card for card in table if "music_transformer_jsb" in card.command]
    rows = {card.command.rsplit("row=", 1)[1] for card in table}
    assert rows == set(music_transformer_jsb.ROWS)
    paper = {card.system.split(", ")[1]: card.reported for card in table}
    assert paper["baseline"] == 0.417
    assert paper["relative"] == 0.357
    assert paper["relative_cpsi_pitch_time"] == 0.335


@pytest.mark.parametrize("module", [music_transformer_jsb, quickstart])
def test_an_unknown_override_lists_the_real_fields(module):
    command = [sys.executable, "-m", module.__name__, "--workdir", "unused", "--set", "model.layers=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "model.layers" in done.stderr
    assert "transformer" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [("mesh=data:3", "ShardingError: mesh 'data:3'"), ("data_dir=nowhere", "JsbError: There is no Jsb16thSeparated")],
)
def test_what_a_user_can_mend_is_one_line(tmp_path, override, message):
    command = [sys.executable, "-m", "experiments.music_transformer_jsb", "--workdir", str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, "--set", "row=small", f"cache_dir={tmp_path}", override],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
