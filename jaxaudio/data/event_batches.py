"""Training and evaluation batches of performances as event tokens, by a Grain pipeline.

A batch is a dict of arrays, with the keys of `pipelines`:

    inputs   (B, T) int32   the targets shifted right by one, behind the start token 0
    targets  (B, T) int32   tokens; 0 where the row is padded
    mask     (B, T) bool    True where the target counts in the loss
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxaudio.data.event_dataset import EventDataset, EventDatasetError
from jaxaudio.data.events import transpose_events
from jaxaudio.data.pipelines import Batch, token_window


def event_batches(
    dataset: EventDataset,
    split: str = "train",
    *,
    length: int = 2048,
    batch_size: int,
    seed: int,
    transpose: tuple[int, int] = (-3, 3),
    stretches: Sequence[float] | None = None,
    drop_short: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
) -> grain.DatasetIterator:
    """Training batches: shuffled, sharded by process, cropped, stretched and transposed at random, prefetched.

    Once an epoch every performance gives one crop of `length` tokens that starts anywhere. Its stretch is drawn
    uniformly, and so is its transposition, of those that keep all notes of the whole performance in the vocabulary:
    the paper's code (Huang et al. 2018, section 4.2; Magenta's score2perf) makes all 35 versions and discards the
    others, which leaves a performance the same distribution but makes one of wide range rarer. `seed` decides all of
    it, and how many processes share an epoch changes no crop.

    The iterator is an Orbax checkpointable (also `get_state`, `set_state`); a state needs the same arguments again.

    Args:
      dataset: of performances.
      split: to read.
      length: tokens of a row.
      batch_size: rows of this process.
      seed: of order, crops, stretches and transpositions.
      transpose: lowest and highest shift in semitones; (0, 0) for none.
      stretches: factors to draw from; None for all that the split is there in.
      drop_short: whether performances of fewer than `length` tokens, in the fastest of the stretches, are left out,
        as in the paper's code, or padded.
      process_index, process_count: which of how many shares of the performances to read.
      num_epochs: None repeats for ever; otherwise rows that fill no batch at the very end are left out.
    Raises:
      EventDatasetError: no such split, no such stretch, no performance of `length` tokens, fewer performances than
        processes, no token 0 for start and padding, or sizes that cannot be used; has the value.
    """
    check_rows(dataset, split, length, batch_size, process_index, process_count)
    check_transpose(transpose)
    there = dataset.stretches(split)
    factors = there if stretches is None else tuple(float(factor) for factor in stretches)
    if not factors or not set(factors) <= set(there):
        raise EventDatasetError(f"stretches are {factors}; {split} has {', '.join(map(str, there))}")
    pieces = dataset.pieces[split]
    columns = [there.index(factor) for factor in factors]
    shortest = [min(piece.num_tokens[column] for column in columns) for piece in pieces]
    kept = [index for index, tokens in enumerate(shortest) if tokens >= length or not drop_short]
    if len(kept) < process_count:
        raise EventDatasetError(
            f"{len(kept)} of {len(pieces)} performances of {split} (length {length}, drop_short {drop_short}) cannot "
            f"be shared by {process_count} processes"
        )
    crop = _RandomCrop(dataset, split, length, transpose, factors)
    return random_batches(kept, crop, batch_size, seed, process_index, process_count, num_epochs)


def random_batches(
    indices: Sequence[int],
    draw: grain.transforms.RandomMap,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    num_epochs: int | None = None,
) -> grain.DatasetIterator:
    """Batches of the rows that `draw` makes of performances: shuffled, then drawn, sharded by process, prefetched."""
    # Rows are drawn before the shares are dealt, so that a row does not depend on the number of shares.
    rows = grain.MapDataset.source(indices).seed(seed).shuffle().random_map(draw)
    share = rows[process_index::process_count].repeat(num_epochs)
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4 * batch_size)
    return iter(share.to_iter_dataset(read).batch(batch_size, drop_remainder=True))


def evaluation_event_batches(
    dataset: EventDataset,
    split: str = "valid",
    *,
    length: int = 2048,
    batch_size: int,
    max_rows: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Evaluation batches: consecutive crops in order, in which every token is a target exactly once, as played.

    A crop has no left context; the last of a performance is padded. Every process yields the same number of batches of
    `batch_size` rows; rows that are left over are padding with mask False.

    Args:
      dataset, split, length, batch_size: as `event_batches`.
      max_rows: takes every n-th crop alone, of all performances, with the least n that leaves no more than these.
      process_index, process_count: which rows of each global batch of process_count * batch_size rows to yield.
    Raises:
      EventDatasetError: as `event_batches`.
    """
    check_rows(dataset, split, length, batch_size, process_index, process_count)
    if max_rows is not None and max_rows < 1:
        raise EventDatasetError(f"max_rows is {max_rows}; expected None or 1 or more")
    return _evaluation_batches(dataset, split, length, batch_size, max_rows, process_index, process_count)


