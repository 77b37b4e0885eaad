"""Notes in seconds, and Standard MIDI Files.

A note is what pictures, sound and token codecs share; a voice is one track-and-channel of the file.
"""

import collections
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxaudio.data.files import atomic_path

if TYPE_CHECKING:
    import mido

TICKS_PER_BEAT = 480
DEFAULT_TEMPO_US = 500_000  # microseconds per quarter note until the file says otherwise (Standard MIDI Files 1.0)
DRUM_CHANNEL = 9


class MidiError(ValueError):
    """A MIDI file that cannot be read or written; the message names the file and the reason."""


class Note(NamedTuple):
    """One sounding note.

    Attributes:
        start_s: Onset in seconds.
        end_s: Release in seconds, later than `start_s`.
        pitch: MIDI pitch, 0 to 127 (60 is middle C).
        velocity: MIDI velocity, 1 to 127.
        voice: Index of the part it belongs to (0 is the first, for chorales the soprano).
    """

    start_s: float
    end_s: float
    pitch: int
    velocity: int
    voice: int


def write_midi(notes: Sequence[Note], path: str | os.PathLike, *, tempo: float = 120.0, program: int = 0) -> None:
    """Writes a type 1 file: one track with the tempo, then one track and channel per voice.

    Args:
        notes: In any order. Times are rounded to 1/480 of a quarter note.
        path: File to write; it appears whole or not at all.
        tempo: Quarter notes per minute. It only sets where beats fall; seconds are kept.
        program: General MIDI program of every voice, counted from 0 (0 piano, 19 church organ).

    Raises:
        MidiError: No notes, or a note whose pitch, velocity, times or voice MIDI cannot hold (has the note).
    """
    import mido

    if not notes:
        raise MidiError(f"{path}: there are no notes to write.")
    for note in notes:
        _check_note(note, path)
    file = mido.MidiFile(type=1, ticks_per_beat=TICKS_PER_BEAT)
    file.tracks.append(mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(tempo))]))
    ticks_per_second = TICKS_PER_BEAT * 1e6 / mido.bpm2tempo(tempo)
    for voice in range(max(note.voice for note in notes) + 1):
        channel = voice if voice < DRUM_CHANNEL else voice + 1
        track = mido.MidiTrack([mido.Message("program_change", program=program, channel=channel)])
        tick = 0
        for at, velocity, pitch in _track_events([n for n in notes if n.voice == voice], ticks_per_second):
            track.append(mido.Message("note_on", note=pitch, velocity=velocity, time=at - tick, channel=channel))
            tick = at
        file.tracks.append(track)
    with atomic_path(path) as temporary:
        file.save(temporary)


def read_midi(path: str | os.PathLike, *, tempo: float | None = None) -> tuple[Note, ...]:
    """Reads every note of a type 0 or 1 file, sorted by start, voice and pitch.

    Voices are the pairs of track and channel that hold notes, numbered in the order of the file. Of equal pitches that
    overlap in one voice the first to start ends first. A note never released ends with its track; a release
    without a note is no event. Pedals are not applied.

    Args:
        path: The file.
        tempo: None follows the tempo changes of the file. A number, in quarter notes per minute, replaces them all, so
            that times stay proportional to beats (what a metrical grid needs).

    Raises:
        FileNotFoundError: There is no such file.
        MidiError: The file is broken, truncated, of an unsupported kind, or has no notes; says which and what to do.
    """
    file = _parse(path)
    seconds_at = _seconds_of_ticks(file, tempo)
    voices: dict[tuple[int, int], int] = {}
    notes = []
    for track_index, track in enumerate(file.tracks):
        spans = list(_note_spans(track))
        for channel in sorted({span[0] for span in spans}):
            voices[track_index, channel] = len(voices)
        for channel, pitch, velocity, start, end in spans:
            voice = voices[track_index, channel]
            notes.append(Note(seconds_at(start), seconds_at(end), pitch, velocity, voice))
    if not notes:
        raise MidiError(f"{path} is a MIDI file without notes ({len(file.tracks)} tracks); give one that has some.")
    return tuple(sorted(notes, key=lambda n: (n.start_s, n.voice, n.pitch, n.end_s)))


