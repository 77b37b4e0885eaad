"""Whisper's long-form algorithm for one audio: a generator that asks for what only the model can do.

Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 4.5. Every rule and every rounding is that of the public
package openai-whisper 20250625 (`transcribe`), so that the same answers of a model give the same segments. A request is
yielded and its answer sent back; who answers may serve many generators with one call of the model.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from jaxaudio.data.transcripts import Segment, Word
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.generate.coverage import Coverage
from jaxaudio.generate.features import FileMel
from jaxaudio.generate.transcribe_options import APPEND_PUNCTUATIONS, PREPEND_PUNCTUATIONS, TranscribeOptions
from jaxaudio.generate.whisper import DecodingResult
from jaxaudio.generate.word_timestamps import add_word_timestamps
from jaxaudio.models.whisper import FRAME_RATE, HOP_LENGTH, SAMPLE_RATE

FRAMES_PER_TOKEN = 2  # mel frames of an encoder position and of a timestamp's step
SECONDS_PER_TOKEN = FRAMES_PER_TOKEN * HOP_LENGTH / SAMPLE_RATE
_PUNCTUATION = PREPEND_PUNCTUATIONS + APPEND_PUNCTUATIONS


@dataclasses.dataclass(frozen=True)
class DetectRequest:
    """The language of a window (T, M); the answer is its code."""

    mel: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodeRequest:
    """The text of a window; the answer is a `DecodingResult`.

    Attributes:
      mel: (T, M), the model's window, padded with zeros.
      seek: its first frame in the audio.
      prompt: tokens before it.
      language: its code; None: to be detected.
    """

    mel: np.ndarray
    seek: int
    prompt: tuple[int, ...]
    language: str | None


@dataclasses.dataclass(frozen=True)
class AlignRequest:
    """The times of words in the window that was decoded last; the answer is a list of `WordTiming`."""

    text_tokens: tuple[int, ...]
    num_frames: int
    language: str


@dataclasses.dataclass(frozen=True)
class _Window:
    """Where a window lies: frames of 10 ms, and the same in seconds as the reference computes them."""

    seek: int
    num_frames: int  # of the audio in it; the rest of the model's window is padding
    model_frames: int
    audio_frames: int

    @property
    def end(self) -> int:
        return self.seek + self.num_frames

    @property
    def start_s(self) -> float:
        return _seconds(self.seek)

    @property
    def duration_s(self) -> float:
        return _seconds(self.num_frames)

    @property
    def model_end_s(self) -> float:
        return _seconds(self.seek + self.model_frames)

    @property
    def audio_end_s(self) -> float:
        return _seconds(self.audio_frames)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a window gave: its segments (None: nothing, look again), where to go on, and up to where it was heard."""

    segments: list[Segment] | None
    next_seek: int
    heard_until: int


def transcribe_clips(
    mel: FileMel,
    clips: Sequence[tuple[int, int]],
    *,
    window_frames: int,
    tokenizer: WhisperTokenizer,
    options: TranscribeOptions,
    language: str,
    coverage: Coverage,
    initial_tokens: tuple[int, ...],
    prompt_length: int,
) -> Generator[DecodeRequest | AlignRequest, Any, list[Segment]]:
    """Transcribes clips of one audio, one after the other.

    Args:
      mel: of the whole audio.
      clips: (start, end) frames to transcribe, inside the audio.
      window_frames: frames of the model's window.
      tokenizer: the model's `WhisperTokenizer`.
      options: what to do in a window; clips, detectors and batches are the caller's.
      language: code of the audio's language.
      coverage: is marked with what was heard of the clips and what was skipped.
      initial_tokens, prompt_length: the initial prompt, and tokens of prompt that a window takes.
    Returns:
      The segments; the caller numbers them, here each id is 0.
    """
    segments: list[Segment] = []
    history, reset = list(initial_tokens), 0  # tokens so far, and the first that may still prompt
    last_speech_s = 0.0
    for clip_start, clip_end in clips:
        seek = clip_start
        while seek < clip_end:
            window = _Window(seek, min(window_frames, clip_end - seek), window_frames, len(mel.frames))
            features = mel.window(seek, window_frames, end_frame=window.end)
            prompt = _prompt(history, reset, len(initial_tokens), prompt_length, options)
            result = yield DecodeRequest(features, seek, prompt, None if options.multilingual else language)
            if is_silent(result, options):
                coverage.skip(seek, window.end, "no_speech")
                seek = window.end
                continue
            step, is_closed = split_segments(result, window, tokenizer)
            if options.word_timestamps:
                step = yield from _refine_by_words(step, is_closed, window, result, tokenizer, options, last_speech_s)
            if step.next_seek <= seek:  # the reference would decode this window for ever
                step = dataclasses.replace(step, next_seek=window.end, heard_until=window.end)
            coverage.hear(seek, min(step.heard_until, clip_end))
            coverage.skip(step.heard_until, min(step.next_seek, clip_end), "hallucination_silence")
            seek = step.next_seek
            if step.segments is None:
                continue
            if options.word_timestamps and step.segments:
                last_speech_s = _end_s(step.segments)
            found = [_without_blank(segment) for segment in step.segments]
            segments += found
            history += [token for segment in found for token in segment.tokens]
            if not options.conditions or result.temperature > options.prompt_reset_on_temperature:
                reset = len(history)
    return segments


