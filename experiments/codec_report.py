"""A trained codec's folder, what its test recordings become at each bitrate, and the page of its run."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.codec_training import EvaluationConfig
from jaxaudio.convert.codec import CodecCheckpoint, load_codec, save_codec
from jaxaudio.convert.codec_read import Kind
from jaxaudio.data.audio import RESAMPLER
from jaxaudio.data.recordings import Recording
from jaxaudio.generate.codec import Codec
from jaxaudio.nn.codec import Codec as CodecModel
from jaxaudio.nn.codec import CodecConfig
from jaxaudio.ops.metrics import multi_scale_mel_distance, si_snr
from jaxaudio.report import page, plots
from jaxaudio.report.card import Card
from jaxaudio.report.spectrogram import compare_spectrograms

_LONGEST_WINDOW = 2048  # of the mel distance, which mirrors half of it


@dataclasses.dataclass(frozen=True)
class Measured:
    """The test recordings of one folder at one bitrate."""

    folder: str
    kbps: float
    num_recordings: int
    duration_s: float
    si_snr: float
    mel_distance: float


def finish(
    workdir: pathlib.Path,
    kind: Kind,
    model: CodecModel,
    params: Any,
    recordings: Sequence[Recording],
    evaluation: EvaluationConfig,
    *,
    card: Card,
    config_text: str,
    about: str,
) -> None:
    """Writes workdir/codec, codes the test recordings with it as it is read back, writes workdir/report.html.

    Args:
      workdir: of the run, with its metrics.jsonl.
      kind, model, params: what was trained, weight norm and all.
      recordings: of the test split.
      evaluation: which of them at which bitrates.
      card: of the run; the mean mel distance at the highest rate is written into it as reached.
      config_text: the run's resolved config.
      about: the data and what else a reader should know.
    """
    folder = workdir / "codec"
    name = f"{workdir.absolute().name}_{kind}"
    save_codec(CodecCheckpoint(kind, model.config, params, name), folder, overwrite=True)
    checkpoint = load_codec(folder)
    codec = Codec(checkpoint.name, type(model)(checkpoint.config), checkpoint.params)
    chosen = choose(recordings, evaluation.max_recordings)
    coded = [(recording, code(codec, recording, evaluation.num_codebooks)) for recording in chosen]
    results = measure(codec.config, coded, evaluation.crop_s)
    overall = [result for result in results if result.folder == results[-1].folder]
    best = max(overall, key=lambda result: result.kbps)
    headline = "; ".join(
        f"{r.kbps:g} kbps: mel distance {r.mel_distance:.2f}, SI-SNR {r.si_snr:.1f} dB" for r in overall
    )
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    examples = [coded[index] for index in np.linspace(0, len(coded) - 1, evaluation.num_examples).round().astype(int)]
    left_out = len(recordings) - len(chosen)
    about += (
        f"\n\n{len(chosen)} of {len(recordings)} test recordings were coded whole by the folder codec/ of this run"
        + (f"; the {left_out} others are too many, or too short for the mel distance." if left_out else ".")
        + f" SI-SNR is the mean over recordings; for DAC's mel distance the recordings of a folder are joined and cut "
        f"into pieces of {evaluation.crop_s:g} s. Resampled by {RESAMPLER}."
    )
    page.write_report(
        workdir / "report.html",
        title=card.system,
        headline=headline,
        sections=[
            page.Section("Result", (page.Text(about), results_table(results))),
            page.Section("Training", training_figures(metrics)),
            *(listen(codec.config, *example) for example in examples),
            page.Section("Cards", (dataclasses.replace(card, reached=best.mel_distance),)),
            page.Section("Config", (page.Code("The resolved config of this run", config_text),)),
        ],
    )
    print(f"{headline}\nwrote {folder} and {workdir / 'report.html'}: open it in a browser")


def own_card(cards: Sequence[Card], row: str, *, steps: int, hardware: str) -> Card:
    """The card of a run of ours: the row's, without what the paper reports by measures that a run does not have."""
    card = next(card for card in cards if f"row={row} " in card.command)
    return dataclasses.replace(
        card,
        metric="mel distance at the highest rate on held-out recordings",
        reported=None,
        status="trained by this run",
        steps=steps,
        hardware=hardware,
    )


