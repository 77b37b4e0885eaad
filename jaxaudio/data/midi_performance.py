"""MIDI files of keyboard performances, read fast and to note-seq's numbers.

`midi.read_midi` keeps every note of a score by voice. This reader is for corpora of recorded playing: it knows notes,
sustain pedal and tempo, pairs key downs with key ups as pretty_midi does (with which note-seq reads), and computes
seconds by the same arithmetic, so that quantised times agree to the last step.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from jaxaudio.data.events import NoteArray, Performance
from jaxaudio.data.midi import DEFAULT_TEMPO_US, DRUM_CHANNEL, MidiError

SUSTAIN_PEDAL = 64
PEDAL_DOWN = 64  # the lowest value of the controller that presses the pedal
NOTE_ON, CONTROL_CHANGE, SYSTEM_EXCLUSIVE, ESCAPE, META = 0x90, 0xB0, 0xF0, 0xF7, 0xFF  # 0x80 is a key up
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
    streams = [_messages(track, f"{name}, track {index},") for index, track in enumerate(tracks)]
    try:
        messages = [np.fromiter(stream, np.int64) for stream in streams]
    except OverflowError as error:
        raise MidiError(f"{name} is broken: it lasts 2^31 ticks or more.") from error
    performance = _performance(messages, ticks_per_beat)
    if not len(performance.notes):
        raise MidiError(f"{name} is a MIDI file without complete notes ({len(tracks)} tracks); give one that has some.")
    return performance


def _chunks(content: bytes, name: str) -> tuple[int, list[bytes]]:
    """Ticks per beat and the content of every track."""
    if content[:4] != b"MThd":
        raise MidiError(f"{name} is not a readable MIDI file: it begins with {content[:4]!r}, not with MThd.")
    kind, num_tracks, division = (int.from_bytes(content[i : i + 2]) for i in (8, 10, 12))
    if len(content) < 14:
        raise MidiError(f"{name} is truncated: it ends inside its header; get a whole copy.")
    if kind > 1:
        raise MidiError(f"{name} is a type {kind} MIDI file (independent sequences); save it as type 0 or 1.")
    if not 0 < division < 0x8000:
        raise MidiError(f"{name} has no ticks per beat ({division:#06x}, SMPTE frames or 0); save it with some.")
    tracks = []
    position = 8 + int.from_bytes(content[4:8])
    while len(tracks) < num_tracks:
        start = position + 8
        position = start + int.from_bytes(content[start - 4 : start])
        if max(start, position) > len(content):
            raise MidiError(f"{name} is truncated: it ends in track {len(tracks)} of {num_tracks}; get a whole copy.")
        if content[start - 8 : start - 4] == b"MTrk":  # other kinds are for other programs
            tracks.append(content[start:position])
    return division, tracks


def _messages(track: bytes, name: str) -> Iterator[int]:
    """Yields 32 bits of tick, 8 of status and 24 of data for every message of a note, the pedal and the tempo."""
    position, tick, running = 0, 0, 0
    try:
        while position < len(track):
            delta = track[position]
            position += 1
            if delta >= 0x80:
                delta, position = _number(track, position - 1, name)
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
                    yield tick << 32 | status << 24 | first << 8 | second
            elif status in (META, SYSTEM_EXCLUSIVE, ESCAPE):
                is_tempo = status == META and track[position] == SET_TEMPO
                length, position = _number(track, position + (status == META), name)
                if is_tempo:
                    tempo = int.from_bytes(track[position : position + length])
                    if length != 3 or not tempo:
                        raise MidiError(f"{name} is broken: a tempo of {tempo} microseconds in {length} bytes.")
                    yield tick << 32 | META << 24 | tempo
                position += length
            else:
                raise MidiError(f"{name} is broken: no message begins with {status:#04x}, before byte {position}.")
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


def _performance(tracks: Sequence[np.ndarray], ticks_per_beat: int) -> Performance:
    messages = np.concatenate([np.zeros(0, np.int64), *tracks])
    track = np.repeat(np.arange(len(tracks)), [len(messages) for messages in tracks])
    tick, status, first, second = messages >> 32, messages >> 24 & 0xFF, messages >> 8 & 0xFF, messages & 0xFF
    channel = track << 4 | status & 0x0F
    is_tempo = status == META
    changes = _tempo_changes(tick[is_tempo], messages[is_tempo] & 0xFFFFFF, ticks_per_beat)

    is_note = np.flatnonzero(status < NOTE_ON + 0x10)
    is_on = (status >= NOTE_ON) & (second > 0)
    on, off = (is_note[index] for index in _pair(tick[is_note], (channel << 7 | first)[is_note], is_on[is_note]))
    # note-seq lists part after part, the one that first ends a note first, and orders by start and pitch.
    part_channels, first_end = np.unique(channel[on][np.argsort(off)], return_index=True)
    part_of_channel = np.full(16 * len(tracks), -1, np.int32)
    part_of_channel[part_channels[np.argsort(first_end)]] = np.arange(len(part_channels))
    part, start_s = part_of_channel[channel[on]], _seconds(tick[on], changes)
    order = np.lexsort((on, part, first[on], start_s))
    on, off = on[order], off[order]

    is_pedal = (status & 0xF0 == CONTROL_CHANGE) & (status & 0x0F != DRUM_CHANNEL)
    is_pedal[is_pedal] = part_of_channel[channel[is_pedal]] >= 0
    return Performance(
        notes=NoteArray(
            start_s[order], _seconds(tick[off], changes), first[on].astype(np.int32), second[on].astype(np.int32)
        ),
        part=part[order],
        pedal_s=_seconds(tick[is_pedal], changes),
        pedal_down=second[is_pedal] >= PEDAL_DOWN,
        pedal_part=part_of_channel[channel[is_pedal]],
        num_dropped=int(is_on[is_note].sum()) - len(on),
    )


def _pair(tick: np.ndarray, key: np.ndarray, is_on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of key downs and of the key ups that end them, by `read_performance`'s rule; all (N,)."""
    by_key = np.argsort(key, kind="stable")
    tick, key, is_on = tick[by_key], key[by_key], is_on[by_key]
    on, off = np.flatnonzero(is_on), np.flatnonzero(~is_on)
    up = np.cumsum(~is_on)[on]  # which key up comes next
    released = np.append(key[off], -1)[up] == key[on]
    on, up = on[released], up[released]

    same_tick = tick[on] == tick[off[up]]
    ends_earlier, meets_same = np.zeros((2, len(off)), bool)
    ends_earlier[up[~same_tick]] = True
    meets_same[up[same_tick]] = True
    # Whether a key up has one of its own key before it, at an earlier tick: then it ends what went on beyond that one.
    follows = np.append((np.diff(key[off]) == 0) & (np.diff(tick[off]) > 0), False)
    goes_on = meets_same & ends_earlier
    while True:  # once more for every key up in the longest row of those that hand a note on to the next
        longer = goes_on.copy()
        longer[1:] |= meets_same[1:] & follows[:-1] & goes_on[:-1]
        if (longer == goes_on).all():
            break
        goes_on = longer

    kept = ~same_tick | (goes_on & follows)[up]
    return by_key[on[kept]], by_key[off[(up + same_tick)[kept]]]


def _tempo_changes(ticks: np.ndarray, tempos: np.ndarray, ticks_per_beat: int) -> tuple[np.ndarray, ...]:
    """(ticks, seconds per tick, seconds) of the changes, by the operations of pretty_midi in their order."""
    changes = [(0, 60.0 / ((6e7 / DEFAULT_TEMPO_US) * ticks_per_beat), 0.0)]
    for tick, tempo in sorted(zip(ticks.tolist(), tempos.tolist(), strict=True), key=lambda change: change[0]):
        scale = 60.0 / ((6e7 / tempo) * ticks_per_beat)
        last_tick, last_scale, last_s = changes[-1]
        if tick == 0:
            changes = [(0, scale, 0.0)]
        elif scale != last_scale:
            changes.append((tick, scale, last_s + last_scale * (tick - last_tick)))
    return tuple(np.array(column) for column in zip(*changes, strict=True))


def _seconds(ticks: np.ndarray, changes: tuple[np.ndarray, ...]) -> np.ndarray:
    change_ticks, scales, seconds = changes
    index = np.searchsorted(change_ticks, ticks, side="right") - 1
    return seconds[index] + scales[index] * (ticks - change_ticks[index])
