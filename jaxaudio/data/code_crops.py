"""Random crops of codes, for the training of language models that predict all codebooks of a frame at once.

A batch is a dict of arrays, C codes to a codebook:

    inputs      (B, Q, T) int32   1 + the code of the frame before; 0 at the start of a crop and behind its end
    targets     (B, Q, T) int32   the frame's codes; 0 behind the end
    mask        (B, Q, T) bool    True where the target counts: within the crop, and in the row's codebooks
    num_levels  (B,) int32        codebooks of the row: as if the codec had been asked for fewer
    offset      (B,) int32        position of the row's first frame
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxaudio.data.token_dataset import TokenClip, TokenDataset

Batch = dict[str, np.ndarray]


def code_batches(
    clips: TokenDataset | Sequence[TokenClip],
    *,
    num_frames: int,
    levels: Sequence[int],
    max_offset: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Training batches without end: shuffled, sharded by process, cropped at random, prefetched.

    Once an epoch every clip gives one crop, which starts anywhere; a shorter clip is followed by masked frames. `seed`
    decides all of it. The iterator is an Orbax checkpointable.

    Args:
      clips: what to crop.
      num_frames: T.
      levels: of these, each row's codebooks are drawn.
      max_offset: each row's offset is drawn from 0 to this.
      batch_size: rows of this process.
      seed: of order, crops, levels and offsets.
      process_index, process_count: which share of the clips is read here.
    Raises:
      ValueError: no clips, or fewer than processes; levels that the clips do not have; sizes below 1.
    """
    _check(clips, num_frames, levels, batch_size)
    if max_offset < 0:
        raise ValueError(f"max_offset is {max_offset}; expected 0 or more")
    if not 0 <= process_index < process_count <= len(clips):
        raise ValueError(f"process {process_index} of {process_count} cannot read a share of {len(clips)} clips")
    dataset = grain.MapDataset.source(clips).seed(seed).shuffle()[process_index::process_count].repeat()
    dataset = dataset.random_map(_RandomCrop(num_frames, tuple(levels), max_offset))
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
    return iter(dataset.to_iter_dataset(read).batch(batch_size, drop_remainder=True))


def evaluation_code_batches(
    clips: TokenDataset | Sequence[TokenClip],
    *,
    num_frames: int,
    num_levels: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Consecutive crops of all clips, in which every frame is a target once; rows that are left over are masked.

    Args:
      clips: what to cut.
      num_frames: T.
      num_levels: codebooks of every row; the arrays have no others.
      batch_size: rows of this process.
      process_index, process_count: which rows of each global batch come out here.
    Raises:
      ValueError: as `code_batches`.
    """
    _check(clips, num_frames, (num_levels,), batch_size)
    return _evaluation_batches(clips, num_frames, num_levels, batch_size, process_index, process_count)


def code_crop(codes: np.ndarray, num_frames: int, num_levels: int, offset: int) -> Batch:
    """One row from codes (Q, <= T)."""
    num_codebooks, length = codes.shape
    inputs, targets = np.zeros((2, num_codebooks, num_frames), np.int32)
    inputs[:, 1:length] = codes[:, :-1] + 1
    targets[:, :length] = codes
    mask = (np.arange(num_codebooks) < num_levels)[:, None] & (np.arange(num_frames) < length)[None]
    numbers = {"num_levels": np.int32(num_levels), "offset": np.int32(offset)}
    return {"inputs": inputs, "targets": targets, "mask": mask} | numbers


class _RandomCrop(grain.transforms.RandomMap):
    """A crop by the random generator that Grain keys to each record."""

    def __init__(self, num_frames: int, levels: tuple[int, ...], max_offset: int):
        self.num_frames, self.levels, self.max_offset = num_frames, levels, max_offset

    def random_map(self, element: TokenClip, rng: np.random.Generator) -> Batch:
        start = int(rng.integers(max(0, element.codes.shape[1] - self.num_frames) + 1))
        codes = element.codes[:, start : start + self.num_frames]
        num_levels = self.levels[int(rng.integers(len(self.levels)))]
        return code_crop(codes, self.num_frames, num_levels, int(rng.integers(self.max_offset + 1)))


def _evaluation_batches(clips, num_frames, num_levels, batch_size, process_index, process_count) -> Iterator[Batch]:
    empty = code_crop(np.zeros((num_levels, 0), np.int32), num_frames, num_levels, 0)

    def rows() -> Iterator[Batch]:
        for index in range(len(clips)):
            codes = clips[index].codes[:num_levels]
            for start in range(0, codes.shape[1], num_frames):
                yield code_crop(codes[:, start : start + num_frames], num_frames, num_levels, 0)

    waiting: list[Batch] = []
    for row in rows():
        waiting.append(row)
        if len(waiting) == batch_size * process_count:
            yield _stacked(waiting[process_index * batch_size :][:batch_size])
            waiting = []
    if waiting:
        waiting += [empty] * (batch_size * process_count - len(waiting))
        yield _stacked(waiting[process_index * batch_size :][:batch_size])


def _stacked(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _check(clips, num_frames: int, levels: Sequence[int], batch_size: int) -> None:
    if not len(clips):
        raise ValueError("there are no clips of codes; expected at least one")
    if num_frames < 1 or batch_size < 1:
        raise ValueError(f"num_frames is {num_frames} and batch_size {batch_size}; expected at least 1 of each")
    num_codebooks = len(clips[0].codes)
    if not levels or not all(1 <= level <= num_codebooks for level in levels):
        raise ValueError(f"levels are {tuple(levels)}; the clips have 1 to {num_codebooks} codebooks")
