"""The melody of a performance: inferred from its notes, and as tokens on a grid of 100 ms.

Music Transformer (Huang et al. 2018, section 4.2.2) accompanies such melodies. The inference and the tokens are those
of the code behind it: `melody_inference` of note-seq, and `TextMelodyEncoderAbsolute` of Magenta's score2perf.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from jaxaudio.data.events import NoteArray

VELOCITY = 127  # of melody notes
_REST_PROB = 0.1
_INTERVAL_SCALE = 2.0  # semitones
_NOT_HIGHEST_PROB = 1e-15  # in one second, as the next
_MISSING_PROB = 1e-15
_NUM_PITCHES = 128


@dataclasses.dataclass(frozen=True)
class MelodyVocabulary:
    """Ids of melody tokens, one for each step: 0 padding, 1 the end, 2 nothing happens, 3 the note ends, and above them
    the note that begins, the lowest pitch first.

    Raises:
      ValueError: pitches that are no range within 0..127, or less than one step a second; with them.
    """

    min_pitch: int = 21
    max_pitch: int = 108
    steps_per_second: int = 10

    NO_EVENT: ClassVar[int] = 2
    NOTE_OFF: ClassVar[int] = 3

    def __post_init__(self):
        if not 0 <= self.min_pitch <= self.max_pitch <= 127:
            raise ValueError(f"pitches {self.min_pitch}..{self.max_pitch} must be a range within 0..127")
        if self.steps_per_second < 1:
            raise ValueError(f"steps_per_second must be at least 1, got {self.steps_per_second}")

    @property
    def note_on(self) -> range:
        """Ids of the pitches."""
        return range(4, 4 + self.max_pitch - self.min_pitch + 1)

    @property
    def size(self) -> int:
        """Number of ids; 92 by default."""
        return self.note_on.stop


MELODY = MelodyVocabulary()


def infer_melody(notes: NoteArray, *, duration_s: float | None = None) -> NoteArray:
    """The one voice that most probably is the melody: notes of velocity 127, no two at once.

    The piece is cut into frames at every onset and release. In each the melody rests, strikes a pitch that is struck in
    the frame, or sustains its pitch while that is not struck::

        after a rest       a rest 1, any of 128 pitches 1/128 each
        after a pitch      its sustaining 1, a rest 0.1, a pitch d semitones away 0.9 / (1 + (d/2)^2), normalised
        a frame of d s     (1e-15 if a higher note sounds)^d (1e-15 if the sustained pitch does not sound)^d,
                           0 for a rest while any note sounds

    The most probable sequence is found by a Viterbi search. A pitch can only go on into a frame from itself, so a
    search takes time in proportion to frames times pitches; note-seq, whose answer it gives, compares all pairs of
    states and refuses pieces of more than 10 000 frames, which this one does not.

    Args:
      notes: the performance, sustain pedal applied; drums left out.
      duration_s: its length, at which the last melody note may end; the end of the last note if None.
    Raises:
      ValueError: `duration_s` is before the end of the last note; with both.
    """
    if not len(notes):
        return notes
    last_s = float(np.max(notes.end_s))
    duration_s = last_s if duration_s is None else duration_s
    if duration_s < last_s:
        raise ValueError(f"duration_s={duration_s} is before the end of the last note, {last_s} s")
    pitches = np.unique(notes.pitch)
    starts_s, struck, sounding = _frames(notes, pitches, duration_s)
    lengths_s = np.diff(starts_s, append=duration_s)
    path = _most_probable(struck, sounding, lengths_s, _log_intervals(pitches))
    # A melody note begins in a frame of an onset and ends at the next onset or rest.
    (begins,) = np.nonzero((path > 0) & (path <= len(pitches)))
    (cuts,) = np.nonzero(path <= len(pitches))
    ends = np.append(cuts, len(path))[np.searchsorted(cuts, begins, side="right")]
    bounds_s = np.append(starts_s, duration_s)
    return _melody_notes(bounds_s[begins], bounds_s[ends], pitches[path[begins] - 1])


def encode_melody(notes: NoteArray, duration_s: float, vocabulary: MelodyVocabulary = MELODY) -> np.ndarray:
    """One id for each step of 100 ms: what begins or ends in it.

    Times are rounded to the nearest step, a note that would vanish lasts one. A beginning overwrites what stands in its
    step, and an end at the last step is left out. As in Magenta's code, a note overwritten in its only step still ends,
    and with it the one that took its place: one to three in a hundred notes of real performances.

    Args:
      notes: a melody, no two at once, see `infer_melody`.
      duration_s: of the performance.
      vocabulary: the ids.
    Returns:
      (S,) int32; as many steps as `duration_s` or the last note has.
    Raises:
      ValueError: two notes at once, with the time, or a pitch outside the vocabulary, with the pitch.
    """
    (overlaps,) = np.nonzero(notes.start_s[1:] < notes.end_s[:-1])
    if len(overlaps):
        raise ValueError(
            f"a melody has one note at a time, got two at {notes.start_s[overlaps[0] + 1]:.3f} s; "
            "infer_melody finds the melody of several voices"
        )
    low, high = vocabulary.min_pitch, vocabulary.max_pitch
    for pitch in notes.pitch[(notes.pitch < low) | (notes.pitch > high)][:1]:
        raise ValueError(f"pitch {pitch} is outside the vocabulary's {low}..{high}; leave it out or transpose")
    start, end = (_to_steps(seconds, vocabulary) for seconds in (notes.start_s, notes.end_s))
    end = np.maximum(end, start + 1)
    num_steps = max([_to_steps(duration_s, vocabulary), *end[-1:]])
    tokens = np.full(num_steps, vocabulary.NO_EVENT, np.int32)
    for first, last, pitch in zip(start, end, notes.pitch, strict=True):
        tokens[first] = vocabulary.note_on[pitch - low]
        tokens[last : last + 1] = vocabulary.NOTE_OFF
    return tokens


def decode_melody(tokens: np.ndarray, vocabulary: MelodyVocabulary = MELODY) -> NoteArray:
    """The notes of melody tokens, of velocity 127.

    A note lasts until the next begins, the next NOTE_OFF or the last step; the melody ends before the first padding or
    end id.

    Raises:
      ValueError: an id outside the vocabulary; with it.
    """
    tokens = np.asarray(tokens)
    for token in tokens[(tokens < 0) | (tokens >= vocabulary.size)][:1]:
        raise ValueError(f"melody id {token} is not in 0..{vocabulary.size - 1}")
    (stops,) = np.nonzero(tokens < vocabulary.NO_EVENT)
    tokens = tokens[: stops[0]] if len(stops) else tokens
    (start,) = np.nonzero(tokens >= vocabulary.note_on.start)
    (cuts,) = np.nonzero(tokens != vocabulary.NO_EVENT)
    end = np.append(cuts, len(tokens))[np.searchsorted(cuts, start, side="right")]
    pitch = tokens[start] - vocabulary.note_on.start + vocabulary.min_pitch
    return _melody_notes(start / vocabulary.steps_per_second, end / vocabulary.steps_per_second, pitch)


def _to_steps(seconds: np.ndarray | float, vocabulary: MelodyVocabulary) -> np.ndarray | np.int64:
    return np.floor(seconds * vocabulary.steps_per_second + 0.5).astype(np.int64)


def _melody_notes(start_s: np.ndarray, end_s: np.ndarray, pitch: np.ndarray) -> NoteArray:
    return NoteArray(start_s, end_s, pitch.astype(np.int32), np.full(len(pitch), VELOCITY, np.int32))


def _frames(notes: NoteArray, pitches: np.ndarray, duration_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start of each of F frames in seconds, and which of P pitches are struck (F, P) and sound (F, P) in it."""
    cuts = np.unique(np.concatenate([notes.start_s, notes.end_s]))
    cuts = cuts[(cuts > 0) & (cuts < duration_s)]
    first = np.searchsorted(cuts, notes.start_s, side="right")
    last = np.searchsorted(cuts, notes.end_s, side="left")
    column = np.searchsorted(pitches, notes.pitch)
    struck = np.zeros((len(cuts) + 1, len(pitches)), bool)
    struck[first, column] = True
    change = np.zeros((len(cuts) + 2, len(pitches)), np.int16)
    np.add.at(change, (first, column), 1)
    np.add.at(change, (last + 1, column), -1)
    sounding = np.cumsum(change[:-1], axis=0, dtype=np.int16) > 0
    return np.concatenate([[0.0], cuts]), struck, sounding


