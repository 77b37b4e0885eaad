"""The numbers of Whisper's paper that an evaluation compares with, as tables, and its pictures of training hours.

Paper: Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356, tables 8, 9, 10 and 13, figures 3 and 4
Run:   python -m experiments.whisper_paper --workdir runs/paper
Hours: python -m experiments.whisper_paper --workdir runs/paper --set hours=hours.tsv

The first prints and writes the tables. The second draws the figures too: hours of training in a language against the
word error rate of transcribing it, and against the BLEU of translating it into English. The hours are those of the
paper's appendix E, which are not part of this repository: hours.tsv has a header and a line for each language,

    language   hours_transcribe   wer   hours_translate   bleu

parted by tabs, with Whisper's code of the language; a cell may be empty. Where a line has no wer, it is that of
table 13 for the model `column`; `python -m experiments.whisper_eval` measures others.
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from jaxaudio import config as config_lib
from jaxaudio.data.languages import language_code
from jaxaudio.report import page, plots

SOURCE = "Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356"
MODELS = ("tiny.en", "tiny", "base.en", "base", "small.en", "small", "medium.en", "medium", "large", "large-v2")
MULTILINGUAL = ("tiny", "base", "small", "medium", "large", "large-v2")


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
# Table 13, some of its languages.
FLEURS = {
    "en": _row(MULTILINGUAL, "12.4 8.9 6.1 4.4 4.5 4.2"),
    "de": _row(MULTILINGUAL, "27.8 17.9 10.2 6.5 5.5 4.5"),
    "es": _row(MULTILINGUAL, "15.9 9.9 5.6 3.6 3.5 3.0"),
    "fr": _row(MULTILINGUAL, "41.4 28.5 15.0 8.7 7.7 8.3"),
    "it": _row(MULTILINGUAL, "29.8 17.9 9.8 5.2 4.2 4.0"),
    "pt": _row(MULTILINGUAL, "20.1 13.0 7.3 5.0 4.8 4.3"),
    "nl": _row(MULTILINGUAL, "49.0 33.0 16.4 9.9 8.3 6.7"),
    "pl": _row(MULTILINGUAL, "45.6 30.8 14.7 8.0 7.2 5.4"),
    "ru": _row(MULTILINGUAL, "31.1 20.5 11.4 7.2 6.4 5.6"),
    "tr": _row(MULTILINGUAL, "42.5 27.5 15.9 10.4 9.4 8.4"),
    "ja": _row(MULTILINGUAL, "37.0 22.8 12.0 7.1 6.4 5.3"),
    "ko": _row(MULTILINGUAL, "36.1 27.8 19.6 16.4 15.2 14.3"),
    "zh": _row(MULTILINGUAL, "40.5 34.1 20.8 12.1 19.6 14.7"),
    "hi": _row(MULTILINGUAL, "102.3 101.1 38.4 26.8 26.9 21.5"),
}
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
        "FLEURS, WER % (table 13)": (MULTILINGUAL, FLEURS),
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
      hours: table of training hours, see the module; "" leaves the figures out.
      column: model of table 13 whose word error rates are drawn where the table of hours has none.
    """

    hours: str = ""
    column: str = "large-v2"

    def __post_init__(self):
        if self.column not in MULTILINGUAL:
            raise ValueError(f"column is {self.column!r}, expected one of {', '.join(MULTILINGUAL)}")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A line through y over log2 of the hours: `intercept` at one hour, `slope` for each doubling; r2 its r squared."""

    intercept: float
    slope: float
    r2: float


def read_hours(path: str | pathlib.Path, column: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Points of both figures: {"wer": {language: (hours, WER %)}, "bleu": {language: (hours, BLEU)}}.

    Raises:
      ValueError: another header, a language that Whisper does not know or that is there twice, a number that is not
        one, or fewer than three languages for both figures; with the line.
    """
    header = ("language", "hours_transcribe", "wer", "hours_translate", "bleu")
    lines = pathlib.Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    if tuple(lines[0].split("\t")) != header:
        raise ValueError(f"{path}:1: expected the header {' '.join(header)} with tabs, got {lines[0]!r}")
    points: dict[str, dict[str, tuple[float, float]]] = {"wer": {}, "bleu": {}}
    seen = set()
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        try:
            language, hours, wer, hours_translate, bleu = cells
            language = language_code(language)
            if language in seen:
                raise ValueError(f"{language} is there twice")
            seen.add(language)
            wer = wer or str(FLEURS.get(language, {}).get(column, ""))
            for kind, x, y in (("wer", hours, wer), ("bleu", hours_translate, bleu)):
                if x and y:
                    points[kind][language] = (_positive(x), _positive(y))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}; expected {', '.join(header)}, got {cells}") from error
    if all(len(found) < 3 for found in points.values()):
        raise ValueError(f"{path}: a line needs three languages or more, got {points}")
    return points


def _positive(text: str) -> float:
    number = float(text)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{text} is not a positive number")
    return number


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


def _figures(config: Config) -> list[page.Figure]:
    points = read_hours(config.hours, config.column)
    drawn = []
    if len(points["wer"]) >= 3:
        slope = fit_line(points["wer"], log_y=True).slope
        halves = f"It halves with {2 ** (-1 / slope):.1f} times the hours" if slope < 0 else "It does not fall"
        drawn.append(
            page.Figure(
                hours_figure(points["wer"], log_y=True, x_label="hours of transcribed audio", y_label="WER, %"),
                alt="Word error rate of each language over its hours in training.",
                caption="Word error rate of transcribing a language over its hours in training (the paper's figure "
                f"3). {halves}; the paper's line with 16 times, r² = 0.83.",
            )
        )
    if len(points["bleu"]) >= 3:
        drawn.append(
            page.Figure(
                hours_figure(points["bleu"], log_y=False, x_label="hours of translated audio", y_label="BLEU"),
                alt="BLEU of each language over its hours in training.",
                caption="BLEU of translating a language into English over its hours in training (the paper's figure "
                "4).",
            )
        )
    return drawn


def main(config: Config, workdir: pathlib.Path) -> None:
    """Prints the tables; writes them, and the figures if there are hours, to a page."""
    config_lib.claim_workdir(config, workdir)
    sections = []
    for title, (header, rows) in tables().items():
        print(f"\n{title}")
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        sections.append(page.Section(title, (page.Table(header, tuple(rows)),)))
    figures = _figures(config) if config.hours else []
    if figures:
        sections.insert(0, page.Section("Training hours", tuple(figures)))
    page.write_report(
        workdir / "report.html",
        title="Whisper: the paper's results",
        headline="What published weights reached in the paper; nothing of it was measured here.",
        sections=[*sections, page.Section("Source", (page.Text(f"{SOURCE}, tables 8, 9, 10 and 13."),))],
    )
    print(f"\nwrote {workdir / 'report.html'}: open it in a browser")


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, Config())
    try:
        main(config, workdir)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
