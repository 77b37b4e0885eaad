"""The page of a Whisper training: loss curves, card and config."""

import json
import pathlib

from jaxaudio.report import page, plots
from jaxaudio.report.card import Card


def write_page(workdir: pathlib.Path, *, headline: str, about: str, card: Card, config: str) -> pathlib.Path:
    """Writes workdir/report.html."""
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    series = {"training": "train/loss"}
    if any("validation/loss" in line for line in metrics):
        series["held out"] = "validation/loss"
    page.write_report(
        workdir / "report.html",
        title=card.system,
        headline=headline,
        sections=[
            page.Section("Result", (page.Text(about),)),
            page.Section(
                "Training", (page.Figure(plots.loss_curve(metrics, series), alt="Loss in nats per token over steps."),)
            ),
            page.Section("Card", (card,)),
            page.Section("Config", (page.Code("The resolved config of this run", config),)),
        ],
    )
    return workdir / "report.html"
