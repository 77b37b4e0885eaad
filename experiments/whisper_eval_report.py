"""Summary and page of an evaluation of speech recognition."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import whisper_paper
from jaxaudio import config as config_lib
from jaxaudio.data.word_errors import ErrorCounts
from jaxaudio.report import page, plots
from jaxaudio.report.card import Card

_LENGTHS_S = (0, 5, 10, 15, 20, 25, 30)
_NUM_WORST = 25


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of the utterances' counts, and the rates they give: words and characters, all and by the audio's length."""
    by_length = []
    for start, end in zip(_LENGTHS_S, (*_LENGTHS_S[1:], np.inf), strict=True):
        found = [result for result in results if start <= result["duration_s"] < end]
        if found:
            length = f"{start}–{end} s" if end < np.inf else f"{start} s and longer"
            by_length.append({"length": length, "num_utterances": len(found), **_rates("words", found)})
    return {
        "num_utterances": len(results),
        "audio_s": sum(result["duration_s"] for result in results),
        "num_cut": sum(result["cut_s"] > 0 for result in results),
        "cut_s": sum(result["cut_s"] for result in results),
        "words": _rates("words", results),
        "characters": _rates("characters", results),
        "by_length": by_length,
    }


def _rates(unit: str, results: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    counts = sum((ErrorCounts(**result[unit]) for result in results), ErrorCounts(0, 0, 0, 0))
    return {
        "rate": counts.rate,
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
        "num_reference": counts.num_reference,
    }


def headline(config: Any, summary: Mapping[str, Any]) -> str:
    """The result in a sentence."""
    beside = ""
    if summary["paper"] is not None:
        model, wer = summary["paper"]
        beside = f"; the paper's {model} has {wer:.1f} %"
    return (
        f"{config.model}: word error rate {100 * summary['words']['rate']:.2f} % on {summary['num_utterances']} "
        f"utterances of {config.data}{beside}."
    )


def write_page(
    workdir: pathlib.Path,
    config: Any,
    results: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    hardware: str,
) -> pathlib.Path:
    """Writes workdir/report.html: rates, their dependence on the length, the worst utterances, card and config."""
    counts = tuple(
        (
            unit,
            f"{100 * summary[unit]['rate']:.2f}",
            *(f"{summary[unit][name]:,}" for name in ("substitutions", "deletions", "insertions", "num_reference")),
        )
        for unit in ("words", "characters")
    )
    header = ("", "error rate, %", "substitutions", "deletions", "insertions", "in the references")
    about = (
        f"{summary['num_utterances']} utterances, {summary['audio_s'] / 3600:.2f} h of audio, in normalised text as in "
        "the paper."
    )
    if summary["num_cut"]:
        about += (
            f" {summary['num_cut']} of them are longer than the model's window: {summary['cut_s']:.1f} s of audio were "
            "not heard."
        )
    sections = [
        page.Section("Result", (page.Text(about), page.Table(header, counts))),
        page.Section(
            "By length",
            (
                page.Figure(
                    _bars(summary["by_length"]),
                    alt="Bars of the word error rate by the length of the audio.",
                    caption="Word error rate by the length of the audio, with the number of utterances.",
                ),
            ),
        ),
        page.Section("The worst utterances", (_worst(results),)),
    ]
    if summary["paper"] is not None:
        sections.append(page.Section("Card", (_card(config, summary, hardware),)))
    sections.append(page.Section("Config", (page.Code("The resolved config of this run", config_lib.to_json(config)),)))
    path = workdir / "report.html"
    page.write_report(
        path, title=f"Whisper evaluation, {config.row}", headline=headline(config, summary), sections=sections
    )
    return path


def _bars(by_length: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = plots.style_axes(figure.add_subplot())
    rates = [100 * group["rate"] for group in by_length]
    drawn = axes.bar(range(len(rates)), np.nan_to_num(rates, posinf=0.0), color=plots.COLOURS[0], width=0.66)
    axes.bar_label(drawn, labels=[f"{rate:.1f}" for rate in rates], padding=3, color=plots.INK, fontsize=9)
    axes.set_xticks(range(len(rates)), [f"{group['length']}\n({group['num_utterances']})" for group in by_length])
    axes.set_ylabel("WER, %")
    return figure


def _worst(results: Sequence[Mapping[str, Any]]) -> page.Table:
    """The utterances with the most errors in words."""

    def errors(result):
        return ErrorCounts(**result["words"]).errors

    worst = sorted(results, key=lambda result: (-errors(result), result["index"]))[:_NUM_WORST]
    rows = tuple(
        (
            result["id"],
            f"{errors(result)}",
            f"{result['words']['num_reference']}",
            result["reference"],
            result["hypothesis"],
        )
        for result in worst
    )
    return page.Table(("utterance", "errors", "words", "what was said", "what was heard"), rows)


def _card(config: Any, summary: Mapping[str, Any], hardware: str) -> Card:
    model, wer = summary["paper"]
    deviations = []
    if config.dtype != "float32" or config.int8:
        deviations.append(f"Computed in {config.dtype}{' with an 8-bit decoder' if config.int8 else ''}.")
    if summary["num_cut"]:
        deviations.append(
            f"{summary['cut_s']:.1f} s after the first window of {summary['num_cut']} utterances not heard."
        )
    return Card(
        system=f"Whisper {model}, published weights",
        paper=f"{whisper_paper.SOURCE}, row {config.row}",
        metric=f"{config.data} {config.split}, {config.decoding}, WER %",
        reported=wer,
        reached=100 * summary["words"]["rate"],
        status="measured by this run",
        steps=whisper_paper.TRAINED_STEPS[model],
        hardware=hardware,
        command=f"python -m experiments.whisper_eval --workdir runs/{config.row} --set row={config.row} "
        f"model={config.model} path={config.path}",
        deviations=tuple(deviations) or ("none",),
    )
