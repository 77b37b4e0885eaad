"""Training and evaluation batches of segments of performances with their melodies (Music Transformer, section 4.2.2).

A batch is a dict of arrays:

    melody   (B, S) int32   ids of `data.melody`, ten a second; 0 where the row is padded
    inputs   (B, T) int32   the targets shifted right by one, behind the start token 0
    targets  (B, T) int32   events, melody and accompaniment, and the end; 0 where the row is padded
    mask     (B, T) bool    True where the target counts in the loss

A segment has the notes that begin in it; those that sound at its end are cut there. As events have steps of 10 ms, so
have segments, and notes of one step are ordered by pitch.
"""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Iterator

import grain
import numpy as np

from jaxaudio.data.event_batches import check_rows, check_transpose, draw_semitones, random_batches
from jaxaudio.data.event_dataset import EventDataset, EventDatasetError
from jaxaudio.data.events import (
    END_OF_SEQUENCE,
    STEPS_PER_SECOND,
    EventVocabulary,
    NoteArray,
    decode_events,
    encode_events,
    notes_to_array,
    transpose_events,
)
from jaxaudio.data.files import atomic_path
from jaxaudio.data.melody import MELODY, VELOCITY, encode_melody, infer_melody
from jaxaudio.data.pipelines import Batch, token_window

_FOLDER = "melodies_1"  # another number when the same performance gives another melody


@dataclasses.dataclass(frozen=True)
class SegmentConfig:
    """What a row is.

    Attributes:
      min_s, max_s: seconds of training segments, drawn uniformly.
      evaluation_s: seconds of evaluation segments.
      length: events of a row, its end included; a segment that has more is shortened, a tenth at a time, until it fits.
      has_melody: False puts one step in which nothing happens in place of every melody.

    Raises:
      ValueError: lengths that are no lengths; with them.
    """

    min_s: float = 5.0
    max_s: float = 30.0
    evaluation_s: float = 15.0
    length: int = 2048
    has_melody: bool = True

    def __post_init__(self):
        if not 0.01 <= self.min_s <= self.max_s or self.evaluation_s < 0.01 or self.length < 1:
            raise ValueError(
                f"min_s={self.min_s}, max_s={self.max_s}, evaluation_s={self.evaluation_s}, length={self.length}; "
                "expected seconds of at least 0.01, min_s <= max_s, and a length of at least 1"
            )

    @property
    def melody_length(self) -> int:
        """Steps of a row; rounding may add one to the seconds."""
        return math.ceil(max(self.max_s, self.evaluation_s) * MELODY.steps_per_second) + 1