def choose(recordings: Sequence[Recording], count: int) -> list[Recording]:
    """At most `count` of each folder, evenly; neither silent ones nor those that the mel distance cannot measure."""
    folders: dict[str, list[Recording]] = {}
    for recording in recordings:
        if len(recording.waveform) > _LONGEST_WINDOW and recording.peak > 0:
            folders.setdefault(_folder(recording), []).append(recording)
    return [found[:: -(-len(found) // count)][i] for found in folders.values() for i in range(min(count, len(found)))]


def _folder(recording: Recording) -> str:
    return str(pathlib.PurePosixPath(recording.name).parent)


def code(codec: Codec, recording: Recording, num_codebooks: Sequence[int]) -> dict[float, np.ndarray]:
    """What a recording becomes, (A, channels), by kbps: encoded once, decoded from its first levels."""
    encoded = codec.encode(recording.waveform, num_codebooks=max(num_codebooks))
    return {
        round(codec.kbps(levels), 3): codec.decode(dataclasses.replace(encoded, codes=encoded.codes[:levels]))
        for levels in num_codebooks
    }


def measure(
    config: CodecConfig, coded: Sequence[tuple[Recording, Mapping[float, np.ndarray]]], piece_s: float
) -> list[Measured]:
    """By folder and rate, and over everything as the folder "all".

    SI-SNR is the mean over recordings and channels, each at least -50 dB. For the mel distance the recordings of a
    folder are joined and cut into pieces of one length, of which it is the mean; what is left at the end is not heard.
    """
    snrs: dict[tuple[str, float], list[float]] = {}
    joined: dict[tuple[str, float], list[tuple[np.ndarray, np.ndarray]]] = {}
    for recording, reconstructions in coded:
        for rate, waveform in reconstructions.items():
            snr = si_snr(jnp.asarray(waveform.T), jnp.asarray(recording.waveform.T))
            key = _folder(recording), rate
            snrs.setdefault(key, []).append(float(np.clip(np.nan_to_num(snr, nan=-50.0), -50.0, 100.0).mean()))
            joined.setdefault(key, []).append((waveform, recording.waveform))
    size = min(round(piece_s * config.sample_rate), *(sum(len(x) for x, _ in pairs) for pairs in joined.values()))
    distances = {
        key: np.concatenate([_mel_distances(x, y, config.sample_rate) for x, y in _pieces(pairs, size)])
        for key, pairs in joined.items()
    }
    results = []
    folders = list(dict.fromkeys(folder for folder, _ in joined))
    for folder in [*folders, *(["all"] if len(folders) > 1 else [])]:
        for rate in sorted({rate for _, rate in joined}):
            keys = [(name, rate) for name in folders if folder in (name, "all")]
            snr = np.concatenate([snrs[key] for key in keys])
            distance = np.concatenate([distances[key] for key in keys])
            num_samples = sum(len(x) for key in keys for x, _ in joined[key])
            duration_s = num_samples / config.sample_rate
            results.append(Measured(folder, rate, len(snr), duration_s, float(snr.mean()), float(distance.mean())))
    return results


def _pieces(pairs: Sequence[tuple[np.ndarray, np.ndarray]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Joined pairs (A, channels), cut into pairs of rows (channels, size)."""
    ours, theirs = (np.concatenate(waveforms) for waveforms in zip(*pairs, strict=True))
    for start in range(0, len(ours) - size + 1, size):
        yield ours[start : start + size].T, theirs[start : start + size].T


def _mel_distances(ours: np.ndarray, theirs: np.ndarray, sample_rate: int) -> np.ndarray:
    return np.asarray(multi_scale_mel_distance(jnp.asarray(ours), jnp.asarray(theirs), sample_rate=sample_rate))


def results_table(results: Sequence[Measured]) -> page.Table:
    """A row for each folder and rate."""
    rows = tuple(
        (
            result.folder,
            f"{result.kbps:g}",
            f"{result.num_recordings}",
            f"{result.duration_s:.0f}",
            f"{result.si_snr:.2f}",
            f"{result.mel_distance:.3f}",
        )
        for result in results
    )
    header = ("test recordings of", "kbps", "recordings", "seconds", "SI-SNR, dB", "mel distance")
    return page.Table(header, rows, caption="Of SI-SNR more is better, of the distance less.")


def training_figures(metrics: Sequence[Mapping[str, float]]) -> tuple[page.Figure, ...]:
    """Curves of every loss, the held-out measures, the losses' shares, and what the codebooks are used for."""
    shares = sorted({name for line in metrics for name in line if name.startswith("train/share/")})
    names = [name.removeprefix("train/share/") for name in shares]
    losses = {name: f"train/{name}" for name in names}
    others = ("commitment", "codebook", "discriminator_loss", "learning_rate")
    losses |= {name: f"train/{name}" for name in others if any(f"train/{name}" in line for line in metrics)}
    held_out = sorted({name for line in metrics for name in line if name.startswith("validation/") and "/" in name})
    groups = {"SI-SNR in dB": "validation/si_snr/", "mel distance": "validation/mel_distance/"}
    series = {
        title: {f"{rate} kbps": name for name in held_out if (rate := name.removeprefix(prefix)) != name}
        for title, prefix in groups.items()
    }
    return (
        page.Figure(
            _panels(metrics, {name: {"": key} for name, key in losses.items()}, columns=3),
            alt=f"One curve over steps for each of {', '.join(losses)}.",
            caption="Losses as they are, before their weights.",
        ),
        page.Figure(
            _panels(metrics, series, columns=2),
            alt="SI-SNR and mel distance of held-out crops over steps, a line for each bitrate.",
            caption="Held-out crops; the checkpoint with the least mean mel distance is the codec of this run.",
        ),
        page.Figure(
            _stacked(metrics, dict(zip(names, shares, strict=True))),
            alt=f"How much of the pull on the reconstruction comes from {', '.join(names)}, over steps.",
            caption="Shares of each loss in the gradient of the reconstruction, by norm.",
        ),
        page.Figure(
            _levels(metrics, {"perplexity": "train/perplexity/", "dead codes": "train/dead_codes/"}),
            alt="Codebook perplexity and dead codes of every level over steps, as images.",
            caption="Perplexity of the codes' use, and dead codes before they are replaced; one row for each level.",
        ),
    )


def _points(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[key]) for line in metrics if key in line]
    steps, values = np.transpose(points)
    return steps, values


def _panels(metrics: Sequence[Mapping[str, float]], panels: Mapping[str, Mapping[str, str]], *, columns: int) -> Figure:
    """A panel for each title with its series; lines take the colours of a scale, lowest rate first."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(9.6, 2.4 * rows), layout="constrained")
    for place, (title, series) in enumerate(panels.items(), 1):
        axes = plots.style_axes(figure.add_subplot(rows, columns, place))
        ordered = sorted(series.items(), key=lambda item: float(item[0].split()[0]) if item[0] else 0.0)
        for (label, key), colour in zip(ordered, _scale(len(ordered)), strict=True):
            few = sum(key in line for line in metrics) <= 40
            axes.plot(*_points(metrics, key), color=colour, linewidth=1.4, marker="o" * few, markersize=3, label=label)
        axes.set_title(title, fontsize=10, loc="left", color=plots.INK)
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=plots.INK, fontsize=8)
    return figure


def _scale(count: int) -> list[Any]:
    if count == 1:
        return [plots.COLOURS[0]]
    return [matplotlib.colormaps["viridis"](place) for place in np.linspace(0, 0.85, count)]


def _stacked(metrics: Sequence[Mapping[str, float]], series: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(9.6, 2.8), layout="constrained")
    axes = plots.style_axes(figure.add_subplot())
    found = [_points(metrics, key) for key in series.values()]
    axes.stackplot(
        found[0][0], [values for _, values in found], labels=list(series), colors=plots.COLOURS[: len(series)]
    )
    axes.set_ylim(0, 1)
    axes.set_xlabel("step")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), frameon=False, labelcolor=plots.INK)
    return figure


def _levels(metrics: Sequence[Mapping[str, float]], prefixes: Mapping[str, str]) -> Figure:
    """An image of levels by steps for each prefix, whose keys end with the level."""
    figure = Figure(figsize=(9.6, 2.6 * len(prefixes)), layout="constrained")
    for panel, (title, prefix) in zip(figure.subplots(len(prefixes), 1, squeeze=False), prefixes.items(), strict=True):
        count = sum(1 for name in set().union(*metrics) if name.startswith(prefix))
        steps = _points(metrics, f"{prefix}0")[0]
        values = np.stack([_points(metrics, f"{prefix}{level}")[1] for level in range(count)])
        axes = plots.style_axes(panel[0])
        axes.grid(visible=False)
        extent = (0, steps[-1], count + 0.5, 0.5)
        image = axes.imshow(values, aspect="auto", cmap="viridis", extent=extent, interpolation="nearest")
        bar = figure.colorbar(image, ax=axes)
        bar.ax.tick_params(colors=plots.INK, labelsize=8)
        axes.set_ylabel("level")
        axes.set_title(title, fontsize=10, loc="left", color=plots.INK)
    axes.set_xlabel("step")
    return figure


def listen(config: CodecConfig, recording: Recording, reconstructions: Mapping[float, np.ndarray]) -> page.Section:
    """One recording and what it becomes at each bitrate, to hear and to see, as the mean of the channels."""
    rate = next(rate for rate in page.MP3_SAMPLE_RATES[::-1] if rate <= config.sample_rate)
    waveforms = {"original": recording.waveform} | {f"{kbps:g} kbps": x for kbps, x in reconstructions.items()}
    mono = {title: waveform.mean(axis=1) for title, waveform in waveforms.items()}
    figure = compare_spectrograms(mono, config.sample_rate)
    players = [
        page.Audio(title, _playable(waveform, config.sample_rate, rate), rate) for title, waveform in mono.items()
    ]
    alt = f"Spectrograms of {recording.name}: {', '.join(mono)}."
    return page.Section(recording.name, (page.Figure(figure, alt=alt), *players))


def _playable(waveform: np.ndarray, sample_rate: int, rate: int) -> np.ndarray:
    """At a rate that MP3 has, no louder than full scale."""
    if rate != sample_rate:
        import soxr

        waveform = soxr.resample(waveform, sample_rate, rate)
    return waveform / max(1.0, float(np.abs(waveform).max()))
