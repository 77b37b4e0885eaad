"""Four-part chorales on a grid of 16th notes, as tokens and as MIDI.

A grid is an integer array (T, 4): T 16th steps of soprano, alto, tenor and bass, each a MIDI pitch or `REST`. A held
note is the repeated pitch, so two notes of one pitch that follow each other directly cannot be told from one long note
("Music Transformer", Huang et al. 2018, arXiv 1809.04281, §3.1). Tokens are the grid in raster order
S1 A1 T1 B1 S2 A2 ..., all voices with one vocabulary:

    0         pad, and the start of a sequence; never something to predict
    1         rest
    2 ... 47  MIDI pitch 36 ... 81 (id = pitch - 34)
"""

import os
from collections.abc import Sequence

import numpy as np

from jaxaudio.data.midi import Note, read_midi, write_midi

REST = -1
VOICES = ("soprano", "alto", "tenor", "bass")
NUM_VOICES = len(VOICES)
STEPS_PER_BEAT = 4
TOKENS_PER_BEAT = STEPS_PER_BEAT * NUM_VOICES
LOWEST_PITCH = 36
HIGHEST_PITCH = 81

PAD_TOKEN = 0
REST_TOKEN = 1
LOWEST_PITCH_TOKEN = 2
PITCH_OFFSET = LOWEST_PITCH - LOWEST_PITCH_TOKEN
HIGHEST_PITCH_TOKEN = HIGHEST_PITCH - PITCH_OFFSET
VOCAB_SIZE = HIGHEST_PITCH_TOKEN + 1

DEFAULT_TEMPO = 80.0  # quarter notes per minute
CHURCH_ORGAN = 19


class ChoraleError(ValueError):
    """Notes, a grid or tokens that are no four-part chorale; the message has the offending value."""


def encode_grid(grid: np.ndarray) -> np.ndarray:
    """Grid (T, 4) of pitches or `REST` to tokens (4 T,), int32, in raster order S A T B.

    Raises:
        ChoraleError: The grid is not an integer (T, 4) array, or a pitch lies outside 36..81 (says which and where).
    """
    grid = check_grid(grid)
    return np.where(grid == REST, REST_TOKEN, grid - PITCH_OFFSET).astype(np.int32).reshape(-1)


