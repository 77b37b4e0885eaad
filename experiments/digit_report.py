"""Transcribes spoken digits as a user would, counts the errors, and writes the page of a run."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxaudio.data.fsdd import SAMPLE_RATE, Clip, concatenate, joined_sentences
from jaxaudio.data.manifests import TimedText
from jaxaudio.data.transcripts import Transcription
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.data.word_errors import word_errors
from jaxaudio.generate.transcribe import transcribe_many
from jaxaudio.models.whisper import FRAME_RATE, Whisper
from jaxaudio.ops.mel import whisper_log_mel
from jaxaudio.report import page, plots
from jaxaudio.report.card import Card


@dataclasses.dataclass(frozen=True, eq=False)
class Utterance:
    """Audio (A,) with its reference, a segment for each digit."""

    waveform: np.ndarray
    segments: tuple[TimedText, ...]

    @property
    def text(self) -> str:
        """The words."""
        return " ".join(segment.text for segment in self.segments)


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """What a model heard in some utterances.

    Attributes:
      utterances, transcriptions: what was said and what was heard.
      wer: word errors by words.
      num_words: words said.
      boundary_s: median distance of the segments' starts and ends from the true ones, over the utterances of which each
        word and no other was heard; NaN where there is none.
      num_timed: how many these are.
    """

    utterances: Sequence[Utterance]
    transcriptions: Sequence[Transcription]
    wer: float
    num_words: int
    boundary_s: float
    num_timed: int


def evaluation_audio(clips: Sequence[Clip], *, seed: int, num_rounds: int) -> dict[str, list[Utterance]]:
    """Each clip as a "digit" of its own, `num_rounds` times in a "sentence" of 3 to 6, and in a "recording" of 60."""
    sentences = joined_sentences(clips, seed=seed, num_rounds=num_rounds)
    recordings = joined_sentences(clips, seed=seed + 1, num_rounds=1, num_digits=(60, 60))
    return {
        "digit": [Utterance(*concatenate([clip], [0.0, 0.0])) for clip in clips],
        "sentence": [Utterance(*pair) for pair in sentences],
        "recording": [Utterance(*pair) for pair in recordings],
    }


def score(
    model: Whisper, params: Any, tokenizer: WhisperTokenizer, utterances: Sequence[Utterance], **options: Any
) -> Score:
    """Transcribes all utterances with timestamps and counts; `options` are those of `generate.transcribe`."""
    files = [utterance.waveform for utterance in utterances]
    options = {"language": "en", "batch_size": 16} | options
    found = {id(file): result for file, result in transcribe_many(model, params, files, tokenizer=tokenizer, **options)}
    heard = [found[id(file)] for file in files]
    for result in heard:
        if isinstance(result, Exception):
            raise result
    counts = word_errors([utterance.text for utterance in utterances], [result.text for result in heard])
    distances, num_timed = [], 0
    for utterance, result in zip(utterances, heard, strict=True):
        if [segment.text.strip() for segment in result.segments] == [segment.text for segment in utterance.segments]:
            num_timed += 1
            for truth, guess in zip(utterance.segments, result.segments, strict=True):
                distances += [abs(truth.start_s - guess.start), abs(truth.end_s - guess.end)]
    return Score(
        utterances=utterances,
        transcriptions=heard,
        wer=counts.rate,
        num_words=counts.num_reference,
        boundary_s=float(np.median(distances)) if distances else float("nan"),
        num_timed=num_timed,
    )


def write_page(
    workdir: pathlib.Path, *, headline: str, about: str, scores: Mapping[str, Score], cards: Sequence[Card], config: str
) -> pathlib.Path:
    """Writes workdir/report.html: result, curves, heard sentences, cards and config."""
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = plots.loss_curve(metrics, {"training": "train/loss", "held out": "validation/loss"})
    errors = plots.loss_curve(
        metrics,
        {"single digits": "validation/digit_wer", "sentences": "validation/sentence_wer"},
        unit="word error rate of held-out takes",
    )
    rows = tuple(
        (
            name,
            f"{len(score.utterances)}",
            f"{score.num_words}",
            f"{100 * score.wer:.2f}",
            f"{1000 * score.boundary_s:.0f}",
            f"{score.num_timed}",
        )
        for name, score in scores.items()
    )
    header = ("test set", "utterances", "words", "WER %", "median boundary error, ms", "of utterances")
    sentences = scores["sentence"]
    wrong = [
        (utterance, result)
        for utterance, result in zip(sentences.utterances, sentences.transcriptions, strict=True)
        if utterance.text != " ".join(segment.text.strip() for segment in result.segments)
    ]
    right = [pair for pair in zip(sentences.utterances, sentences.transcriptions, strict=True) if pair not in wrong]
    page.write_report(
        workdir / "report.html",
        title="Whisper on spoken digits",
        headline=headline,
        sections=[
            page.Section("Result", (page.Text(about), page.Table(header, rows))),
            page.Section(
                "Training",
                (
                    page.Figure(
                        losses,
                        alt="Training and held-out loss over steps.",
                        caption="Training begins with short windows, see the config; held-out ones are the model's.",
                    ),
                    page.Figure(errors, alt="Word error rates on held-out takes over steps."),
                ),
            ),
            page.Section("Sentences heard", tuple(block for pair in right[:3] for block in _heard(*pair))),
            *([page.Section("Misheard", tuple(b for pair in wrong[:3] for b in _heard(*pair)))] if wrong else []),
            page.Section("Cards", tuple(cards)),
            page.Section("Config", (page.Code("The resolved config of this run", config),)),
        ],
    )
    return workdir / "report.html"


def _heard(utterance: Utterance, result: Transcription) -> tuple[page.Block, ...]:
    figure = heard_figure(utterance, result)
    peak = float(np.max(np.abs(utterance.waveform)))
    return (
        page.Figure(figure, alt=f"Log-mel of “{utterance.text}” with what was heard, “{result.text.strip()}”."),
        page.Audio(utterance.text, utterance.waveform / max(peak, 1.0), SAMPLE_RATE),
    )


def heard_figure(utterance: Utterance, result: Transcription) -> Figure:
    """The log-mel spectrogram, what was said above it, and the segments that were heard in it."""
    mel = np.asarray(whisper_log_mel(utterance.waveform[None])[0])
    duration_s = mel.shape[0] / FRAME_RATE
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    axes = plots.style_axes(figure.add_subplot(), grid="x")
    axes.imshow(mel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, duration_s, 0, mel.shape[1]))
    top, middle = mel.shape[1] * 1.03, mel.shape[1] * 0.9
    for segment in utterance.segments:
        place = (segment.start_s + segment.end_s) / 2
        axes.text(place, top, segment.text, ha="center", va="bottom", color=plots.INK, fontsize=9)
    for segment in result.segments:
        for edge in (segment.start, segment.end):
            axes.axvline(edge, color="white", linewidth=1)
        place = (segment.start + segment.end) / 2
        axes.text(place, middle, segment.text.strip(), ha="center", va="center", color="white", fontsize=9)
    axes.set_xlabel("seconds; above: said, within: heard, lines: the times that were heard")
    axes.set_ylabel("mel")
    return figure
