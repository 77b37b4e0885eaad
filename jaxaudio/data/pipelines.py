"""Grain pipelines from token sequences to training and evaluation batches.

A batch is a dict of arrays with rows of `length` tokens:

    inputs   (B, T) int32   the targets shifted right by one, behind the start token 0
    targets  (B, T) int32   tokens; 0 where the row is padded
    mask     (B, T) bool    True where the target counts in the loss

Every window starts with the start token and no left context, also inside a piece. Windows start on beats (multiples of
16 tokens), so position i of a row always has the same voice, i mod 4, and the same place in its beat, i mod 16.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxaudio.data.chorales import HIGHEST_PITCH_TOKEN, LOWEST_PITCH_TOKEN, PAD_TOKEN, TOKENS_PER_BEAT

Batch = dict[str, np.ndarray]


def chorale_batches(
    sequences: Sequence[np.ndarray],
    *,
    length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    transpose: tuple[int, int] | None = None,
    num_epochs: int | None = None,
) -> grain.DatasetIterator:
    """Training batches: shuffled, sharded by process, cropped and transposed at random, prefetched.

    Once an epoch every sequence gives one window: a crop of `length` tokens that starts on a beat drawn uniformly, or
    the whole sequence padded when it is shorter. The order is drawn anew every epoch. `seed` decides all of it.

    The iterator is an Orbax checkpointable (also `get_state`, `set_state`); a state needs the same arguments again.

    Args:
        sequences: Chorale tokens, one int array (N,) per piece, as `chorales.encode_grid` gives.
        length: Tokens per row, a multiple of 16.
        batch_size: Rows per batch of this process.
        seed: Of order, crops and transpositions.
        process_index: Which of `process_count` disjoint shards to read; each has every `process_count`-th sequence.
        process_count: Number of processes that share an epoch.
        transpose: Lowest and highest shift in semitones, or None. Shifts that would take any note of the piece outside
            MIDI 36..81 are not drawn; rests stay.
        num_epochs: None repeats for ever. Otherwise rows that fill no batch at the very end are left out.

    Raises:
        ValueError: `length`, the sequences, the shard or `transpose` cannot be used, with the value.
    """
    _check(sequences, length, batch_size, process_index, process_count)
    if transpose is not None and not transpose[0] <= 0 <= transpose[1]:
        raise ValueError(f"transpose={transpose} must be (low, high) with low <= 0 <= high, in semitones.")
    if len(sequences) < process_count:
        raise ValueError(f"{len(sequences)} sequences cannot be shared by {process_count} processes.")
    source = [np.asarray(tokens, np.int32) for tokens in sequences]
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()[process_index::process_count].repeat(num_epochs)
    dataset = dataset.random_map(_RandomWindow(length, transpose))
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4 * batch_size)
    return iter(dataset.to_iter_dataset(read).batch(batch_size, drop_remainder=True))


def evaluation_batches(
    sequences: Sequence[np.ndarray],
    *,
    length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Evaluation batches: consecutive windows in order, in which every token is a target exactly once.

    Every process yields the same number of batches of `batch_size` rows; rows that are left over are padding with mask
    False.

    Args:
        sequences: Chorale tokens, one int array (N,) per piece.
        length: Tokens per row, a multiple of 16. The rest of a piece is padded.
        batch_size: Rows per batch of this process.
        process_index: Which rows of each global batch of `process_count * batch_size` rows to yield.
        process_count: Number of processes that evaluate together.

    Raises:
        ValueError: `length`, the sequences or the shard cannot be used, with the value.
    """
    _check(sequences, length, batch_size, process_index, process_count)
    return _evaluation_batches(sequences, length, batch_size, process_index, process_count)


def token_window(tokens: np.ndarray, length: int) -> Batch:
    """One row: at most `length` tokens (N,) padded to `length`, with inputs shifted right and the mask."""
    if len(tokens) > length:
        raise ValueError(f"A window of {length} tokens cannot hold {len(tokens)}.")
    targets = np.full(length, PAD_TOKEN, np.int32)
    targets[: len(tokens)] = tokens
    inputs = np.full(length, PAD_TOKEN, np.int32)
    inputs[1:] = targets[:-1]
    return {"inputs": inputs, "targets": targets, "mask": np.arange(length) < len(tokens)}


def transpose_tokens(tokens: np.ndarray, semitones: int) -> np.ndarray:
    """Chorale tokens moved by `semitones`; rests stay.

    Raises:
        ValueError: A pitch would leave MIDI 36..81; has the shift and the shifts that are possible.
    """
    low, high = _shift_range(tokens, (-HIGHEST_PITCH_TOKEN, HIGHEST_PITCH_TOKEN))
    if not low <= semitones <= high:
        raise ValueError(f"A shift of {semitones} semitones leaves MIDI 36..81; this sequence allows {low}..{high}.")
    return np.where(tokens >= LOWEST_PITCH_TOKEN, tokens + semitones, tokens).astype(np.int32)


class _RandomWindow(grain.transforms.RandomMap):
    """A random crop on the beat and a random transposition, by the random generator Grain keys to each record."""

    def __init__(self, length: int, transpose: tuple[int, int] | None):
        self.length = length
        self.transpose = transpose

    def random_map(self, element: np.ndarray, rng: np.random.Generator) -> Batch:
        beats_to_skip = max(0, -(-(len(element) - self.length) // TOKENS_PER_BEAT))
        start = TOKENS_PER_BEAT * int(rng.integers(beats_to_skip + 1))
        tokens = element[start : start + self.length]
        if self.transpose is not None:
            # The shift is limited by the whole piece, so that all its crops are heard in the same keys.
            tokens = transpose_tokens(tokens, int(rng.integers(*_shift_range(element, self.transpose), endpoint=True)))
        return token_window(tokens, self.length)


def _shift_range(tokens: np.ndarray, transpose: tuple[int, int]) -> tuple[int, int]:
    pitches = tokens[tokens >= LOWEST_PITCH_TOKEN]
    if not len(pitches):
        return 0, 0
    low = max(transpose[0], LOWEST_PITCH_TOKEN - int(pitches.min()))
    return low, min(transpose[1], HIGHEST_PITCH_TOKEN - int(pitches.max()))


def _evaluation_batches(sequences, length, batch_size, process_index, process_count) -> Iterator[Batch]:
    windows = [tokens[start : start + length] for tokens in sequences for start in range(0, len(tokens), length)]
    rows = batch_size * process_count
    windows += [np.zeros(0, np.int32)] * (-len(windows) % rows)
    for first in range(process_index * batch_size, len(windows), rows):
        batch = [token_window(tokens, length) for tokens in windows[first : first + batch_size]]
        yield {name: np.stack([row[name] for row in batch]) for name in batch[0]}


def _check(sequences, length: int, batch_size: int, process_index: int, process_count: int) -> None:
    if length <= 0 or length % TOKENS_PER_BEAT:
        raise ValueError(f"length={length} must be a positive multiple of {TOKENS_PER_BEAT} tokens (one beat).")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must lie in 0..{process_count - 1}.")
    if not len(sequences):
        raise ValueError("There are no sequences; check the split or the folder they were read from.")
    for index, tokens in enumerate(sequences):
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or not len(tokens) or tokens.min() < 1 or tokens.max() > HIGHEST_PITCH_TOKEN:
            ids = f", ids {tokens.min()}..{tokens.max()}" if tokens.size else ""
            raise ValueError(
                f"Sequence {index} must be a non-empty row of ids 1..{HIGHEST_PITCH_TOKEN} (use chorales.encode_grid); "
                f"got shape {tokens.shape}{ids}."
            )
