"""Performances as events: arrays of notes, the sustain pedal, and the code of the Music Transformer.

Huang et al. 2018, "Music Transformer", https://arxiv.org/abs/1809.04281, appendix A.2: a performance is a sequence of
NOTE_ON, NOTE_OFF, TIME_SHIFT and VELOCITY events. Pedal, quantisation and order of events follow the package note-seq
0.0.5 (`sequences_lib.py`, `performance_lib.py`), so that a file gives the tokens the public models were trained on.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxaudio.data.midi import Note

STEPS_PER_SECOND = 100
DEFAULT_VELOCITY = 100  # of notes before the first VELOCITY event
STRETCHES = (0.95, 0.975, 1.0, 1.025, 1.05)  # section 4.2 of the paper
PAD = 0
END_OF_SEQUENCE = 1


@dataclasses.dataclass(frozen=True, eq=False)
class NoteArray:
    """Notes as arrays of one length, ordered by start and then pitch.

    Attributes:
        start_s: (N,) float64, onsets in seconds.
        end_s: (N,) float64, releases in seconds.
        pitch: (N,) int32, 0 to 127.
        velocity: (N,) int32, 1 to 127.
    """

    start_s: np.ndarray
    end_s: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray

    def __len__(self) -> int:
        return len(self.start_s)

    def __getitem__(self, index: np.ndarray | slice) -> "NoteArray":
        """The notes that a mask, an array of positions or a slice selects, in its order."""
        return NoteArray(self.start_s[index], self.end_s[index], self.pitch[index], self.velocity[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Performance:
    """What a MIDI file records of a keyboard; a part is one channel of one track.

    Attributes:
        notes: From key down to key up.
        part: (N,) int32, the part of each note.
        pedal_s: (P,) float64, times of the sustain pedal's messages (controller 64).
        pedal_down: (P,) bool, whether each presses it (values from 64).
        pedal_part: (P,) int32, the part of each.
        num_dropped: Notes of the file left out, for they were never released or had no length.
    """

    notes: NoteArray
    part: np.ndarray
    pedal_s: np.ndarray
    pedal_down: np.ndarray
    pedal_part: np.ndarray
    num_dropped: int = 0


@dataclasses.dataclass(frozen=True)
class EventVocabulary:
    """Ids: `num_reserved` special ones, then NOTE_ON and NOTE_OFF by pitch, TIME_SHIFT by 10 ms, VELOCITY by bin.

    With two reserved ids, 0 is padding and 1 ends the sequence. The default is the layout of Magenta's published
    models, 310 ids for the 88 keys of a piano (`MAGENTA`); `PAPER` is the one of the paper, 388 ids.

    Raises:
        ValueError: A field that makes no vocabulary (has it).
    """

    min_pitch: int = 21
    max_pitch: int = 108
    num_velocity_bins: int = 32
    max_shift_steps: int = 100
    num_reserved: int = 2

    def __post_init__(self):
        if not 0 <= self.min_pitch <= self.max_pitch <= 127:
            raise ValueError(f"Pitches {self.min_pitch}..{self.max_pitch} must be a range within 0..127.")
        if not 1 <= self.num_velocity_bins <= 127:
            raise ValueError(f"num_velocity_bins must be in 1..127, got {self.num_velocity_bins}.")
        if self.max_shift_steps < 1:
            raise ValueError(f"max_shift_steps must be at least 1, got {self.max_shift_steps}.")
        if self.num_reserved not in (0, 2):
            raise ValueError(f"num_reserved must be 0, or 2 for padding and end, got {self.num_reserved}.")

    @property
    def note_on(self) -> range:
        """Ids of NOTE_ON, the lowest pitch first."""
        return range(self.num_reserved, self.num_reserved + self.max_pitch - self.min_pitch + 1)

    @property
    def note_off(self) -> range:
        """Ids of NOTE_OFF, the lowest pitch first."""
        return range(self.note_on.stop, self.note_on.stop + len(self.note_on))

    @property
    def time_shift(self) -> range:
        """Ids of TIME_SHIFT, one step first."""
        return range(self.note_off.stop, self.note_off.stop + self.max_shift_steps)

    @property
    def velocity(self) -> range:
        """Ids of VELOCITY, the softest bin first."""
        return range(self.time_shift.stop, self.time_shift.stop + self.num_velocity_bins)

    @property
    def velocity_bin_size(self) -> int:
        """Velocities per bin; a bin decodes to its softest velocity."""
        return -(-127 // self.num_velocity_bins)

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.velocity.stop


MAGENTA = EventVocabulary()
PAPER = EventVocabulary(min_pitch=0, max_pitch=127, num_reserved=0)


def notes_to_array(notes: Sequence[Note]) -> NoteArray:
    """Notes in any order as arrays; voices are dropped."""
    columns = np.array([note[:4] for note in notes], np.float64).reshape(-1, 4)
    columns = columns[np.lexsort((columns[:, 2], columns[:, 0]))]
    return NoteArray(columns[:, 0], columns[:, 1], columns[:, 2].astype(np.int32), columns[:, 3].astype(np.int32))


def array_to_notes(notes: NoteArray, *, voice: int = 0) -> tuple[Note, ...]:
    """The same notes one by one, all in one voice."""
    columns = (notes.start_s.tolist(), notes.end_s.tolist(), notes.pitch.tolist(), notes.velocity.tolist())
    return tuple(Note(*fields, voice) for fields in zip(*columns, strict=True))


def apply_sustain(performance: Performance) -> NoteArray:
    """Lengthens notes whose key goes up while the pedal is down, as they sound on.

    Such a note ends when the pedal goes up; a pedal never released holds to the last event of the performance. A key
    struck again under the pedal ends the notes of its pitch and part that sound, even one whose key up comes later. Of
    notes of one pitch that start together there only the last stays: the others have no length. At one time the pedal
    acts before keys, up after down. As note-seq's `apply_sustain_control_changes`, before stretching or quantisation.
    """
    notes = performance.notes
    if not len(notes):
        return notes
    last_s = max(notes.start_s.max(), notes.end_s.max(), performance.pedal_s.max(initial=0.0))
    end_s = notes.end_s.copy()
    for part in np.unique(performance.pedal_part):
        pedal = performance.pedal_part == part
        mine = np.flatnonzero(performance.part == part)
        end_s[mine] = _sustained_ends(notes[mine], performance.pedal_s[pedal], performance.pedal_down[pedal], last_s)
    sustained = dataclasses.replace(notes, end_s=end_s)
    return sustained[end_s > notes.start_s]


def _sustained_ends(notes: NoteArray, pedal_s: np.ndarray, down: np.ndarray, last_s: float) -> np.ndarray:
    """Ends (N,) of the notes of one part."""
    order = np.lexsort((~down, pedal_s))
    pedal_s, down = pedal_s[order], down[order]
    is_down_after = np.append(False, down)  # by number of messages so far
    lifts = np.append(pedal_s[~down], last_s)
    held = is_down_after[np.searchsorted(pedal_s, notes.end_s, side="right")]
    end_s = np.where(held, lifts[np.searchsorted(lifts[:-1], notes.end_s, side="right")], notes.end_s)

    by_pitch = np.lexsort((notes.start_s, notes.pitch))  # stable: equal starts keep their order
    start_s, pitch = notes.start_s[by_pitch], notes.pitch[by_pitch]
    under_pedal = is_down_after[np.searchsorted(pedal_s, start_s, side="right")]
    position = np.where(under_pedal, np.arange(len(notes)), len(notes))
    following = np.append(np.minimum.accumulate(position[::-1])[::-1], len(notes))[1:]  # the next note under the pedal
    same_pitch = np.append(pitch, -1)[following] == pitch
    next_s = np.where(same_pitch, np.append(start_s, np.inf)[following], np.inf)
    end_s[by_pitch] = np.minimum(end_s[by_pitch], next_s)
    return end_s


def stretch(notes: NoteArray, factor: float) -> NoteArray:
    """All times multiplied by `factor`: above 1 is slower. Apply the pedal before it, quantise (encode) after it.

    Raises:
        ValueError: The factor is not a positive number (has it).
    """
    if not (factor > 0 and np.isfinite(factor)):
        raise ValueError(f"The factor of stretch must be a positive number, got {factor}.")
    return dataclasses.replace(notes, start_s=notes.start_s * factor, end_s=notes.end_s * factor)


def encode_events(notes: NoteArray, vocabulary: EventVocabulary) -> np.ndarray:
    """Notes as event ids (N,) int32, without an end of sequence; no notes give no events.

    Times go to the nearest 10 ms; a note lasts at least one step. Within a step the notes' events come in the order of
    their starts and pitches, whether ons or offs. A shift precedes the first event of a step, full shifts first; a
    velocity precedes a NOTE_ON whose bin is not that of the NOTE_ON before.

    Raises:
        ValueError: A pitch outside the vocabulary, a velocity outside 1..127, or a time that is negative, not finite
            or before its note's start; has the first such note. Nothing is left out: select before what may stay.
    """
    _check_notes(notes, vocabulary)
    num_notes = len(notes)
    if not num_notes:
        return np.zeros(0, np.int32)
    notes = notes[np.lexsort((notes.pitch, notes.start_s))]
    start, end = (np.floor(times * STEPS_PER_SECOND + 0.5).astype(np.int64) for times in (notes.start_s, notes.end_s))
    end = np.maximum(end, start + 1)

    # One integer orders all events: step, then note, then on before off.
    two_n = 2 * num_notes
    index = np.arange(0, two_n, 2)
    step, event = np.divmod(np.sort(np.concatenate([start * two_n + index, end * two_n + index + 1])), two_n)
    note, is_on = event >> 1, event % 2 == 0
    keys = notes.pitch - vocabulary.min_pitch
    ids = np.where(is_on, vocabulary.note_on.start, vocabulary.note_off.start) + keys[note]

    shift = np.diff(step, prepend=0)
    num_shifts = -(-shift // vocabulary.max_shift_steps)
    bins = ((notes.velocity - 1) // vocabulary.velocity_bin_size)[note]
    changes = np.zeros(two_n, bool)
    changes[is_on] = np.diff(bins[is_on], prepend=-1) != 0

    at = np.cumsum(num_shifts + changes + 1) - 1
    tokens = np.full(at[-1] + 1, vocabulary.time_shift[-1], np.int32)  # what nothing below overwrites is a full shift
    tokens[at] = ids
    tokens[at[changes] - 1] = vocabulary.velocity.start + bins[changes]
    shifts = num_shifts > 0
    rest = (shift[shifts] - 1) % vocabulary.max_shift_steps
    tokens[(at - changes - 1)[shifts]] = vocabulary.time_shift.start + rest
    return tokens


def _check_notes(notes: NoteArray, vocabulary: EventVocabulary) -> None:
    low, high = vocabulary.min_pitch, vocabulary.max_pitch
    for broken, expected in (
        ((notes.pitch < low) | (notes.pitch > high), f"a pitch in {low}..{high}, the vocabulary's"),
        ((notes.velocity < 1) | (notes.velocity > 127), "a velocity in 1..127"),
        # Written so that NaN fails too.
        (~((notes.start_s >= 0) & (notes.start_s <= notes.end_s) & (notes.end_s < np.inf)), "0 <= start_s <= end_s"),
    ):
        if broken.any():
            first = array_to_notes(notes[np.flatnonzero(broken)[:1]])[0]
            raise ValueError(f"{broken.sum()} of {len(notes)} notes need {expected}; the first is {first}.")


def decode_events(tokens: np.ndarray, vocabulary: EventVocabulary) -> tuple[Note, ...]:
    """Event ids (N,) as notes, ordered by start and pitch, in one voice.

    A NOTE_OFF ends the longest sounding note of its pitch, and is nothing where none sounds; notes without length are
    no notes; those never ended end with the last event. Velocities are the lowest of their bins, 100 before the first
    VELOCITY. Padding is passed over, the end of sequence ends.

    Raises:
        ValueError: An id outside the vocabulary (has it and its place).
    """
    _check_tokens(tokens, vocabulary)
    if vocabulary.num_reserved:
        tokens = tokens[: np.flatnonzero(np.append(tokens, END_OF_SEQUENCE) == END_OF_SEQUENCE)[0]]
    note_on, note_off = vocabulary.note_on, vocabulary.note_off
    time_shift, velocities = vocabulary.time_shift, vocabulary.velocity
    sounding = collections.defaultdict(collections.deque)
    spans = []
    step, velocity = 0, DEFAULT_VELOCITY
    for token in tokens.tolist():
        if token in note_on:
            sounding[token - note_on.start].append((step, velocity))
        elif token in note_off:
            started = sounding[token - note_off.start]
            if started:
                spans.append((*started.popleft(), step, token - note_off.start))
        elif token in time_shift:
            step += token - time_shift.start + 1
        elif token in velocities:
            velocity = 1 + (token - velocities.start) * vocabulary.velocity_bin_size
    spans += [(*start, step, key) for key, started in sounding.items() for start in started]
    return tuple(
        Note(start / STEPS_PER_SECOND, end / STEPS_PER_SECOND, key + vocabulary.min_pitch, velocity, 0)
        for start, velocity, end, key in sorted(spans, key=lambda span: (span[0], span[3]))
        if end > start
    )


def pitch_range(tokens: np.ndarray, vocabulary: EventVocabulary) -> tuple[int, int] | None:
    """The lowest and the highest pitch that occur in event ids, None where none does: how far one may transpose.

    Raises:
        ValueError: An id outside the vocabulary (has it and its place).
    """
    _check_tokens(tokens, vocabulary)
    keys = tokens[_is_note(tokens, vocabulary)] - vocabulary.note_on.start
    pitches = keys % len(vocabulary.note_on) + vocabulary.min_pitch
    return (int(pitches.min()), int(pitches.max())) if len(pitches) else None


def transpose_events(tokens: np.ndarray, semitones: int, vocabulary: EventVocabulary) -> np.ndarray:
    """Event ids (N,) transposed: exactly the code of the transposed notes, for their order does not change.

    Raises:
        ValueError: A pitch would leave the vocabulary, or an id is outside of it (has it).
    """
    pitches = pitch_range(tokens, vocabulary)
    if pitches and not vocabulary.min_pitch <= pitches[0] + semitones <= pitches[1] + semitones <= vocabulary.max_pitch:
        raise ValueError(
            f"Pitches {pitches[0]}..{pitches[1]} moved by {semitones} semitones leave the vocabulary's "
            f"{vocabulary.min_pitch}..{vocabulary.max_pitch}."
        )
    return np.where(_is_note(tokens, vocabulary), tokens + semitones, tokens).astype(tokens.dtype)


def _is_note(tokens: np.ndarray, vocabulary: EventVocabulary) -> np.ndarray:
    return (tokens >= vocabulary.note_on.start) & (tokens < vocabulary.note_off.stop)


def _check_tokens(tokens: np.ndarray, vocabulary: EventVocabulary) -> None:
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocabulary.size))
    if len(outside):
        raise ValueError(
            f"Id {tokens[outside[0]]} at position {outside[0]} is outside of the vocabulary, 0..{vocabulary.size - 1}."
        )
