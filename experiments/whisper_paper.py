"""The numbers of Whisper's paper that an evaluation compares with, as tables, and its pictures of training hours.

Paper: Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356, tables 8, 9, 10, 13 and 14, figures 3, 4 and 11
Run:   python -m experiments.whisper_paper --workdir runs/paper

It prints and writes the tables and draws hours of training in a language against the word error rate of transcribing
it, and against the BLEU of translating it into English.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.whisper_paper_languages import (
    FLEURS_BLEU,
    FLEURS_WER,
    HOURS_TRANSCRIBED,
    HOURS_TRANSLATED,
    MULTILINGUAL,
)
from jaxaudio import config as config_lib
from jaxaudio.report import page, plots

SOURCE = "Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356"
PARTS = "tables 8, 9, 10, 13 and 14, figures 3, 4 and 11"
MODELS = ("tiny.en", "tiny", "base.en", "base", "small.en", "small", "medium.en", "medium", "large", "large-v2")


def _row(models: Sequence[str], values: str) -> dict[str, float]:
    return dict(zip(models, map(float, values.split()), strict=True))


# Word error rates in percent. Tables 8 and 9: English, without timestamps greedily, and by beam search with fallback.
LIBRISPEECH = {
    ("greedy", "test_clean"): _row(MODELS, "5.6 7.6 4.2 5.0 3.1 3.4 3.1 2.9 2.7 2.7"),
    ("greedy", "test_other"): _row(MODELS, "14.6 16.9 10.2 12.4 7.4 7.6 6.3 5.9 5.6 5.2"),
    ("beam", "test_clean"): _row(MODELS, "5.4 6.7 4.1 4.9 3.2 3.3 3.0 2.7 2.8 2.5"),
    ("beam", "test_other"): _row(MODELS, "12.8 15.0 9.6 11.0 6.7 7.2 5.7 5.6 5.7 4.9"),
}
LIBRISPEECH_TABLES = {"greedy": 8, "beam": 9}
# Table 10, Multilingual LibriSpeech, of one model.
_MLS = {"nl": 9.3, "en": 6.2, "fr": 7.3, "de": 5.5, "it": 13.8, "pl": 5.0, "pt": 6.8, "es": 4.2}
MLS = {language: {"large-v2": wer} for language, wer in _MLS.items()}
# Optimizer steps behind the published weights, tables 17 to 19.
TRAINED_STEPS = {model: 655_360 if model == "large-v2" else 1_048_576 for model in MODELS}


def column_of(model: str) -> str | None:
    """The paper's name of a published model, from its size or its hub id; None where the paper has no such model.

    The paper's "large" is what was later called large-v1: `openai/whisper-large` on the hub, while the size "large" of
    today's packages is large-v3.
    """
    if model.startswith("openai/whisper-"):
        name = model.removeprefix("openai/whisper-")
    else:
        name = {"large-v1": "large", "large": "large-v3"}.get(model, model)
    return name if name in MODELS else None


def tables() -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """The paper's word error rates: title -> (header, rows), "-" where it has none."""
    named = {
        "LibriSpeech, WER % (tables 8 and 9)": (
            MODELS,
            {
                f"{split.replace('_', '-')}, {decoding} (table {LIBRISPEECH_TABLES[decoding]})": row
                for (decoding, split), row in LIBRISPEECH.items()
            },
        ),
        "FLEURS, WER % (table 13)": (MULTILINGUAL, FLEURS_WER),
        "FLEURS into English, BLEU (table 14)": (MULTILINGUAL, FLEURS_BLEU),
        "Multilingual LibriSpeech, WER % (table 10)": (("large-v2",), MLS),
    }
    return {
        title: (
            ("data", *models),
            [(name, *(f"{row[model]:.1f}" if model in row else "-" for model in models)) for name, row in rows.items()],
        )
        for title, (models, rows) in named.items()
    }


