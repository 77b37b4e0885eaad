"""Lists of audio files with what is said in them: JSON lines, one utterance per line.

    {"audio": "talks/a.flac", "text": "Good morning.", "language": "en", "duration_s": 2.5}
    {"audio": "b.wav", "segments": [{"start_s": 0.0, "end_s": 1.2, "text": "Guten Tag."}], "task": "transcribe"}

The fields are those of `Utterance`; only `audio` is required, and null is the same as leaving a field out. Paths are
relative to the folder of the list. Empty lines are allowed. UTF-8.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from jaxaudio.data.files import atomic_path

TASKS = ("transcribe", "translate")
T = TypeVar("T")


class ManifestError(ValueError):
    """A list that cannot be read or written; the message names file and line, field, value and what was expected."""


@dataclasses.dataclass(frozen=True)
class TimedText:
    """What is said from `start_s` to `end_s` of an audio."""

    start_s: float
    end_s: float
    text: str


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One audio file and what is known about it.

    Attributes:
      audio: Path of the file.
      text: All that is said in it, in the language that `task` asks for; "" where nobody speaks, None if not known.
      language: Spoken in it, by code or name as `jaxaudio.data.whisper_tokenizer` knows them; None if not known.
      duration_s: Length of the audio; None if not known.
      segments: Parts of the text with their times: sorted, apart, each longer than nothing.
      task: "transcribe", or "translate" where the texts are English translations.
      previous_text: What was said before the audio begins.
      id: Name of the utterance in results; no two of a list are equal.
    """

    audio: str
    text: str | None = None
    language: str | None = None
    duration_s: float | None = None
    segments: tuple[TimedText, ...] = ()
    task: str = "transcribe"
    previous_text: str | None = None
    id: str | None = None


def read_manifest(path: str | os.PathLike, *, check_audio: bool = False) -> list[Utterance]:
    """Reads a list; see the module for the format.

    Args:
      path: File to read.
      check_audio: Whether an audio file that does not exist is an error here; otherwise its reader finds out.

    Returns:
      The utterances in order, their paths joined to the folder of the list.

    Raises:
      ManifestError: There is no such file or no utterance in it; a line is not a JSON object in UTF-8; a field is
        unknown, missing or of the wrong type; a time is negative, not finite, or out of order; an id is there twice;
        with `check_audio`, an audio file is not there.
    """
    folder, utterances, lines_of_ids = os.path.dirname(os.fspath(path)), [], {}
    for number, line in _lines(path):
        where = f"{os.fspath(path)}:{number}"
        utterance = from_fields(_object(line, where), where)
        utterance = dataclasses.replace(utterance, audio=os.path.join(folder, utterance.audio))
        if check_audio and not os.path.isfile(utterance.audio):
            raise ManifestError(f"{where}: audio: there is no file {utterance.audio!r}; check the path, or the folder.")
        if utterance.id is not None:
            first = lines_of_ids.setdefault(utterance.id, number)
            if first != number:
                raise ManifestError(f"{where}: id: {utterance.id!r} is that of line {first} too; expected unique ids.")
        utterances.append(utterance)
    if not utterances:
        raise ManifestError(f"{os.fspath(path)}: has no utterances; expected one JSON object per line.")
    return utterances


def write_manifest(utterances: Iterable[Utterance], path: str | os.PathLike) -> None:
    """Writes a list that `read_manifest` reads back to equal utterances.

    Paths are written relative to the folder of the list where the files are in it, absolute otherwise. Fields that
    have their default are left out.

    Raises:
      ManifestError: An utterance that `read_manifest` would reject; has its position and field.
    """
    folder, lines, ids = os.path.abspath(os.path.dirname(os.fspath(path))), [], set()
    for number, utterance in enumerate(utterances, 1):
        fields, where = to_fields(utterance), f"{os.fspath(path)}: utterance {number}"
        from_fields(fields, where)
        if utterance.id is not None and utterance.id in ids:
            raise ManifestError(f"{where}: id: {utterance.id!r} is there twice; expected unique ids.")
        ids.add(utterance.id)
        audio = os.path.abspath(utterance.audio)
        fields["audio"] = os.path.relpath(audio, folder) if os.path.commonpath([audio, folder]) == folder else audio
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    if not lines:
        raise ManifestError(f"{os.fspath(path)}: there are no utterances to write.")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def shard(items: Sequence[T], index: int, count: int) -> list[T]:
    """Every `count`-th item from the `index`-th on: the share of one of `count` processes.

    The shares of all processes are disjoint and hold everything; their sizes differ by one at most.

    Raises:
      ValueError: `count` is less than 1, or `index` is not from 0 to count - 1 (has both).
    """
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"index={index} of count={count} processes; expected count >= 1 and 0 <= index < count.")
    return list(items[index::count])