def _check_note(note: Note, path: str | os.PathLike) -> None:
    if not (0 <= note.pitch <= 127 and 1 <= note.velocity <= 127):
        raise MidiError(f"{path}: {note} needs a pitch in 0..127 and a velocity in 1..127.")
    if not 0 <= note.start_s < note.end_s:
        raise MidiError(f"{path}: {note} needs 0 <= start_s < end_s.")
    if not 0 <= note.voice < 15:
        raise MidiError(f"{path}: {note} needs a voice in 0..14 (16 MIDI channels less the one for drums).")


def _track_events(notes: Sequence[Note], ticks_per_second: float) -> list[tuple[int, int, int]]:
    """(tick, velocity or 0 for a release, pitch), releases first where ticks are equal."""
    events = []
    for note in notes:
        start = round(note.start_s * ticks_per_second)
        # Rounding must not turn a very short note into a release before its onset.
        end = max(start + 1, round(note.end_s * ticks_per_second))
        events += [(start, note.velocity, note.pitch), (end, 0, note.pitch)]
    return sorted(events, key=lambda event: (event[0], event[1] > 0, event[2]))


def _parse(path: str | os.PathLike) -> "mido.MidiFile":
    import mido

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no MIDI file {path}.")
    try:
        file = mido.MidiFile(path)
    except EOFError as error:
        raise MidiError(f"{path} is truncated: it ends inside a track or header; get a whole copy.") from error
    except (OSError, ValueError, IndexError, KeyError, mido.KeySignatureError) as error:
        raise MidiError(f"{path} is not a readable MIDI file: {error}.") from error
    if file.type == 2:
        raise MidiError(f"{path} is a type 2 MIDI file (independent sequences); save it as type 0 or 1.")
    if file.ticks_per_beat <= 0:
        raise MidiError(f"{path} counts time in SMPTE frames ({file.ticks_per_beat}); save it with ticks per beat.")
    return file


def _seconds_of_ticks(file: "mido.MidiFile", tempo: float | None):
    """The running tempo map as a function from absolute ticks to seconds."""
    if tempo is not None:
        return lambda tick: tick * 60.0 / (tempo * file.ticks_per_beat)
    changes = {0: DEFAULT_TEMPO_US}  # a file has one tempo map, whichever tracks its changes stand in
    for track in file.tracks:
        tick = 0
        for message in track:
            tick += message.time
            if message.type == "set_tempo":
                changes[tick] = message.tempo
    segments = []
    seconds, last_tick, last_tempo = 0.0, 0, DEFAULT_TEMPO_US
    for tick, microseconds in sorted(changes.items()):
        seconds += (tick - last_tick) * last_tempo / (1e6 * file.ticks_per_beat)
        segments.append((tick, seconds, microseconds))
        last_tick, last_tempo = tick, microseconds

    def seconds_at(tick: int) -> float:
        start, seconds, microseconds = next(segment for segment in reversed(segments) if segment[0] <= tick)
        return seconds + (tick - start) * microseconds / (1e6 * file.ticks_per_beat)

    return seconds_at


def _note_spans(track: "mido.MidiTrack") -> Iterator[tuple[int, int, int, int, int]]:
    """Yields (channel, pitch, velocity, start tick, end tick); spans of no length are no notes."""
    sounding = collections.defaultdict(collections.deque)
    tick = 0
    for message in track:
        tick += message.time
        if message.type not in ("note_on", "note_off"):
            continue
        key = (message.channel, message.note)
        if message.type == "note_on" and message.velocity > 0:
            sounding[key].append((message.velocity, tick))
        elif sounding[key]:
            velocity, start = sounding[key].popleft()
            if tick > start:
                yield (*key, velocity, start, tick)
    for key, unreleased in sounding.items():
        for velocity, start in unreleased:
            if tick > start:
                yield (*key, velocity, start, tick)