class MelodyDataset:
    """The performances of a folder of `write_event_dataset` and their melodies.

    A melody is inferred from the performance as played, the first time that the folder is opened, and kept there.

    Attributes:
      events: the performances.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.events = EventDataset(folder)
        self._folder = pathlib.Path(folder) / _FOLDER
        for split, pieces in self.events.pieces.items():
            for index, piece in enumerate(pieces):
                path = self._path(piece.index)
                if not path.is_file():
                    tokens = np.asarray(self.events.tokens(split, index))
                    melody = infer_melody(notes_to_array(decode_events(tokens, self.events.vocabulary)))
                    with atomic_path(path) as temporary:
                        np.save(temporary, np.stack([melody.start_s, melody.end_s, melody.pitch]))

    def _path(self, index: int) -> pathlib.Path:
        return self._folder / f"{index:05d}.npy"

    def melody(self, split: str, piece: int) -> NoteArray:
        """The melody of the performance at this place in its split."""
        start_s, end_s, pitch = np.load(self._path(self.events.pieces[split][piece].index))
        return NoteArray(start_s, end_s, pitch.astype(np.int32), np.full(len(pitch), VELOCITY, np.int32))

    def num_steps(self, split: str, piece: int, stretch: float = 1.0) -> int:
        """How long a performance is, in steps of 10 ms."""
        return int(_shifts(self.events.tokens(split, piece, stretch), self.events.vocabulary).sum())

    def segment(
        self,
        split: str,
        piece: int,
        start: int,
        stop: int,
        config: SegmentConfig,
        *,
        stretch: float = 1.0,
        semitones: int = 0,
    ) -> tuple[Batch, int]:
        """One row, and the step at which it ends: `stop`, or before it where the row cannot hold more.

        Args:
          split, piece: of the performance.
          start, stop: of the segment, in steps of 10 ms of the stretched performance.
          config: of the row.
          stretch: factor of all times.
          semitones: how far all notes are moved.
        Raises:
          EventDatasetError: the notes of a single step do not fit; names the performance.
        """
        vocabulary, tokens = self.events.vocabulary, self.events.tokens(split, piece, stretch)
        while True:
            events = encode_events(cut_notes(tokens, start, stop, vocabulary), vocabulary)
            if len(events) < config.length:
                break
            if stop - start == 1:
                name = self.events.pieces[split][piece].name
                raise EventDatasetError(
                    f"{name}: step {start} has {len(events)} events, more than length {config.length}"
                )
            stop = start + max(1, (stop - start) * 9 // 10)
        events = transpose_events(events, semitones, vocabulary)
        row = token_window(np.append(events, END_OF_SEQUENCE), config.length)
        ids = np.array([MELODY.NO_EVENT])
        if config.has_melody:
            start_s, stop_s = start / STEPS_PER_SECOND, stop / STEPS_PER_SECOND
            ids = encode_melody(_part(self.melody(split, piece), start_s, stop_s, stretch, semitones), stop_s - start_s)
        melody = np.zeros(config.melody_length, np.int32)
        melody[: len(ids)] = ids
        return {"melody": melody, **row}, stop


def cut_notes(tokens: np.ndarray, start: int, stop: int, vocabulary: EventVocabulary) -> NoteArray:
    """The notes of events (N,) that begin from step `start` to before `stop`, and are cut there; times from `start`."""
    steps = np.cumsum(_shifts(tokens, vocabulary))
    first, last = np.searchsorted(steps, [start, stop])
    if first == last:
        return notes_to_array(())
    velocities = tokens[:first][(tokens[:first] >= vocabulary.velocity.start)]
    # A shift that reaches into the segment counts from its start.
    inside = tokens[first + (tokens[first] in vocabulary.time_shift) : last]
    lead, rest = (_as_shifts(int(gap), vocabulary) for gap in (steps[first] - start, stop - steps[last - 1]))
    return notes_to_array(decode_events(np.concatenate([velocities[-1:], lead, inside, rest]), vocabulary))


def segment_batches(
    dataset: MelodyDataset,
    config: SegmentConfig,
    *,
    batch_size: int,
    seed: int,
    transpose: tuple[int, int] = (-3, 3),
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Training batches: shuffled, sharded by process, segments, stretches and transpositions drawn, prefetched.

    Once an epoch every performance gives one segment, which begins anywhere; otherwise as `event_batches`.

    Args:
      dataset: of performances and melodies.
      config: of the rows.
      batch_size, seed, transpose, process_index, process_count: as `event_batches`.
    Raises:
      EventDatasetError: as `event_batches`.
    """
    check_rows(dataset.events, "train", config.length, batch_size, process_index, process_count)
    check_transpose(transpose)
    indices = range(len(dataset.events.pieces["train"]))
    if len(indices) < process_count:
        raise EventDatasetError(f"{len(indices)} performances of train cannot be shared by {process_count} processes")
    draw = _RandomSegment(dataset, config, transpose)
    return random_batches(indices, draw, batch_size, seed, process_index, process_count)


