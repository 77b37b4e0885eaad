"""Transcripts as files: plain text, subtitles (WebVTT and SubRip), tab-separated values, JSON.

Byte for byte what the writers of the package openai-whisper 20250625 give, so that what reads those keeps working.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator

from jaxaudio.data.files import atomic_path
from jaxaudio.data.transcripts import Transcription, Word, to_dict

FORMATS = ("txt", "vtt", "srt", "tsv", "json")
_SUBTITLES = ("vtt", "srt")
_LONG_PAUSE_S = 3.0
_UNLIMITED = 1000  # characters per line and words per line where no limit is given

_Cue = tuple[str, str, str]  # from, to, text


def write_transcript(
    transcription: Transcription,
    path: str | os.PathLike,
    output_format: str,
    *,
    max_line_width: int | None = None,
    max_line_count: int | None = None,
    highlight_words: bool = False,
    max_words_per_line: int | None = None,
) -> tuple[pathlib.Path, ...]:
    """Writes a transcript, each file whole or not at all.

    Args:
        transcription: What to write.
        path: Where, without the suffix; the format is the suffix.
        output_format: One of `FORMATS`, or "all" for one file of each.
        max_line_width: See `format_transcript`; with "all" the options act on the two formats of subtitles.
        max_line_count: See there.
        highlight_words: See there.
        max_words_per_line: See there.

    Returns:
        The files written.

    Raises:
        ValueError: As `format_transcript`.
    """
    formats = FORMATS if output_format == "all" else (output_format,)
    options = {
        "max_line_width": max_line_width,
        "max_line_count": max_line_count,
        "highlight_words": highlight_words,
        "max_words_per_line": max_words_per_line,
    }
    texts = {}
    for name in formats:
        acting = options if name in _SUBTITLES or output_format != "all" else {}
        texts[name] = format_transcript(transcription, name, **acting)
    written = []
    for name, text in texts.items():
        written.append(pathlib.Path(f"{os.fspath(path)}.{name}"))
        with atomic_path(written[-1]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return tuple(written)


def format_transcript(
    transcription: Transcription,
    output_format: str,
    *,
    max_line_width: int | None = None,
    max_line_count: int | None = None,
    highlight_words: bool = False,
    max_words_per_line: int | None = None,
) -> str:
    """The content of a file of one format.

    A subtitle shows a segment. The options need timed words and are for subtitles only. With `max_line_width` and
    `max_line_count` both given, subtitles no longer follow segments: a new one starts when its lines are full or after
    3 s without a word.

    Args:
        transcription: What to write.
        output_format: One of `FORMATS`.
        max_line_width: A line is broken before it has more characters than this.
        max_line_count: A subtitle has no more lines than this; needs `max_line_width`.
        highlight_words: Show every subtitle once per word, the word being spoken underlined.
        max_words_per_line: A subtitle has no more words than this; not together with `max_line_count`.

    Raises:
        ValueError: The format is unknown; an option cannot act on this format, without timed words or beside another
            option; a limit is below 1; or a time is negative. Has the values.
    """
    if output_format not in FORMATS:
        raise ValueError(f"A transcript is written as one of {', '.join(FORMATS)}; got {output_format!r}.")
    limits = {
        "max_line_width": max_line_width,
        "max_line_count": max_line_count,
        "max_words_per_line": max_words_per_line,
    }
    segments = transcription.segments
    # Segments emptied for want of text have no words even where no words were timed.
    has_words = bool(segments) and all(segment.words is not None for segment in segments)
    _check_options(output_format, limits, highlight_words, has_words or not segments)
    if output_format == "txt":
        return "".join(f"{segment.text.strip()}\n" for segment in segments)
    if output_format == "tsv":
        rows = [
            f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t{_without_tabs(segment.text)}"
            for segment in segments
        ]
        return "\n".join(["start\tend\ttext", *rows, ""])
    if output_format == "json":
        return json.dumps(to_dict(transcription))

    always_hours, marker = (True, ",") if output_format == "srt" else (False, ".")
    if has_words:
        cues = _word_cues(transcription, limits, highlight_words, always_hours, marker)
    else:
        cues = (
            (
                format_timestamp(segment.start, always_hours, marker),
                format_timestamp(segment.end, always_hours, marker),
                segment.text.strip().replace("-->", "->"),  # the arrow would be read as another cue
            )
            for segment in segments
        )
    blocks = [f"{start} --> {end}\n{text}\n\n" for start, end, text in cues]
    if output_format == "srt":
        return "".join(f"{number}\n{block}" for number, block in enumerate(blocks, start=1))
    return "".join(["WEBVTT\n\n", *blocks])


def format_timestamp(seconds: float, always_hours: bool = False, decimal_marker: str = ".") -> str:
    """A time as [hh:]mm:ss.mmm; the hours are left out if they are zero, unless `always_hours`.

    Raises:
        ValueError: The time is negative; has it.
    """
    if seconds < 0:
        raise ValueError(f"A time in a transcript is 0 or later; got {seconds} s.")
    whole_s, milliseconds = divmod(round(seconds * 1000.0), 1000)
    minutes, s = divmod(whole_s, 60)
    hours, minutes = divmod(minutes, 60)
    hours_text = f"{hours:02d}:" if always_hours or hours > 0 else ""
    return f"{hours_text}{minutes:02d}:{s:02d}{decimal_marker}{milliseconds:03d}"


def _check_options(output_format: str, limits: dict[str, int | None], highlight_words: bool, may_have_words: bool):
    given = {name: value for name, value in limits.items() if value is not None}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1; got {value}.")
    if highlight_words:
        given["highlight_words"] = True
    if given and output_format not in _SUBTITLES:
        raise ValueError(f"{given} can only act on subtitles, {' and '.join(_SUBTITLES)}; got {output_format!r}.")
    if given and not may_have_words:
        raise ValueError(f"{given} can only act on timed words; transcribe with word timestamps.")
    if "max_line_count" in given and "max_line_width" not in given:
        raise ValueError(f"max_line_count needs max_line_width, which breaks lines; got {given}.")
    if "max_line_count" in given and "max_words_per_line" in given:
        raise ValueError(f"max_words_per_line cannot act beside max_line_count; got {given}.")


def _without_tabs(text: str) -> str:
    return text.strip().replace("\t", " ")


def _word_cues(
    transcription: Transcription,
    limits: dict[str, int | None],
    highlight_words: bool,
    always_hours: bool,
    marker: str,
) -> Iterator[_Cue]:
    for words in _subtitles(transcription, **limits):
        times = [
            tuple(format_timestamp(time, always_hours, marker) for time in (word.start, word.end)) for _, word in words
        ]
        texts = [text for text, _ in words]
        plain = "".join(texts)
        if not highlight_words:
            yield times[0][0], times[-1][1], plain
            continue
        shown_until = times[0][0]
        for index, (start, end) in enumerate(times):
            if shown_until != start:
                yield shown_until, start, plain
            yield start, end, "".join([*texts[:index], _underlined(texts[index]), *texts[index + 1 :]])
            shown_until = end


def _underlined(text: str) -> str:
    """The text with all but its leading whitespace underlined; left alone if it goes on after a line's end."""
    match = re.match(r"(\s*)(.*)$", text)
    return text if match is None else f"{match[1]}<u>{match[2]}</u>{text[match.end() :]}"


