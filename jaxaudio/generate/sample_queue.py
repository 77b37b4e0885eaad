"""Blocks of any size in, pieces of a wanted size out."""

from collections.abc import Iterable

import numpy as np


class SampleQueue:
    """Rows of arrays that come in blocks (n, ...), read from the front.

    Args:
      blocks: read as late as possible.

    Attributes:
      num_taken: rows that were taken.
    """

    def __init__(self, blocks: Iterable[np.ndarray]):
        self._blocks = iter(blocks)
        self._held: list[np.ndarray] = []
        self._num_held = 0
        self.num_taken = 0

    def has(self, count: int) -> bool:
        """Whether there are so many rows; reads blocks until there are."""
        while self._num_held < count:
            block = next(self._blocks, None)
            if block is None:
                return False
            self._held.append(block)
            self._num_held += len(block)
        return True

    def peek(self, count: int) -> np.ndarray:
        """The next rows, fewer where `has(count)` is not true; they stay."""
        self.has(count)
        if len(self._held) > 1:
            self._held = [np.concatenate(self._held)]
        return self._held[0][:count] if self._held else np.zeros((0,))

    def take(self, count: int) -> np.ndarray:
        """The next rows, fewer where `has(count)` is not true."""
        rows = self.peek(count)
        self._held = [block[len(rows) :] for block in self._held]
        self._num_held -= len(rows)
        self.num_taken += len(rows)
        return rows
