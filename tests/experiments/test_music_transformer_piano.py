"""The experiment on performances, small: every row trains, a run resumes, its page and its model's folder are whole."""

import html.parser
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from experiments import music_transformer_piano as piano
from experiments import piano_report
from jaxaudio import config as configs
from jaxaudio.convert.export import load
from jaxaudio.convert.music import read_music_model
from jaxaudio.data.event_batches import evaluation_event_batches
from jaxaudio.data.event_dataset import EventDataset
from jaxaudio.data.events import MAGENTA
from jaxaudio.data.midi import read_midi
from tests.experiments.tiny_performances import write_performances

TINY = [
    "dataset=folder",
    "num_workers=1",
    "model.transformer.num_layers=2",
    "model.transformer.embed_dim=16",
    "model.transformer.num_heads=2",
    "model.transformer.mlp_dim=16",
    "model.transformer.block_size=8",
    "length=32",
    "batch_size=8",
    "max_evaluation_rows=8",
    "num_steps=2",
    "log_every=1",
    "checkpoint_every=1",
    "prime_tokens=16",
    "sample_tokens=80",
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("piano")
    return [f"data_dir={write_performances(root / 'midi')}", f"cache_dir={root / 'cache'}"]


def tiny(row, folders, *changes):
    small = ["optimizer.num_steps=2", "optimizer.warmup_steps=1"]
    schedule = small if row.startswith("small") else ["optimizer.hidden_dim=16"]
    kept = [text for text in TINY if text.split("=")[0] not in {change.split("=")[0] for change in changes}]
    return configs.override(piano.ROWS[row], [*kept, *schedule, *folders, *changes])


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "relative"
    piano.main(tiny("small_relative_global", folders), workdir)
    return workdir


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


ROWS = [
    *("baseline", "local", "relative_global", "relative_local"),
    *(pytest.param(row, marks=pytest.mark.slow) for row in ("small_baseline", "small_local", "small_relative_local")),
]


@pytest.mark.parametrize("row", ROWS)  # `run` trains the other one
def test_every_row_trains_two_steps(row, folders, monkeypatch, tmp_path):
    results = []
    monkeypatch.setattr(piano_report, "finish", lambda *_, result, card, **__: results.append((result, card)))
    piano.main(tiny(row, folders), tmp_path)
    [(result, card)] = results
    assert piano_report.row_of(card) == row
    assert card.reached == result.nats["valid"]
    assert "model.transformer.embed_dim=16" in card.command
    losses = [line["train/loss"] for line in metrics(tmp_path) if "train/loss" in line]
    assert len(losses) == 2
    # Untrained, the loss is near that of guessing among 310 ids.
    assert all(abs(loss - np.log(310)) < 1.5 for loss in [*losses, *result.nats.values()])


def test_paper_rows_have_the_sizes_of_table_3():
    sizes = {
        name: (t.num_layers, t.mlp_dim, t.attention, t.positions, t.block_size if t.attention == "local" else None)
        for name in ("baseline", "local", "relative_global", "relative_local")
        for t in [piano.ROWS[name].model.transformer]
    }
    assert sizes == {
        "baseline": (6, 2048, "causal", "none", None),
        "local": (8, 1024, "local", "none", 512),
        "relative_global": (6, 2048, "causal", "relative", None),
        "relative_local": (6, 1024, "local", "relative", 512),
    }
    for name in sizes:
        config = piano.ROWS[name]
        t = config.model.transformer
        assert (t.embed_dim, t.num_heads, t.query_head_dim, t.value_dim, t.max_distance) == (
            256, 8, 64, 32, 1024 if t.positions == "relative" else t.max_distance,
        )  # fmt: skip
        assert (config.length, config.model.vocab_size, t.dropout_rate, config.optimizer.learning_rate) == (
            2048, 310, 0.1, 1.0,
        )  # fmt: skip


def test_a_finished_run_has_music_a_model_and_a_page(run, capsys):
    midi = sorted(path.stem for path in (run / "samples").glob("*.mid"))
    assert len(midi) == 5
    assert sum(name.startswith("continuation_of_piece") for name in midi) == 3
    assert all(read_midi(run / "samples" / f"{name}.mid") for name in midi)
    text = (run / "report.html").read_text()
    assert text.count("<audio") == 5
    assert text.count("<svg") == 9  # bars, losses, five rolls, the continuations side by side, attention
    assert not re.search(r'(?:src|href)="https?:', text)
    html.parser.HTMLParser().feed(text)
    for expected in ("1.861", "1.863", "1.835", "1.840", "relative_global is below the baseline, by +0.026", "bigram"):
        assert expected in text

    model = read_music_model(run / "model")
    assert (model.context, model.vocabulary) == (32, MAGENTA)
    exported = load(run / "parameters.safetensors")
    np.testing.assert_array_equal(model.params["embedding"]["embedding"], exported["embedding/embedding"])

    capsys.readouterr()
    piano.main(configs.from_json(piano.Config, (run / "config.json").read_text()), run)
    assert "complete" in capsys.readouterr().out
    losses = [line["train/loss"] for line in metrics(run) if "train/loss" in line]
    assert len(losses) == 2
    assert all(abs(loss - np.log(310)) < 1.5 for loss in losses)


def test_a_run_resumes_to_the_same_metrics(run, folders, monkeypatch, tmp_path):
    monkeypatch.setattr(piano_report, "finish", lambda *_, **__: None)
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "2")
    piano.main(tiny("small_relative_global", folders), resumed)
    assert (resumed / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_models_side_by_side_on_a_prime(run, folders, tmp_path):
    shutil.copytree(run / "model", tmp_path / "copy")
    prime = next(pathlib.Path(folders[0].removeprefix("data_dir=")).glob("*.mid"))
    models = f"models={run / 'model'},{tmp_path / 'copy'}"
    changes = [models, f"prime={prime}", "prime_s=1", "num_tokens=64", "num_samples=1"]
    piano_report.main(configs.override(piano_report.Config(), changes), tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out" / "samples").glob("*.mid")}
    assert names == {"prime", "relative_1", "copy_1"}
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("<audio") == 3
    assert text.count("<svg") == 6  # three rolls, the grid, two of attention
    best = min(line["validation/loss"] for line in metrics(run) if "validation/loss" in line)
    assert f"{best:.3f}" in text
    assert "unknown" in text
    # One key: the same model under two names writes the same.
    first, second = (tmp_path / "out" / "samples" / f"{name}_1.mid" for name in ("relative", "copy"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ([], r"expected models=DIR,DIR prime=FILE and num_samples of 1 or more, got \(\), None and 3"),
        (["models=a/model,b/a", "prime=x.mid"], r"two of \('a/model', 'b/a'\) have one name, of \['a'\]"),
        (["models={run}/model", "prime={prime}", "prime_s=0"], "the first 0.0 s of .* have no note"),
    ],
)
def test_what_cannot_be_compared_is_an_error(changes, match, run, folders, tmp_path):
    prime = next(pathlib.Path(folders[0].removeprefix("data_dir=")).glob("*.mid"))
    changes = [change.format(run=run, prime=prime) for change in changes]
    with pytest.raises(configs.ConfigError, match=match):
        piano_report.main(configs.override(piano_report.Config(), changes), tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("prime_tokens=33", r"prime_tokens must be in 1..32 \(length\), got 33"),
        ("prime_tokens=0", "got 0"),
        ("sample_tokens=16", "prime_tokens 16 must be less than sample_tokens 16"),
        ("num_steps=3", "optimizer.num_steps is 2, but the run's own 3"),
    ],
)
def test_fields_that_do_not_fit_are_errors_before_training(change, match, folders):
    with pytest.raises(configs.ConfigError, match=match):
        tiny("small_local", folders, change)


def test_performances_have_to_be_named(tmp_path):
    config = configs.override(piano.ROWS["small_local"], [f"cache_dir={tmp_path}"])
    with pytest.raises(configs.ConfigError, match="data_dir: expected the folder or zip of dataset=asap, got None"):
        piano.main(config, tmp_path / "run")


def test_places_of_events_by_hand():
    # 20 ms, the velocity, middle C on, 1 s, C off, B7 on.
    tokens = np.array([179, 290, 2 + 39, 277, 90 + 39, 2 + 86])
    assert piano_report.token_places(tokens, MAGENTA) == [
        None, None, (0.02, 60.0), None, (1.02, 60.0), (1.02, 107.0),
    ]  # fmt: skip


def test_counted_losses_equal_those_of_a_slow_loop(folders):
    folder = piano.write_tokens(tiny("small_local", folders))
    dataset = EventDataset(folder)
    batches = list(evaluation_event_batches(dataset, length=32, batch_size=3, max_rows=4))
    found = piano_report.count_losses(dataset, batches)
    pairs, singles = {}, {}
    for index in range(len(dataset.pieces["train"])):
        before = 0
        for token in dataset.tokens("train", index).tolist():
            pairs[before, token] = pairs.get((before, token), 0) + 1
            singles[token] = singles.get(token, 0) + 1
            before = token
    total, sums, count = sum(singles.values()), np.zeros(2), 0
    after = {}
    for (before, _), number in pairs.items():
        after[before] = after.get(before, 0) + number
    for batch in batches:
        for before, token in zip(batch["inputs"][batch["mask"]], batch["targets"][batch["mask"]], strict=True):
            unigram = (singles.get(token, 0) + 1) / (total + 310)
            bigram = (pairs.get((before, token), 0) + 310 * unigram) / (after.get(before, 0) + 310)
            sums -= np.log([unigram, bigram])
            count += 1
    np.testing.assert_allclose([found["unigram"], found["bigram"]], sums / count, rtol=1e-9)


def test_orders_of_rows():
    assert piano_report.order({"a": 2.0, "b": 1.0, "c": None}) == "b < a"
    assert piano_report.order({"a": None}) == "no row"
    worse = {"baseline": 1.5, "relative_global": 1.75}
    assert (
        piano_report.order(worse) == "baseline < relative_global; relative_global is NOT below the baseline, by -0.250"
    )


def test_cards_are_of_the_rows():
    assert [piano_report.row_of(card) for card in piano.CARDS] == [*piano.ROWS]
    assert [card.reported for card in piano.CARDS[:4]] == [1.861, 1.863, 1.835, 1.840]
