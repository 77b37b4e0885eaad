"""Summary and page of a comparison of codecs."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxaudio import config as config_lib
from jaxaudio.data.audio import load_audio
from jaxaudio.data.files import atomic_path
from jaxaudio.report import page, plots
from jaxaudio.report.spectrogram import compare_spectrograms

CLASSICAL = ("Opus", "Codec2")
LESS_IS_BETTER = ("mel distance", "STFT distance")
UNITS = {"SI-SNR": "dB"}
_NOT_MEASURES = ("index", "system", "family", "nominal_kbps", "recording", "duration_s", "num_bits")


def summarise(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each system, in the order of the results: real rate over all recordings, and means of the measures.

    A measure that cannot judge a recording (NaN) is the mean over the others; `num_left_out` has how many it left out.
    Codec2 has no SI-SNR.
    """
    rows = []
    for label in dict.fromkeys(result["system"] for result in results):
        found = [result for result in results if result["system"] == label]
        duration_s = sum(result["duration_s"] for result in found)
        row = {name: found[0][name] for name in ("system", "family", "nominal_kbps")}
        row |= {
            "num_recordings": len(found),
            "duration_s": duration_s,
            "kbps": sum(result["num_bits"] for result in found) / duration_s / 1000,
        }
        measures = {
            name: np.array([result[name] for result in found]) for name in found[0] if name not in _NOT_MEASURES
        }
        row["num_left_out"] = {name: int(np.isnan(values).sum()) for name, values in measures.items()}
        row["measures"] = {
            name: float(np.nanmean(values)) if not np.isnan(values).all() else None for name, values in measures.items()
        }
        if row["family"] == "Codec2":
            row["measures"]["SI-SNR"] = None  # it makes phases up
        rows.append(row)
    return rows