class _RandomCrop(grain.transforms.RandomMap):
    """A crop by the random generator that Grain keys to each record."""

    def __init__(
        self, dataset: EventDataset, split: str, length: int, transpose: tuple[int, int], stretches: tuple[float, ...]
    ):
        self.dataset, self.split, self.length = dataset, split, length
        self.transpose, self.stretches = transpose, stretches

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        tokens = self.dataset.tokens(self.split, element, self.stretches[int(rng.integers(len(self.stretches)))])
        start = int(rng.integers(max(0, len(tokens) - self.length) + 1))
        crop = np.asarray(tokens[start : start + self.length], np.int32)
        semitones = draw_semitones(rng, self.dataset, self.split, element, self.transpose)
        crop = transpose_events(crop, semitones, self.dataset.vocabulary)
        return token_window(crop, self.length)


def _evaluation_batches(dataset, split, length, batch_size, max_rows, process_index, process_count) -> Iterator[Batch]:
    which = dataset.stretches(split).index(1.0)
    crops = [
        (index, start)
        for index, piece in enumerate(dataset.pieces[split])
        for start in range(0, piece.num_tokens[which], length)
    ]
    if max_rows is not None:
        crops = crops[:: -(-len(crops) // max_rows)]
    rows = batch_size * process_count
    crops += [(0, dataset.pieces[split][0].num_tokens[which])] * (-len(crops) % rows)  # of no tokens
    for first in range(process_index * batch_size, len(crops), rows):
        batch = [
            token_window(dataset.tokens(split, index)[start : start + length], length)
            for index, start in crops[first : first + batch_size]
        ]
        yield {name: np.stack([row[name] for row in batch]) for name in batch[0]}


def draw_semitones(
    rng: np.random.Generator, dataset: EventDataset, split: str, index: int, transpose: tuple[int, int]
) -> int:
    """A transposition, uniformly of those that keep all notes of the performance in the vocabulary."""
    vocabulary, piece = dataset.vocabulary, dataset.pieces[split][index]
    low = max(transpose[0], vocabulary.min_pitch - piece.lowest_pitch)
    high = min(transpose[1], vocabulary.max_pitch - piece.highest_pitch)
    return int(rng.integers(low, high, endpoint=True))


def check_transpose(transpose: tuple[int, int]) -> None:
    """Checks a range of transpositions.

    Raises:
      EventDatasetError: it does not hold 0; has it.
    """
    if not transpose[0] <= 0 <= transpose[1]:
        raise EventDatasetError(f"transpose is {transpose}; expected (low, high) with low <= 0 <= high, in semitones")


def check_rows(dataset: EventDataset, split: str, length: int, batch_size: int, index: int, count: int) -> None:
    """Checks what all pipelines of performances are asked for.

    Raises:
      EventDatasetError: as `event_batches`.
    """
    dataset.stretches(split)
    if not dataset.pieces[split]:
        raise EventDatasetError(f"{split} has no performances; {dataset.report()}")
    if length < 1 or batch_size < 1:
        raise EventDatasetError(f"length is {length} and batch_size {batch_size}; expected 1 or more of each")
    if not 0 <= index < count:
        raise EventDatasetError(f"process_index is {index} of process_count {count}; expected 0 to count - 1")
    if dataset.vocabulary.num_reserved < 1:
        raise EventDatasetError(f"{dataset.vocabulary} has no id for start and padding; expected num_reserved=2")