def decode_tokens(tokens: np.ndarray | Sequence[int]) -> np.ndarray:
    """Tokens (4 T,) to a grid (T, 4), int32; the inverse of `encode_grid`.

    Raises:
        ChoraleError: The number of tokens is no multiple of 4, or an id lies outside 1..47 (says which and where).
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not (np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0):
        raise ChoraleError(f"Tokens are one row of integers; got shape {tokens.shape} and dtype {tokens.dtype}.")
    if len(tokens) % NUM_VOICES:
        raise ChoraleError(f"{len(tokens)} tokens are no whole number of steps of {NUM_VOICES} voices.")
    wrong = np.flatnonzero((tokens < REST_TOKEN) | (tokens > HIGHEST_PITCH_TOKEN))
    if len(wrong):
        at = wrong[0]
        raise ChoraleError(
            f"Token {tokens[at]} at position {at} is neither a rest ({REST_TOKEN}) nor a pitch "
            f"({LOWEST_PITCH_TOKEN}..{HIGHEST_PITCH_TOKEN})."
        )
    grid = np.where(tokens == REST_TOKEN, REST, tokens + PITCH_OFFSET)
    return grid.astype(np.int32).reshape(-1, NUM_VOICES)


def check_grid(grid: np.ndarray) -> np.ndarray:
    """Returns `grid` as int32 (T, 4) when every value is `REST` or a pitch in 36..81.

    Raises:
        ChoraleError: Otherwise; the message has the shape, or the value with its step and voice.
    """
    grid = np.asarray(grid)
    if grid.ndim != 2 or grid.shape[1] != NUM_VOICES or not np.issubdtype(grid.dtype, np.integer):
        raise ChoraleError(
            f"A chorale grid is an integer array (steps, {NUM_VOICES}); got shape {grid.shape} and dtype {grid.dtype}."
        )
    wrong = np.argwhere((grid != REST) & ((grid < LOWEST_PITCH) | (grid > HIGHEST_PITCH)))
    if len(wrong):
        step, voice = wrong[0]
        raise ChoraleError(
            f"Pitch {grid[step, voice]} of the {VOICES[voice]} at step {step} lies outside "
            f"{LOWEST_PITCH}..{HIGHEST_PITCH} (a rest is {REST})."
        )
    return grid.astype(np.int32)


def grid_to_notes(grid: np.ndarray, tempo: float = DEFAULT_TEMPO, *, velocity: int = 80) -> tuple[Note, ...]:
    """Notes of a grid; equal pitches that follow each other in a voice become one note, for the grid has no onset flag.

    Args:
        grid: (T, 4) of pitches or `REST`.
        tempo: Quarter notes per minute.
        velocity: MIDI velocity of every note.

    Returns:
        Notes sorted by start and voice; voice 0 is the soprano.

    Raises:
        ChoraleError: As `check_grid`.
    """
    grid = check_grid(grid)
    step_s = 60.0 / (tempo * STEPS_PER_BEAT)
    notes = []
    for voice, pitches in enumerate(grid.T):
        bounds = np.flatnonzero(np.diff(pitches, prepend=REST - 1, append=REST - 1))
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if pitches[start] != REST:
                notes.append(Note(start * step_s, end * step_s, int(pitches[start]), velocity, voice))
    return tuple(sorted(notes, key=lambda note: (note.start_s, note.voice)))


def notes_to_grid(notes: Sequence[Note], tempo: float = DEFAULT_TEMPO) -> np.ndarray:
    """Grid (T, 4) of notes in four voices, their times rounded to the nearest 16th.

    The first step is second 0 and the last one ends with the last note, so rests of all voices at the end are not kept.
    Voices are taken in ascending order as soprano, alto, tenor, bass.

    Args:
        notes: In any order.
        tempo: Quarter notes per minute that the times were made with.

    Raises:
        ChoraleError: There are more or fewer than four voices (says how many), a pitch lies outside 36..81, a note
            is too short for the grid, or two notes of one voice sound at once.
    """
    voices = sorted({note.voice for note in notes})
    if len(voices) != NUM_VOICES:
        relation = "fewer" if len(voices) < NUM_VOICES else "more"
        raise ChoraleError(
            f"Chorale with {relation} voices than {NUM_VOICES}: found {len(voices)}. Give each of soprano, alto, tenor "
            "and bass a track or channel of its own, in this order."
        )
    steps_per_second = tempo * STEPS_PER_BEAT / 60.0
    num_steps = max(_nearest(note.end_s * steps_per_second) for note in notes)
    grid = np.full((num_steps, NUM_VOICES), REST, np.int32)
    for note in sorted(notes, key=lambda note: note.start_s):
        voice = voices.index(note.voice)
        start, end = (_nearest(time * steps_per_second) for time in (note.start_s, note.end_s))
        if start == end:
            raise ChoraleError(
                f"The {VOICES[voice]} note of pitch {note.pitch} at {note.start_s:.3f} s lasts "
                f"{note.end_s - note.start_s:.3f} s, which rounds to no 16th at {tempo:g} quarter notes per minute."
            )
        sounding = grid[start:end, voice]
        if (sounding != REST).any():
            first = int(np.flatnonzero(sounding != REST)[0])
            raise ChoraleError(
                f"The {VOICES[voice]} sounds pitches {sounding[first]} and {note.pitch} at once at step "
                f"{start + first}; a chorale voice is one note at a time."
            )
        grid[start:end, voice] = note.pitch
    return check_grid(grid)


def write_chorale_midi(grid: np.ndarray, path: str | os.PathLike, *, tempo: float = DEFAULT_TEMPO) -> None:
    """Writes a grid (T, 4) as a MIDI file for organ, one track and channel per voice.

    Raises:
        ChoraleError: As `check_grid`.
        MidiError: The grid holds only rests.
    """
    write_midi(grid_to_notes(grid, tempo), path, tempo=tempo, program=CHURCH_ORGAN)


def read_chorale_midi(path: str | os.PathLike) -> np.ndarray:
    """Reads a MIDI file with four voices to a grid (T, 4), int32; tempo changes do not move notes on the grid.

    Raises:
        FileNotFoundError: There is no such file.
        MidiError: The file is broken, truncated or has no notes.
        ChoraleError: As `notes_to_grid`, with the path.
    """
    try:
        return notes_to_grid(read_midi(path, tempo=DEFAULT_TEMPO), DEFAULT_TEMPO)
    except ChoraleError as error:
        raise ChoraleError(f"{path}: {error}") from error


def _nearest(steps: float) -> int:
    """Rounds half up, unlike `round`, so that two notes half a step long never both vanish."""
    return int(np.floor(steps + 0.5))
