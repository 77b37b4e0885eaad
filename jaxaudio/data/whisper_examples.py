"""Whisper's multitask training format: a window of audio, what is said in it, and the tokens that the decoder learns.

Radford et al. 2022, https://arxiv.org/abs/2212.04356, sections 2.1 and 2.3, Fig. 1. One window gives one row of tokens:

    speech, with times      [prev PREVIOUS TEXT] sot en transcribe  0.00 " one two" 1.20 1.52 " three" 2.04  eot
    speech, without times   [prev PREVIOUS TEXT] sot en transcribe notimestamps " one two three" eot
    the end cuts a segment  ... 0.00 " one two" 1.20 1.52 eot       its start alone, from where decoding is to go on
      without times         ... notimestamps " one two" eot         and the audio ends where that segment begins
    no speech               [prev PREVIOUS TEXT] sot nospeech eot

Times count from the start of the window in ticks of 20 ms. The loss leaves out the previous text alone: every other
token is a target, also the `sot` behind a previous text. Targets are the row shifted by one; that happens here, once.

A recording is cut into windows one after the other. Where a window's end cuts a segment, the next window begins where
that segment begins, which is where decoding would seek to; so no window begins within a segment.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxaudio.data.manifests import ManifestError, TimedText, Utterance
from jaxaudio.data.whisper_tokenizer import LANGUAGES_WITHOUT_SPACES, SECONDS_PER_TIMESTAMP, WhisperTokenizer

TICK_S = SECONDS_PER_TIMESTAMP


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of a recording and what is said in it.

    Attributes:
      start_s: where it begins in the recording.
      segments: the whole segments in it, in order; times count from the window's start and are whole ticks.
      cut_start_s: where the segment begins, from the window's start, that the window's end cuts; or None.
      timed: False where only the text is known, in `segments[0]`.
      previous_text: what was said before the window.
    """

    start_s: float
    segments: tuple[TimedText, ...]
    cut_start_s: float | None = None
    timed: bool = True
    previous_text: str = ""

    def is_speech(self, timestamps: bool = True) -> bool:
        """Whether anything is said; a segment that the end cuts is heard only where times are written."""
        return bool(self.segments) or (timestamps and self.cut_start_s is not None)

    def num_samples(self, timestamps: bool, sample_rate: int, window_s: float) -> int:
        """How many samples of the window may be heard: all, or without times those before a segment that is cut."""
        is_cut = self.cut_start_s is not None and not timestamps
        return round((self.cut_start_s if is_cut else window_s) * sample_rate)


def cut_windows(utterance: Utterance, duration_s: float, window_s: float = 30.0) -> tuple[Window, ...]:
    """The windows of a recording.

    Args:
      utterance: with timed segments, or with a text for the whole of it, or with neither: no speech.
      duration_s: of its audio.
      window_s: length of a window; the last one may reach beyond the audio.
    Raises:
      ManifestError: a segment is blank, shorter than a tick, not after the one before it, beyond the audio or longer
        than a window; or a text without times is for more audio than a window. The message names audio and place.
    """
    window, total = round(window_s / TICK_S), round(duration_s / TICK_S)
    before = [(utterance.previous_text or "").strip()]
    if not utterance.segments and (utterance.text or "").strip():
        if total > window:
            raise ManifestError(
                f"{utterance.audio}: {duration_s:.2f} s with a text but no segments, a window has {window_s:.2f} s; "
                "give the times of its segments, or cut the audio"
            )
        return (Window(0.0, (TimedText(0.0, duration_s, utterance.text),), None, False, before[0]),)
    spans = _ticks(utterance, total, window)
    windows, start, index = [], 0, 0
    while start < total or index < len(spans):
        inside, cut, previous_text = [], None, _join(before, utterance.language)
        while index < len(spans) and spans[index][1] <= start + window:
            first, last, text = spans[index]
            inside.append(TimedText(_seconds(first - start), _seconds(last - start), text))
            before.append(text)
            index += 1
        if index < len(spans) and spans[index][0] < start + window:
            cut = spans[index][0] - start
        cut_start_s = None if cut is None else _seconds(cut)
        windows.append(Window(_seconds(start), tuple(inside), cut_start_s, True, previous_text))
        start += window if cut is None else cut
    return tuple(windows)


def _seconds(ticks: int) -> float:
    return round(ticks * TICK_S, 2)