def _log_intervals(pitches: np.ndarray) -> np.ndarray:
    """Log-probability of each pitch (column) to follow each other pitch (row), of all 128 of which P are present."""
    every = np.arange(_NUM_PITCHES)
    weights = 1 / (1 + ((every[None] - every[:, None]) / _INTERVAL_SCALE) ** 2)
    probs = weights / weights.sum(axis=1, keepdims=True) * (1 - _REST_PROB)
    return np.log(probs[np.ix_(pitches, pitches)])


def _most_probable(struck, sounding, lengths_s, log_intervals) -> np.ndarray:
    """The state of each frame: 0 is rest, 1 to P the onset of a pitch, P + 1 to 2P its sustaining."""
    num_frames, num_pitches = struck.shape
    onsets, sustains = slice(1, num_pitches + 1), slice(num_pitches + 1, None)
    own = np.arange(1, num_pitches + 1)
    frame_scores = _frame_scores(struck, sounding, lengths_s)
    silent = ~sounding.any(axis=1)
    to_rest = np.append(0.0, np.full(2 * num_pitches, np.log(_REST_PROB)))
    to_onset = np.concatenate([np.full((1, num_pitches), np.log(1 / _NUM_PITCHES)), log_intervals, log_intervals])
    scores = np.append(0.0, np.full(2 * num_pitches, -np.inf))  # a rest goes before the first frame
    parents = np.zeros((num_frames, 1 + 2 * num_pitches), np.int16)
    for frame in range(num_frames):
        parent, previous = parents[frame], scores
        scores = np.full_like(previous, -np.inf)
        if silent[frame]:
            ways = previous + to_rest
            parent[0] = np.argmax(ways)
            scores[0] = ways[parent[0]]
        (hit,) = np.nonzero(struck[frame])
        if len(hit):
            ways = previous[:, None] + to_onset[:, hit]
            parent[1 + hit] = np.argmax(ways, axis=0)
            scores[1 + hit] = np.max(ways, axis=0) + frame_scores[frame, hit]
        held = np.maximum(previous[onsets], previous[sustains]) + frame_scores[frame]
        scores[sustains] = np.where(struck[frame], -np.inf, held)
        parent[sustains] = own + num_pitches * (previous[sustains] > previous[onsets])
    path = np.empty(num_frames, np.int64)
    state = np.argmax(scores)
    for frame in reversed(range(num_frames)):
        path[frame] = state
        state = parents[frame, state]
    return path


def _frame_scores(struck: np.ndarray, sounding: np.ndarray, lengths_s: np.ndarray) -> np.ndarray:
    """Log-likelihood of each frame (F, P) if the melody is on a pitch: its onset where struck, else its sustaining."""
    at_or_above = np.cumsum(sounding[:, ::-1], axis=1, dtype=np.int16)[:, ::-1]
    highest = np.where(at_or_above > sounding, _NOT_HIGHEST_PROB, 1 - _NOT_HIGHEST_PROB)
    present = np.where(struck, 1.0, np.where(sounding, 1 - _MISSING_PROB, _MISSING_PROB))
    return lengths_s[:, None] * np.log(highest * present)
