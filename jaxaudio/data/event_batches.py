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
    _check(dataset, split, length, batch_size, process_index, process_count)
    if not transpose[0] <= 0 <= transpose[1]:
        raise EventDatasetError(f"transpose is {transpose}; expected (low, high) with low <= 0 <= high, in semitones")
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
    # Crops are drawn before the shares are dealt, so that a crop does not depend on the number of shares.
    shuffled = grain.MapDataset.source(kept).seed(seed).shuffle()
    crops = shuffled.random_map(_RandomCrop(dataset, split, length, transpose, factors))
    share = crops[process_index::process_count].repeat(num_epochs)
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4 * batch_size)
    return iter(share.to_iter_dataset(read).batch(batch_size, drop_remainder=True))


def evaluation_event_batches(
    dataset: EventDataset,
    split: str = "valid",
    *,
    length: int = 2048,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Evaluation batches: consecutive crops in order, in which every token is a target exactly once, as played.

    A crop has no left context; the last of a performance is padded. Every process yields the same number of batches of
    `batch_size` rows; rows that are left over are padding with mask False.

    Args:
      dataset, split, length, batch_size: as `event_batches`.
      process_index, process_count: which rows of each global batch of process_count * batch_size rows to yield.
    Raises:
      EventDatasetError: as `event_batches`.
    """
    _check(dataset, split, length, batch_size, process_index, process_count)
    return _evaluation_batches(dataset, split, length, batch_size, process_index, process_count)


class _RandomCrop(grain.transforms.RandomMap):
    """A crop by the random generator that Grain keys to each record."""

    def __init__(
        self, dataset: EventDataset, split: str, length: int, transpose: tuple[int, int], stretches: tuple[float, ...]
    ):
        self.dataset, self.split, self.length = dataset, split, length
        self.transpose, self.stretches = transpose, stretches

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        vocabulary, piece = self.dataset.vocabulary, self.dataset.pieces[self.split][element]
        tokens = self.dataset.tokens(self.split, element, self.stretches[int(rng.integers(len(self.stretches)))])
        start = int(rng.integers(max(0, len(tokens) - self.length) + 1))
        low = max(self.transpose[0], vocabulary.min_pitch - piece.lowest_pitch)
        high = min(self.transpose[1], vocabulary.max_pitch - piece.highest_pitch)
        crop = np.asarray(tokens[start : start + self.length], np.int32)
        crop = transpose_events(crop, int(rng.integers(low, high, endpoint=True)), vocabulary)
        return token_window(crop, self.length)


def _evaluation_batches(dataset, split, length, batch_size, process_index, process_count) -> Iterator[Batch]:
    which = dataset.stretches(split).index(1.0)
    crops = [
        (index, start)
        for index, piece in enumerate(dataset.pieces[split])
        for start in range(0, piece.num_tokens[which], length)
    ]
    rows = batch_size * process_count
    crops += [(0, dataset.pieces[split][0].num_tokens[which])] * (-len(crops) % rows)  # of no tokens
    for first in range(process_index * batch_size, len(crops), rows):
        batch = [
            token_window(dataset.tokens(split, index)[start : start + length], length)
            for index, start in crops[first : first + batch_size]
        ]
        yield {name: np.stack([row[name] for row in batch]) for name in batch[0]}


def _check(dataset: EventDataset, split: str, length: int, batch_size: int, index: int, count: int) -> None:
    dataset.stretches(split)
    if not dataset.pieces[split]:
        raise EventDatasetError(f"{split} has no performances; {dataset.report()}")
    if length < 1 or batch_size < 1:
        raise EventDatasetError(f"length is {length} and batch_size {batch_size}; expected 1 or more of each")
    if not 0 <= index < count:
        raise EventDatasetError(f"process_index is {index} of process_count {count}; expected 0 to count - 1")
    if dataset.vocabulary.num_reserved < 1:
        raise EventDatasetError(f"{dataset.vocabulary} has no id for start and padding; expected num_reserved=2")
