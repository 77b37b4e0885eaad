"""The experiment on accompaniments, small: every row trains, its page and its model's folder are whole."""

import json
import re

import numpy as np
import pytest

from experiments import accompaniment_report, piano_report
from experiments import music_transformer_accompaniment as experiment
from jaxaudio import config as configs
from jaxaudio.convert.music import read_music_model
from jaxaudio.models.music_transformer import AccompanimentTransformer
from tests.experiments.tiny_performances import write_performances

STACK = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 16, "block_size": 8}
TINY = [
    "dataset=folder",
    "num_workers=1",
    *(f"model.encoder.{name}={value}" for name, value in STACK.items()),
    *(f"model.decoder.transformer.{name}={value}" for name, value in STACK.items()),
    "segment.min_s=0.5",
    "segment.max_s=1",
    "segment.evaluation_s=1",
    "segment.length=32",
    "batch_size=8",
    "max_evaluation_segments=8",
    "num_steps=2",
    "log_every=1",
    "checkpoint_every=1",
    "sample_s=1",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("accompaniment")
    return [f"data_dir={write_performances(root / 'midi')}", f"cache_dir={root / 'cache'}"]


def tiny(row, folders, *changes):
    small = ["optimizer.num_steps=2", "optimizer.warmup_steps=1"]
    schedule = small if row.startswith("small") else ["optimizer.hidden_dim=16"]
    kept = [text for text in TINY if text.split("=")[0] not in {change.split("=")[0] for change in changes}]
    return configs.override(experiment.ROWS[row], [*kept, *schedule, *folders, *changes])


@pytest.mark.parametrize("row", [row for row in experiment.ROWS if row != "small"])  # which has a page below
def test_rows_train_two_steps(row, folders, monkeypatch, tmp_path):
    results = []
    monkeypatch.setattr(accompaniment_report, "finish", lambda *_, result, card, **__: results.append((result, card)))
    experiment.main(tiny(row, folders), tmp_path)
    [(result, card)] = results
    assert piano_report.row_of(card) == row
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 2
    assert all(abs(loss - np.log(310)) < 1.5 for loss in [*losses, *result.nats.values()])


def test_a_finished_run_has_music_a_model_and_a_page(folders, tmp_path, capsys):
    config = tiny("small", folders)
    experiment.main(config, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert len(re.findall("Piano roll of the melody", text)) == 3
    assert all(f"{number:.3f}" in text for number in (2.066, 1.786))
    assert not re.search(r'(?:src|href)="https?:', text)
    model = read_music_model(tmp_path / "model")
    assert isinstance(model.model, AccompanimentTransformer)
    assert (model.model.config, model.context) == (config.model, 32)
    capsys.readouterr()
    experiment.main(config, tmp_path)
    assert "complete" in capsys.readouterr().out


def test_the_table_says_whether_the_melody_helps():
    with_melody, without = (experiment.card(row, reached=value, steps=1, hardware="a machine") for row, value in (
        ("small", 2.25), ("small_without_melody", 2.5),
    ))  # fmt: skip
    table = accompaniment_report.rows_table([*experiment.CARDS[:2], with_melody, without], with_melody)
    assert table.rows[:2] == (("baseline", "2.066", "not trained"), ("relative", "1.786", "not trained"))
    assert table.rows[2:] == (("small", "-", "2.250"), ("small_without_melody", "-", "2.500"))
    assert "The melody helps, by +0.250" in table.caption


def test_rows_are_the_paper_s_and_one_budget_with_and_without_melody():
    baseline, relative, small, without = experiment.ROWS.values()
    assert baseline.model.decoder.transformer.positions == "none"
    assert relative.model.decoder.transformer.positions == "relative"
    assert relative.model.encoder.positions == "none"
    assert configs.differences(configs.to_dict(small), configs.to_dict(without)) == {
        "row": ("small", "small_without_melody"),
        "segment.has_melody": (True, False),
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("sample_s=2", r"sample_s must be in 0.01..1.0 \(segment.max_s\), got 2.0"),
        ("num_steps=3", "optimizer.num_steps is 2, but the run's own 3"),
    ],
)
def test_fields_that_do_not_fit_are_errors_before_training(change, match, folders):
    with pytest.raises(configs.ConfigError, match=match):
        tiny("small", folders, change)


def test_cards_are_of_the_rows():
    assert [piano_report.row_of(card) for card in experiment.CARDS] == [*experiment.ROWS]
    assert [card.reported for card in experiment.CARDS] == [2.066, 1.786, None, None]
