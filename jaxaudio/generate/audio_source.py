"""What a transcription listens to: a file, an array or a stream of blocks, of any length."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxaudio.data.audio import read_blocks
from jaxaudio.models.whisper import SAMPLE_RATE

_BLOCK = 30 * SAMPLE_RATE
# Samples are in [-1, 1]. Float files and resampling may go beyond that a little, 16-bit integers by thousands.
_LOUDEST = 10.0


def audio_blocks(audio: Any) -> Iterator[np.ndarray]:
    """The samples as float32 blocks (A,), mono at 16 kHz.

    Args:
      audio: a path, an array (A,), or an iterable of arrays (A,).
    Raises:
      AudioError: what `read_blocks` says of a file.
      ValueError: an array that is not one-dimensional, not floating point or far from [-1, 1]; has its shape, type or
        largest value.
    """
    if isinstance(audio, (str, os.PathLike)):
        yield from read_blocks(audio)
        return
    for block in _arrays(audio):
        if block.ndim != 1:
            raise ValueError(f"audio must be mono, arrays (samples,), got {block.shape}; take the mean of the channels")
        if not np.issubdtype(block.dtype, np.floating):
            raise ValueError(f"audio must be floats in [-1, 1], got {block.dtype}; divide 16-bit samples by 32768")
        loudest = float(np.abs(block).max(initial=0.0))
        if loudest > _LOUDEST:
            raise ValueError(f"audio must be in [-1, 1], got a sample of {loudest:g}; divide 16-bit samples by 32768")
        yield np.asarray(block, np.float32)


def rereadable(audio: Any) -> Any:
    """The audio itself if it can be read twice; of an iterator the samples as an array on disk, removed with it."""
    if isinstance(audio, (str, os.PathLike)) or hasattr(audio, "__array__"):
        return audio
    with tempfile.TemporaryFile() as file:
        for block in audio_blocks(audio):
            file.write(block.tobytes())
        file.flush()
        return np.memmap(file, np.float32, "r") if file.tell() else np.zeros(0, np.float32)


def _arrays(audio: Any) -> Iterable[np.ndarray]:
    if not hasattr(audio, "__array__"):
        return (np.asarray(block) for block in audio)
    array = np.asanyarray(audio)  # an array on disk stays there
    return (
        (array[start : start + _BLOCK] for start in range(0, array.shape[-1], _BLOCK)) if array.ndim == 1 else [array]
    )
