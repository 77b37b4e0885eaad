"""What a transcription is: text, segments, words, and which seconds of the audio were heard."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Word:
    """A word with its place in the audio.

    Attributes:
        word: As written, with the space before it.
        start: In seconds.
        end: In seconds.
        probability: Mean probability of its tokens.
    """

    word: str
    start: float
    end: float
    probability: float


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of the transcript between two times.

    Attributes:
        id: Its position in the transcript.
        seek: The first mel frame of the window it was heard in.
        start: In seconds.
        end: In seconds.
        text: With the space before it; empty if start and end are equal or nothing was said.
        tokens: Ids, times included.
        temperature: At which its window was decoded.
        avg_logprob: Mean log-probability of its window's tokens.
        compression_ratio: Of its window's text.
        no_speech_prob: Of its window.
        words: None if words were not timed; () also where `text` was emptied.
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Span:
    """Some seconds of the audio, and by which rule they were heard or skipped."""

    start_s: float
    end_s: float
    rule: str


@dataclasses.dataclass(frozen=True)
class Transcription:
    """The transcript of one audio.

    Attributes:
        text: All of it.
        segments: In order.
        language: Its code.
        duration_s: Of the audio.
        heard: The seconds the model heard; with `skipped` they cover the audio.
        skipped: The seconds it did not hear, or heard as silence.
    """

    text: str
    segments: tuple[Segment, ...]
    language: str
    duration_s: float
    heard: tuple[Span, ...] = ()
    skipped: tuple[Span, ...] = ()


def to_dict(transcription: Transcription) -> dict[str, Any]:
    """The result as openai-whisper's `transcribe` returns it: same keys, same order, lists for tuples."""
    segments = []
    for segment in transcription.segments:
        entry = dataclasses.asdict(segment) | {"tokens": list(segment.tokens)}
        words = entry.pop("words")
        segments.append(entry if words is None else entry | {"words": list(words)})
    return {"text": transcription.text, "segments": segments, "language": transcription.language}


def to_report_dict(transcription: Transcription) -> dict[str, Any]:
    """`to_dict` with the audio's duration and with what was heard and skipped, as lists of {start_s, end_s, rule}."""
    return to_dict(transcription) | {
        "duration_s": transcription.duration_s,
        "heard": [dataclasses.asdict(span) for span in transcription.heard],
        "skipped": [dataclasses.asdict(span) for span in transcription.skipped],
    }