def rivals(summary: Sequence[Mapping[str, Any]], ours: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of each classical codec the cheapest rate that spends no less than ours, if it has one."""
    found = []
    for family in CLASSICAL:
        rates = [row for row in summary if row["family"] == family and row["kbps"] >= ours["kbps"]]
        found += [min(rates, key=lambda row: row["kbps"])] if rates else []
    return found


def is_better(measure: str, ours: float, theirs: float) -> bool:
    """Whether ours is the better of two values of a measure."""
    return ours < theirs if measure in LESS_IS_BETTER else ours > theirs


def write_sample(folder: pathlib.Path, recording: str, system: str, waveform: np.ndarray, sample_rate: int) -> None:
    """Keeps what is heard of a recording, as 16-bit flac."""
    import soundfile

    with atomic_path(sample_path(folder, recording, system)) as path:
        soundfile.write(path, np.clip(waveform, -1, 1), sample_rate, subtype="PCM_16")


def sample_path(folder: pathlib.Path, recording: str, system: str) -> pathlib.Path:
    """Where `write_sample` keeps it."""
    return folder / (re.sub(r"[^\w.-]+", "_", recording) + "." + re.sub(r"[^\w.-]+", "_", system) + ".flac")


def headline(summary: Sequence[Mapping[str, Any]]) -> str:
    """How often ours is better at no more bits, by ViSQOL, or else by the mel distance."""
    measure = next((name for name in summary[0]["measures"] if name.startswith("ViSQOL")), "mel distance")
    pairs = [
        (ours["measures"][measure], rival["measures"][measure])
        for ours in summary
        if ours["family"] not in CLASSICAL
        for rival in rivals(summary, ours)
    ]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return f"{len(summary)} codecs and rates on {summary[0]['num_recordings']} recordings."
    wins = sum(is_better(measure, *pair) for pair in pairs)
    return f"By {measure}, ours is better in {wins} of {len(pairs)} comparisons with classical codecs at no fewer bits."


def write_page(
    workdir: pathlib.Path,
    config: Any,
    summary: Sequence[Mapping[str, Any]],
    recordings: Sequence[str],
    notes: Sequence[str],
) -> pathlib.Path:
    """Writes workdir/report.html: the table, rate against each measure, the rivals at our bits, and what is heard."""
    first = summary[0]
    about = (
        f"{first['num_recordings']} recordings, {first['duration_s'] / 60:.1f} minutes, compared at "
        f"{config.sample_rate} Hz, as the mean of their channels. Rates are what was written: of our files all bytes, "
        "two headers and checksums included; of Opus the packets and of Codec2 the frames, without any container. "
        "Codec2 makes phases up and has no SI-SNR."
    )
    sections = [
        page.Section("Result", (page.Text("\n\n".join([about, *_left_out(summary), *notes])), _table(summary))),
        page.Section(
            "Rate and distortion",
            (
                page.Figure(
                    _curves(summary),
                    alt="For each measure, lines of each codec over the rate that it spends.",
                    caption="Means over all recordings, over the bits that were written.",
                ),
            ),
        ),
        page.Section("At our bits", (_rivals_table(summary),)),
        *(_listen(workdir / "samples", config, summary, name) for name in recordings),
        page.Section("Config", (page.Code("The resolved config of this run", config_lib.to_json(config)),)),
    ]
    path = workdir / "report.html"
    page.write_report(path, title=f"Codecs, {config.row}", headline=headline(summary), sections=sections)
    return path


def _left_out(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    counts = {name: max(row["num_left_out"][name] for row in summary) for name in summary[0]["num_left_out"]}
    return [f"{name} cannot judge {count} of the recordings." for name, count in counts.items() if count]


def _table(summary: Sequence[Mapping[str, Any]]) -> page.Table:
    names = list(summary[0]["measures"])
    header = ("codec", "nominal kbps", "kbps", *(_title(name) for name in names))
    rows = tuple(
        (
            row["system"],
            f"{row['nominal_kbps']:.2f}",
            f"{row['kbps']:.2f}",
            *(_value(row["measures"][name]) for name in names),
        )
        for row in sorted(summary, key=lambda row: row["kbps"])
    )
    return page.Table(header, rows, caption="Of distances less is better, of all else more.")


def _rivals_table(summary: Sequence[Mapping[str, Any]]) -> page.Table:
    names = list(summary[0]["measures"])
    rows = []
    for ours in summary:
        for rival in rivals(summary, ours) if ours["family"] not in CLASSICAL else ():
            cells = []
            for name in names:
                pair = ours["measures"][name], rival["measures"][name]
                verdict = "" if None in pair else " better" if is_better(name, *pair) else " worse"
                cells.append(f"{_value(pair[0])} : {_value(pair[1])}{verdict}")
            rows.append((ours["system"], f"{ours['kbps']:.2f}", rival["system"], f"{rival['kbps']:.2f}", *cells))
    header = ("ours", "kbps", "the other", "kbps", *(_title(name) for name in names))
    return page.Table(header, tuple(rows), caption="Each beside the cheapest classical rate that spends no fewer bits.")


def _title(measure: str) -> str:
    return f"{measure}, {UNITS[measure]}" if measure in UNITS else measure


def _value(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _curves(summary: Sequence[Mapping[str, Any]]) -> Figure:
    names = list(summary[0]["measures"])
    families = list(dict.fromkeys(row["family"] for row in summary))
    figure = Figure(figsize=(9.6, 3.2 * -(-len(names) // 2)), layout="constrained")
    for panel, name in enumerate(names, 1):
        axes = plots.style_axes(figure.add_subplot(-(-len(names) // 2), 2, panel))
        for number, family in enumerate(families):
            rows = sorted((row for row in summary if row["family"] == family), key=lambda row: row["kbps"])
            values = [np.nan if row["measures"][name] is None else row["measures"][name] for row in rows]
            style = {"linestyle": "--"} if family in CLASSICAL else {}
            colour = plots.COLOURS[number % len(plots.COLOURS)]
            axes.plot(
                [row["kbps"] for row in rows], values, color=colour, marker="o", markersize=4, label=family, **style
            )
        axes.set_xscale("log")
        ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32, 64) if _spans(summary, tick)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("kbps written")
        axes.set_ylabel(_title(name) + (" (less is better)" if name in LESS_IS_BETTER else ""))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, labelcolor=plots.INK, fontsize=9
    )
    return figure


def _spans(summary: Sequence[Mapping[str, Any]], kbps: float) -> bool:
    rates = [row["kbps"] for row in summary]
    return min(rates) / 1.5 <= kbps <= max(rates) * 1.5


def _listen(folder: pathlib.Path, config: Any, summary: Sequence[Mapping[str, Any]], recording: str) -> page.Section:
    """One recording through all codecs: players, and the spectrograms of the original, of ours and of their rivals."""
    rows = sorted(summary, key=lambda row: (row["family"] in CLASSICAL, row["family"], row["kbps"]))
    heard = {
        name: load_audio(sample_path(folder, recording, name), config.sample_rate)
        for name in ["original", *(row["system"] for row in rows)]
    }
    rate = next(rate for rate in page.MP3_SAMPLE_RATES[::-1] if rate <= config.sample_rate)
    kbps = {row["system"]: f"{row['kbps']:.2f} kbps" for row in rows}
    ours = [row for row in rows if row["family"] not in CLASSICAL] or rows
    shown = [ours[0], ours[-1], *rivals(summary, ours[0]), *rivals(summary, ours[-1])]
    shown = ["original", *dict.fromkeys(row["system"] for row in shown)]
    titles = {name: f"{name}, {kbps[name]}" if name in kbps else name for name in heard}
    return page.Section(
        recording,
        (
            page.Figure(
                compare_spectrograms({titles[name]: heard[name] for name in shown}, config.sample_rate),
                alt=f"Spectrograms of {recording}: {', '.join(shown)}.",
            ),
            *(
                page.Audio(titles[name], _at(waveform, config.sample_rate, rate), rate)
                for name, waveform in heard.items()
            ),
        ),
    )


def _at(waveform: np.ndarray, sample_rate: int, rate: int) -> np.ndarray:
    if rate != sample_rate:
        import soxr

        waveform = soxr.resample(waveform, sample_rate, rate)
    return np.clip(waveform, -1, 1)