@dataclasses.dataclass(frozen=True)
class Config:
    """What is written.

    Attributes:
      column: model of tables 13 and 14 in the figures. With "large" the lines are those of the paper.
    """

    column: str = "large"

    def __post_init__(self):
        if self.column not in MULTILINGUAL:
            raise ValueError(f"column is {self.column!r}, expected one of {', '.join(MULTILINGUAL)}")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A line through y over log2 of the hours: `intercept` at one hour, `slope` for each doubling; r2 its r squared."""

    intercept: float
    slope: float
    r2: float


def points(column: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Of figure 3, {"wer": {language: (hours, WER %)}}, and of figure 4, {"bleu": {language: (hours, BLEU)}}."""
    kinds = {"wer": (HOURS_TRANSCRIBED, FLEURS_WER), "bleu": (HOURS_TRANSLATED, FLEURS_BLEU)}
    return {
        kind: {
            language: (hours[language], reached[language][column])
            for language in hours
            if column in reached.get(language, {})
        }
        for kind, (hours, reached) in kinds.items()
    }


def fit_line(points: Mapping[str, tuple[float, float]], *, log_y: bool) -> Fit:
    """Least squares of y, or of its log2, over log2 of the hours."""
    x, y = np.log2([hours for hours, _ in points.values()]), np.array([value for _, value in points.values()])
    y = np.log2(y) if log_y else y
    slope, intercept = np.polyfit(x, y, 1)
    return Fit(float(intercept), float(slope), float(np.corrcoef(x, y)[0, 1] ** 2))


def hours_figure(points: Mapping[str, tuple[float, float]], *, log_y: bool, x_label: str, y_label: str) -> Figure:
    """A point with its code for each language over the hours on a logarithmic axis, and the line through them."""
    fit = fit_line(points, log_y=log_y)
    hours, values = np.transpose(list(points.values()))
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = plots.style_axes(figure.add_subplot())
    axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    axes.plot(hours, values, "o", color=plots.COLOURS[0], markersize=4.5)
    for language, point in points.items():
        axes.annotate(language, point, (4, 3), textcoords="offset points", color=plots.INK, size=8)
    ends = np.geomspace(hours.min(), hours.max(), 50)
    line = fit.intercept + fit.slope * np.log2(ends)
    label = f"{len(points)} languages, r² = {fit.r2:.2f}"
    axes.plot(ends, 2**line if log_y else line, color=plots.COLOURS[1], linewidth=1.6, label=label)
    axes.xaxis.set_major_formatter("{x:g}")
    if log_y:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, labelcolor=plots.INK, fontsize=9)
    return figure


def _figures(column: str) -> tuple[page.Figure, page.Figure]:
    found = points(column)
    times = 2 ** (-1 / fit_line(found["wer"], log_y=True).slope)
    return (
        page.Figure(
            hours_figure(found["wer"], log_y=True, x_label="hours of transcribed audio", y_label="WER, %"),
            alt="Word error rate of each language over its hours in training.",
            caption=f"Word error rate of {column} on FLEURS over a language's hours in training (the paper's figure "
            f"3). It halves with {times:.1f} times the hours; the paper says 16 times, r² = 0.83.",
        ),
        page.Figure(
            hours_figure(found["bleu"], log_y=False, x_label="hours of translated audio", y_label="BLEU"),
            alt="BLEU of each language over its hours in training.",
            caption=f"BLEU of {column} on FLEURS into English over a language's hours in training (the paper's figure "
            "4, r² = 0.24).",
        ),
    )


def main(config: Config, workdir: pathlib.Path) -> None:
    """Prints the tables; writes them and the figures to a page."""
    config_lib.claim_workdir(config, workdir)
    sections = []
    for title, (header, rows) in tables().items():
        print(f"\n{title}")
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        sections.append(page.Section(title, (page.Table(header, tuple(rows)),)))
    sections.insert(0, page.Section("Training hours", _figures(config.column)))
    page.write_report(
        workdir / "report.html",
        title="Whisper: the paper's results",
        headline="What published weights reached in the paper; nothing of it was measured here.",
        sections=[
            *sections,
            page.Section("Source", (page.Text(f"{SOURCE}, tables 8 to 10, 13 and 14, figures 3, 4 and 11."),)),
        ],
    )
    print(f"\nwrote {workdir / 'report.html'}: open it in a browser")


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, Config())
    try:
        main(config, workdir)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