def needs_fallback(result: DecodingResult, options: TranscribeOptions) -> bool:
    """Whether a window is decoded again at the next temperature: a repetitive or an improbable text, unless silence."""
    is_improbable = options.logprob_threshold is not None and result.avg_logprob < options.logprob_threshold
    if is_improbable and _is_above(result.no_speech_prob, options.no_speech_threshold):
        return False
    return is_improbable or _is_above(result.compression_ratio, options.compression_ratio_threshold)


def is_silent(result: DecodingResult, options: TranscribeOptions) -> bool:
    """Whether a window is skipped: probably no speech, and a text that is not probable enough to veto that."""
    is_probable = _is_above(result.avg_logprob, options.logprob_threshold)
    return _is_above(result.no_speech_prob, options.no_speech_threshold) and not is_probable


def _is_above(value: float, threshold: float | None) -> bool:
    return threshold is not None and value > threshold


def split_segments(result: DecodingResult, window: _Window, tokenizer: WhisperTokenizer) -> tuple[_Step, bool]:
    """Cuts a window's tokens between consecutive timestamps.

    Returns:
      The step, and whether the window is closed: its last token, alone, is a timestamp, after which nobody speaks.
    """
    tokens, begin = result.tokens, tokenizer.timestamp_begin
    is_time = [token >= begin for token in tokens]
    is_closed = is_time[-2:] == [False, True]
    cuts = [i for i in range(1, len(tokens)) if is_time[i - 1] and is_time[i]]

    def segment(start: float, end: float, piece: tuple[int, ...]) -> Segment:
        return Segment(
            id=0,
            seek=window.seek,
            start=start,
            end=end,
            text=tokenizer.decode([token for token in piece if token < tokenizer.eot]),
            tokens=piece,
            temperature=result.temperature,
            avg_logprob=result.avg_logprob,
            compression_ratio=result.compression_ratio,
            no_speech_prob=result.no_speech_prob,
            words=None,
        )

    if not cuts:
        times = [token - begin for token in tokens if token >= begin]
        duration_s = times[-1] * SECONDS_PER_TOKEN if times and times[-1] > 0 else window.duration_s
        whole = segment(window.start_s, window.start_s + duration_s, tokens)
        return _Step([whole], window.end, window.end), is_closed
    if is_closed:
        cuts.append(len(tokens))
    segments = []
    for first, last in zip([0, *cuts], cuts, strict=False):
        piece = tokens[first:last]
        start, end = ((piece[i] - begin) * SECONDS_PER_TOKEN for i in (0, -1))
        segments.append(segment(window.start_s + start, window.start_s + end, piece))
    # What follows the last pair is cut off by the window's end: the next window begins where it does.
    next_seek = window.end if is_closed else window.seek + (tokens[cuts[-1] - 1] - begin) * FRAMES_PER_TOKEN
    return _Step(segments, next_seek, next_seek), is_closed