def _subtitles(
    transcription: Transcription,
    max_line_width: int | None,
    max_line_count: int | None,
    max_words_per_line: int | None,
) -> Iterator[list[tuple[str, Word]]]:
    """Groups words into subtitles; gives each word's text as shown, with the line break or space before it."""
    follow_segments = max_line_width is None or max_line_count is None
    width = max_line_width or _UNLIMITED
    words_per_group = max_words_per_line or _UNLIMITED
    subtitle: list[tuple[str, Word]] = []
    line_width, num_lines = 0, 1
    last_start_s = None
    for segment in transcription.segments:
        for index, word in enumerate(segment.words):
            starts_group = index % words_per_group == 0
            text = word.word
            new_subtitle = starts_group and bool(subtitle) and follow_segments
            pause = not follow_segments and last_start_s is not None and word.start - last_start_s > _LONG_PAUSE_S
            if 0 < line_width <= width - len(text) and not pause and not new_subtitle:
                line_width += len(text)
            else:
                text = text.strip()
                is_full = max_line_count is not None and (pause or num_lines >= max_line_count)
                broken_before = line_width > 0
                line_width = len(text)
                if new_subtitle or (subtitle and is_full):
                    yield subtitle
                    subtitle, num_lines = [], 1
                elif broken_before:
                    num_lines += 1
                    text = f"\n{text}"
            subtitle.append((text, word))
            last_start_s = word.start
    if subtitle:
        yield subtitle
