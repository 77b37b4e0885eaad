"""MIDI files of keyboard performances, read fast and to note-seq's numbers.

`midi.read_midi` keeps every note of a score by voice. This reader is for corpora of recorded playing: it knows notes,
sustain pedal and tempo, pairs key downs with key ups as pretty_midi does (with which note-seq reads), and computes
seconds by the same arithmetic, so that quantised times agree to the last step.
"""

import os
import pathlib
from collections.abc import Iterator

import numpy as np

from jaxaudio.data.events import NoteArray, Performance
from jaxaudio.data.midi import DEFAULT_TEMPO_US, DRUM_CHANNEL, MidiError

SUSTAIN_PEDAL = 64
PEDAL_DOWN = 64  # the lowest value of the controller that presses the pedal
NOTE_OFF, NOTE_ON, CONTROL_CHANGE, SYSTEM_EXCLUSIVE, ESCAPE, META = 0x80, 0x90, 0xB0, 0xF0, 0xF7, 0xFF
SET_TEMPO = 0x51
MAX_DELTA = 0x0FFFFFFF  # the largest variable-length number of Standard MIDI Files 1.0


def read_performance(source: str | os.PathLike | bytes) -> Performance:
    """Reads notes and sustain pedal of a type 0 or 1 file.

    A key up ends every sounding note of its pitch and channel that began earlier. One that began at the same tick goes
    on if the key up ended others, and is dropped if not; notes without a key up are dropped too: both are counted in
    `num_dropped`. The pedal of the channel for drums, and that of a channel without notes, is not read. All this is as
    pretty_midi and note-seq do. Unlike there, tempo changes outside of the first track count (one map serves the whole
    file), and a channel that changes its program stays one part.

    Args:
        source: The file, or its content.

    Raises:
        FileNotFoundError: There is no such file.
        MidiError: The file is broken, truncated, of an unsupported kind, or has no complete note; says which and where.
    """
    if isinstance(source, bytes):
        name, content = "The MIDI data", source
    else:
        if not pathlib.Path(source).is_file():
            raise FileNotFoundError(f"There is no MIDI file {source}.")
        name, content = str(source), pathlib.Path(source).read_bytes()
    ticks_per_beat, tracks = _chunks(content, name)

    notes, pedals, tempos, parts, num_dropped = [], [], [], {}, 0
    for index, track in enumerate(tracks):
        num_dropped += _read_track(_messages(track, f"{name}, track {index},"), index, parts, notes, pedals, tempos)
    if not notes:
        raise MidiError(f"{name} is a MIDI file without complete notes ({len(tracks)} tracks); give one that has some.")
    return _performance(notes, pedals, tempos, parts, ticks_per_beat, num_dropped)


def _chunks(content: bytes, name: str) -> tuple[int, list[bytes]]:
    """Ticks per beat and the content of every track."""
    if content[:4] != b"MThd":
        raise MidiError(f"{name} is not a readable MIDI file: it begins with {content[:4]!r}, not with MThd.")
    kind, _, division = (int.from_bytes(content[i : i + 2]) for i in (8, 10, 12))
    if len(content) < 14:
        raise MidiError(f"{name} is truncated: it ends inside its header; get a whole copy.")
    if kind > 1:
        raise MidiError(f"{name} is a type {kind} MIDI file (independent sequences); save it as type 0 or 1.")
    if not 0 < division < 0x8000:
        raise MidiError(f"{name} has no ticks per beat ({division:#06x}, SMPTE frames or 0); save it with some.")
    tracks = []
    position = 8 + int.from_bytes(content[4:8])
    while position < len(content):
        start = position + 8
        position = start + int.from_bytes(content[start - 4 : start])
        if max(start, position) > len(content):
            raise MidiError(f"{name} is truncated: it ends inside chunk {content[start - 8 : start - 4]!r}.")
        if content[start - 8 : start - 4] == b"MTrk":  # other kinds are for other programs
            tracks.append(content[start:position])
    return division, tracks