def _refine_by_words(
    step: _Step,
    is_closed: bool,
    window: _Window,
    result: DecodingResult,
    tokenizer: WhisperTokenizer,
    options: TranscribeOptions,
    last_speech_s: float,
) -> Generator[AlignRequest, Any, _Step]:
    """Adds words to the segments, goes on after the last word, and leaves out what seems invented in silence."""
    text_tokens = tuple(t for segment in step.segments for t in segment.tokens if t < tokenizer.eot)
    timings = yield AlignRequest(text_tokens, window.num_frames, result.language)
    segments = add_word_timestamps(
        step.segments,
        timings,
        tokenizer=tokenizer,
        prepend_punctuations=options.prepend_punctuations,
        append_punctuations=options.append_punctuations,
        last_speech_s=last_speech_s,
    )
    threshold, next_seek = options.hallucination_silence_threshold, step.next_seek
    end_s = _end_s(segments)
    if not is_closed and end_s > window.start_s:
        is_near = threshold is not None and window.model_end_s - end_s <= threshold
        next_seek = window.end if is_near else round(end_s * FRAME_RATE)
    step = _Step(segments, next_seek, next_seek)
    return step if threshold is None else _skip_hallucinations(step, window, last_speech_s, threshold)


def _skip_hallucinations(step: _Step, window: _Window, last_speech_s: float, threshold: float) -> _Step:
    """Skips silence before a first segment that looks invented, and one that does and lies between silences."""
    segments = step.segments
    first = next((segment for segment in segments if segment.words), None)
    if first is not None and _is_anomalous(first):
        gap = first.start - window.start_s
        if gap > threshold and round(gap * FRAME_RATE) > 0:
            return _Step(None, window.seek + round(gap * FRAME_RATE), window.seek)
    for index, segment in enumerate(segments):
        if not segment.words:
            continue
        if _is_anomalous(segment):
            following = next((later for later in segments[index + 1 :] if later.words), None)
            next_start_s = following.words[0].start if following else window.start_s + window.duration_s
            is_after_silence = (
                segment.start - last_speech_s > threshold
                or segment.start < threshold
                or segment.start - window.start_s < 2.0
            )
            is_before_silence = (
                next_start_s - segment.end > threshold
                or (following is not None and _is_anomalous(following))
                or window.model_end_s - segment.end < 2.0
            )
            if is_after_silence and is_before_silence:
                next_seek = round(max(window.start_s + 1, segment.start) * FRAME_RATE)
                if window.audio_end_s - segment.end < threshold:
                    next_seek = window.audio_frames
                heard_until = round(segment.start * FRAME_RATE) if index else window.seek
                return _Step(segments[:index], next_seek, heard_until)
        last_speech_s = segment.end
    return step


def _anomaly(word: Word) -> float:
    """How much a word is improbable, too short (under 133 ms) or too long (over 2 s)."""
    duration_s = word.end - word.start
    score = 1.0 if word.probability < 0.15 else 0.0
    if duration_s < 0.133:
        score += (0.133 - duration_s) * 15
    if duration_s > 2.0:
        score += duration_s - 2.0
    return score


def _is_anomalous(segment: Segment) -> bool:
    """Whether the first eight words of a segment look invented."""
    words = [word for word in segment.words if word.word not in _PUNCTUATION][:8]
    score = sum(_anomaly(word) for word in words)
    return score >= 3 or score + 0.01 >= len(words)


def _end_s(segments: Sequence[Segment]) -> float:
    """End of the last word; without words, of the last segment."""
    words = [word for segment in segments for word in segment.words or ()]
    return words[-1].end if words else segments[-1].end


def _without_blank(segment: Segment) -> Segment:
    """A segment without duration or without text keeps its place, but no text, tokens or words."""
    if segment.start == segment.end or not segment.text.strip():
        return dataclasses.replace(segment, text="", tokens=(), words=())
    return segment


def _prompt(
    history: list[int], reset: int, num_initial: int, limit: int, options: TranscribeOptions
) -> tuple[int, ...]:
    """The tokens before a window: the last `limit` since the reset; a carried initial prompt takes its part of them."""
    num_kept = num_initial if options.carry_initial_prompt else 0
    first = max(num_kept, reset, len(history) - (limit - num_kept))
    return tuple(history[:num_kept] + history[first:])


def _seconds(frames: int) -> float:
    return frames * HOP_LENGTH / SAMPLE_RATE