def _lines(path: str | os.PathLike) -> Iterable[tuple[int, str]]:
    """Number and text of the lines that are not empty."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ManifestError(f"{os.fspath(path)}: there is no such file; expected a list in JSON lines.") from error
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ManifestError(
                f"{os.fspath(path)}:{number}: is not UTF-8 ({error}); save the list as UTF-8."
            ) from error
        if text:
            yield number, text


def _object(line: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ManifestError(f"{where}: {twice}: is there twice; expected once.")
        return fields

    try:
        fields = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}: is not JSON ({error}): {_short(line)}; expected one object per line.") from error
    if not isinstance(fields, dict):
        raise ManifestError(f'{where}: is {_short(line)}; expected an object such as {{"audio": "a.wav"}}.')
    return fields


def to_fields(utterance: Utterance) -> dict[str, Any]:
    """The JSON object of an utterance: the fields that have not their default, the path as it is."""
    fields = {
        field.name: getattr(utterance, field.name)
        for field in dataclasses.fields(utterance)
        if field.default is dataclasses.MISSING or getattr(utterance, field.name) != field.default
    }
    if utterance.segments:
        fields["segments"] = [dataclasses.asdict(segment) for segment in utterance.segments]
    return fields


def from_fields(fields: dict[str, Any], where: str) -> Utterance:
    """The utterance of a JSON object, its path as it stands there.

    Args:
      fields: see the module.
      where: what the messages begin with.
    Raises:
      ManifestError: a field is unknown, missing or of the wrong type, or a time is out of order.
    """
    _check_names(fields, Utterance, where)
    fields = {name: value for name, value in fields.items() if value is not None}
    if "audio" not in fields:
        raise ManifestError(f"{where}: audio: is missing; expected the path of a file.")
    for name in ("audio", "text", "language", "task", "previous_text", "id"):
        if name in fields:
            _check(fields, name, "a string", lambda value: isinstance(value, str), where)
    _check(fields, "audio", "the path of a file", bool, where)
    if "task" in fields:
        _check(fields, "task", f"one of {', '.join(TASKS)}", TASKS.__contains__, where)
    if "duration_s" in fields:
        _check(fields, "duration_s", "a positive number of seconds", lambda value: _is_time(value) and value > 0, where)
        fields["duration_s"] = float(fields["duration_s"])
    if "segments" in fields:
        _check(fields, "segments", "a list", lambda value: isinstance(value, list), where)
        fields["segments"] = _segments(fields["segments"], where)
    return Utterance(**fields)


def _segments(segments: list[Any], where: str) -> tuple[TimedText, ...]:
    read, previous_end = [], 0.0
    for number, fields in enumerate(segments):
        place = f"{where}: segments[{number}]"
        if not isinstance(fields, dict):
            raise ManifestError(f"{place}: is {_short(fields)}; expected an object with start_s, end_s and text.")
        _check_names(fields, TimedText, place)
        for name in ("start_s", "end_s", "text"):
            if name not in fields:
                raise ManifestError(f"{place}: {name}: is missing; expected start_s, end_s and text.")
        _check(fields, "text", "a string", lambda value: isinstance(value, str), place)
        for name in ("start_s", "end_s"):
            _check(fields, name, "a number of seconds, 0 or more", _is_time, place)
        start, end = float(fields["start_s"]), float(fields["end_s"])
        if end <= start:
            raise ManifestError(f"{place}: end_s: is {end} and start_s is {start}; expected a later end.")
        if start < previous_end:
            raise ManifestError(
                f"{place}: start_s: is {start}, before the end of the segment before it, {previous_end}; expected "
                "segments that are sorted and do not overlap."
            )
        previous_end = end
        read.append(TimedText(start, end, fields["text"]))
    return tuple(read)


def _check_names(fields: dict[str, Any], kind: type, where: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for name, value in fields.items():
        if name not in known:
            raise ManifestError(f"{where}: {name}: unknown field, {_short(value)}; the fields are {', '.join(known)}.")


def _check(fields: dict[str, Any], name: str, expected: str, is_right: Callable[[Any], bool], where: str) -> None:
    if not is_right(fields[name]):
        raise ManifestError(f"{where}: {name}: is {_short(fields[name])}; expected {expected}.")


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