def _messages(track: bytes, name: str) -> Iterator[tuple[int, int, int, int]]:
    """Yields (tick, status, two data bytes) of notes and controllers, and (tick, META, tempo, 0)."""
    position, tick, running = 0, 0, 0
    try:
        while position < len(track):
            delta, position = _number(track, position, name)
            tick += delta
            status = track[position]
            if status < 0x80:
                status = running
            else:
                position += 1
            if 0x80 <= status < 0xF0:
                running = status
                first = track[position]
                if status & 0xE0 == 0xC0:  # program and channel pressure have one data byte
                    second = 0
                    position += 1
                else:
                    second = track[position + 1]
                    position += 2
                if (first | second) & 0x80:
                    raise MidiError(f"{name} is broken: a status byte stands among the data before byte {position}.")
                if status < 0xA0 or (status & 0xF0 == CONTROL_CHANGE and first == SUSTAIN_PEDAL):
                    yield tick, status, first, second
            elif status in (META, SYSTEM_EXCLUSIVE, ESCAPE):
                is_tempo = status == META and track[position] == SET_TEMPO
                length, position = _number(track, position + (status == META), name)
                if is_tempo:
                    yield tick, META, int.from_bytes(track[position : position + length]), 0
                position += length
            else:
                raise MidiError(
                    f"{name} is broken: no message can begin with {track[position - 1]:#04x} at {position}."
                )
    except IndexError as error:
        raise MidiError(f"{name} is truncated: it ends inside a message; get a whole copy.") from error
    if position > len(track):
        raise MidiError(f"{name} is truncated: its last message is {position - len(track)} bytes longer than it.")


def _number(track: bytes, position: int, name: str) -> tuple[int, int]:
    """A variable-length number and the position after it."""
    byte = track[position]
    number = byte & 0x7F
    while byte & 0x80:
        position += 1
        byte = track[position]
        number = number << 7 | byte & 0x7F
        if number > MAX_DELTA:
            raise MidiError(f"{name} is broken: the number before byte {position} has more than 28 bits.")
    return number, position + 1


def _read_track(messages: Iterator[tuple[int, int, int, int]], track: int, parts, notes, pedals, tempos) -> int:
    """Adds (start, end, pitch, velocity, part), (tick, down, (track, channel)), (tick, tempo); counts dropped notes."""
    sounding: dict[tuple[int, int], list[tuple[int, int]]] = {}
    num_dropped = 0
    for tick, status, first, second in messages:
        channel = status & 0x0F
        if status == META:
            tempos.append((tick, first))
        elif status >= CONTROL_CHANGE:
            pedals.append((tick, second >= PEDAL_DOWN, (track, channel)))
        elif status >= NOTE_ON and second > 0:
            sounding.setdefault((channel, first), []).append((tick, second))
        else:
            started = sounding.pop((channel, first), ())
            ended = [start for start in started if start[0] != tick]
            if ended:
                part = parts.setdefault((track, channel), len(parts))
                notes += [(start, tick, first, velocity, part) for start, velocity in ended]
            if len(ended) < len(started):
                if ended:
                    sounding[channel, first] = [start for start in started if start[0] == tick]
                else:
                    num_dropped += len(started)
    return num_dropped + sum(map(len, sounding.values()))


def _performance(notes, pedals, tempos, parts, ticks_per_beat: int, num_dropped: int) -> Performance:
    start, end, pitch, velocity, part = np.array(notes, np.int64).T
    seconds = _seconds(np.concatenate([start, end]), tempos, ticks_per_beat)
    start_s, end_s = seconds[: len(start)], seconds[len(start) :]
    # note-seq lists part after part, and orders by start and pitch; equal ones stay as they are.
    order = np.lexsort((part, pitch, start_s))
    array = NoteArray(start_s, end_s, pitch.astype(np.int32), velocity.astype(np.int32))[order]
    pedals = [(tick, down, parts[key]) for tick, down, key in pedals if key in parts and key[1] != DRUM_CHANNEL]
    pedal_tick, down, pedal_part = np.array(pedals, np.int64).reshape(-1, 3).T
    return Performance(
        notes=array,
        part=part[order].astype(np.int32),
        pedal_s=_seconds(pedal_tick, tempos, ticks_per_beat),
        pedal_down=down.astype(bool),
        pedal_part=pedal_part.astype(np.int32),
        num_dropped=num_dropped,
    )


def _seconds(ticks: np.ndarray, tempos: list[tuple[int, int]], ticks_per_beat: int) -> np.ndarray:
    """Seconds (N,) of absolute ticks, by the operations of pretty_midi in their order."""
    changes = [(0, 60.0 / ((6e7 / DEFAULT_TEMPO_US) * ticks_per_beat), 0.0)]  # tick, seconds per tick, seconds
    for tick, tempo in sorted(tempos, key=lambda change: change[0]):
        if tempo <= 0:
            raise MidiError(f"A tempo of {tempo} microseconds per beat, at tick {tick}, stops the time.")
        scale = 60.0 / ((6e7 / tempo) * ticks_per_beat)
        last_tick, last_scale, last_s = changes[-1]
        if tick == 0:
            changes = [(0, scale, 0.0)]
        elif scale != last_scale:
            changes.append((tick, scale, last_s + last_scale * (tick - last_tick)))
    change_ticks, scales, seconds = (np.array(column) for column in zip(*changes, strict=True))
    index = np.searchsorted(change_ticks, ticks, side="right") - 1
    return seconds[index] + scales[index] * (ticks - change_ticks[index])