def _ticks(utterance: Utterance, total: int, window: int) -> list[tuple[int, int, str]]:
    """Segments as (first tick, last tick, text), checked."""
    spans, end = [], 0
    for number, segment in enumerate(utterance.segments):
        first, last = round(segment.start_s / TICK_S), round(segment.end_s / TICK_S)
        name = f"{utterance.audio}: segment {number}, {segment.start_s} to {segment.end_s} s"
        if not segment.text.strip():
            raise ManifestError(f"{name}, has no text; leave it out")
        if last <= first:
            raise ManifestError(f"{name}, is shorter than {TICK_S} s once rounded")
        if first < end:
            raise ManifestError(f"{name}, begins before the one before it ends; sort or merge them")
        if last > total + 1:
            raise ManifestError(f"{name}, ends after the audio of {_seconds(total)} s")
        if last - first > window:
            raise ManifestError(f"{name}, is longer than a window of {_seconds(window)} s; split it")
        spans.append((first, last, segment.text))
        end = last
    return spans


def spaced(text: str, language: str | None) -> str:
    """The text as the decoder writes it: behind a space, except in languages that are written without."""
    return text.strip() if language in LANGUAGES_WITHOUT_SPACES else f" {text.strip()}"


def _join(texts: Sequence[str], language: str | None) -> str:
    return "".join(spaced(text, language) for text in texts if text).strip()


def window_tokens(
    tokenizer: WhisperTokenizer,
    window: Window,
    *,
    language: str | None,
    task: str = "transcribe",
    timestamps: bool,
    dropout: float = 0.0,
    rng: np.random.Generator | None = None,
) -> list[int]:
    """The window's own tokens, `sot` to `eot`.

    Args:
      tokenizer: of the model; its timestamps must reach over the window.
      window: what is said.
      language: code; None only for tokenizers of one language.
      task: "transcribe" or "translate".
      timestamps: whether to write times.
      dropout: of merges of the byte-pair encoding (Provilkov et al. 2020), for texts.
      rng: for dropout.
    Raises:
      ValueError: timestamps of a text that has none, or a time beyond the tokenizer's last.
    """
    if not window.is_speech(timestamps):
        return [tokenizer.sot, tokenizer.no_speech, tokenizer.eot]
    tokens = list(tokenizer.sot_sequence(language, task))
    if not timestamps:
        text = "".join(spaced(segment.text, language) for segment in window.segments)
        return [*tokens, tokenizer.no_timestamps, *tokenizer.encode(text, dropout, rng), tokenizer.eot]
    if not window.timed:
        raise ValueError(f"the text {window.segments[0].text!r} has no times; train it with timestamps=False")
    for segment in window.segments:
        text = tokenizer.encode(spaced(segment.text, language), dropout, rng)
        tokens += [_timestamp(tokenizer, segment.start_s), *text, _timestamp(tokenizer, segment.end_s)]
    if window.cut_start_s is not None:
        tokens.append(_timestamp(tokenizer, window.cut_start_s))
    return [*tokens, tokenizer.eot]


def _timestamp(tokenizer: WhisperTokenizer, time_s: float) -> int:
    tick = round(time_s / TICK_S)
    if not 0 <= tick < tokenizer.num_timestamps:
        last = _seconds(tokenizer.num_timestamps - 1)
        raise ValueError(f"time {time_s} s is outside the window, whose timestamps are 0 to {last} s")
    return tokenizer.timestamp_begin + tick


def token_row(
    tokenizer: WhisperTokenizer, tokens: Sequence[int], *, text_length: int, previous: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """One row of a batch: inputs, targets (L,) int32 and mask (L,) bool, L = text_length, padded with `eot`.

    Of the previous text the last tokens are kept: at most text_length // 2 - 1, as in decoding (223 of 448), and no
    more than leave room for `tokens`.

    Raises:
      ValueError: `tokens` alone are more than the decoder can hold; with both numbers.
    """
    room = text_length + 1 - len(tokens)
    if room < 0:
        raise ValueError(f"{len(tokens)} tokens with eot, but the decoder holds {text_length + 1}; split the text")
    keep = max(min(text_length // 2 - 1, room - 1), 0)
    kept = list(previous)[-keep:] if keep else []
    row = [*([tokenizer.sot_prev, *kept] if kept else []), *tokens]
    inputs, targets = np.full((2, text_length), tokenizer.eot, np.int32)
    inputs[: len(row) - 1], targets[: len(row) - 1] = row[:-1], row[1:]
    position = np.arange(text_length)
    return {"inputs": inputs, "targets": targets, "mask": (position >= len(kept)) & (position < len(row) - 1)}