def evaluation_segment_batches(
    dataset: MelodyDataset,
    split: str,
    config: SegmentConfig,
    *,
    batch_size: int,
    max_segments: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Evaluation batches: consecutive segments of all performances, as played.

    A segment that a row cannot hold goes on in the next row. Every process yields the same number of batches; rows that
    are left over are padding with mask False.

    Args:
      dataset, split, config, batch_size: as `segment_batches`.
      max_segments: takes every n-th segment alone, with the least n that leaves no more than these.
      process_index, process_count: which rows of each global batch of process_count * batch_size rows to yield.
    Raises:
      EventDatasetError: as `event_batches`.
    """
    check_rows(dataset.events, split, config.length, batch_size, process_index, process_count)
    if max_segments is not None and max_segments < 1:
        raise EventDatasetError(f"max_segments is {max_segments}; expected None or 1 or more")
    return _evaluation_batches(dataset, split, config, batch_size, max_segments, process_index, process_count)


class _RandomSegment(grain.transforms.RandomMap):
    """A segment by the random generator that Grain keys to each record."""

    def __init__(self, dataset: MelodyDataset, config: SegmentConfig, transpose: tuple[int, int]):
        self.dataset, self.config, self.transpose = dataset, config, transpose

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        factors = self.dataset.events.stretches("train")
        stretch = factors[int(rng.integers(len(factors)))]
        num_steps = self.dataset.num_steps("train", element, stretch)
        length = round(rng.uniform(self.config.min_s, self.config.max_s) * STEPS_PER_SECOND)
        start = int(rng.integers(max(0, num_steps - length) + 1))
        semitones = draw_semitones(rng, self.dataset.events, "train", element, self.transpose)
        stop = min(start + length, num_steps)
        return self.dataset.segment("train", element, start, stop, self.config, stretch=stretch, semitones=semitones)[0]


def _evaluation_batches(dataset, split, config, batch_size, max_segments, index, count) -> Iterator[Batch]:
    length = round(config.evaluation_s * STEPS_PER_SECOND)
    segments = []
    for piece in range(len(dataset.events.pieces[split])):
        num_steps = dataset.num_steps(split, piece)
        segments += [(piece, start, min(start + length, num_steps)) for start in range(0, num_steps, length)]
    if max_segments is not None:
        segments = segments[:: -(-len(segments) // max_segments)]
    rows_left = _rows(dataset, split, config, segments)
    while rows := list(itertools.islice(rows_left, batch_size * count)):
        nothing = {name: np.zeros_like(array) for name, array in rows[0].items()}
        nothing["melody"][0] = MELODY.NO_EVENT  # attention has to have something to attend to
        padded = [*rows, *[nothing] * (batch_size * count - len(rows))]
        own = padded[index * batch_size : (index + 1) * batch_size]
        yield {name: np.stack([row[name] for row in own]) for name in own[0]}


def _rows(dataset, split, config, segments) -> Iterator[Batch]:
    for piece, start, stop in segments:
        while start < stop:
            row, start = dataset.segment(split, piece, start, stop, config)
            yield row


def _part(melody: NoteArray, start_s: float, stop_s: float, stretch: float, semitones: int) -> NoteArray:
    """The notes of a melody that begin in a segment of the stretched performance, cut at its end."""
    melody = dataclasses.replace(melody, start_s=melody.start_s * stretch, end_s=melody.end_s * stretch)
    melody = melody[(melody.start_s >= start_s) & (melody.start_s < stop_s)]
    return NoteArray(
        melody.start_s - start_s, np.minimum(melody.end_s, stop_s) - start_s, melody.pitch + semitones, melody.velocity
    )


def _shifts(tokens: np.ndarray, vocabulary: EventVocabulary) -> np.ndarray:
    """Steps that each event (N,) lets pass."""
    shift = vocabulary.time_shift
    return np.where((tokens >= shift.start) & (tokens < shift.stop), tokens.astype(np.int64) - shift.start + 1, 0)


def _as_shifts(steps: int, vocabulary: EventVocabulary) -> np.ndarray:
    """Events that let so many steps pass."""
    full, rest = divmod(steps, vocabulary.max_shift_steps)
    ids = [vocabulary.time_shift[-1]] * full + ([vocabulary.time_shift[rest - 1]] if rest else [])
    return np.array(ids, np.int64)
