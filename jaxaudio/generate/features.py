"""Whisper's log-mel features of a whole file: one compiled program for every duration, memory that does not grow."""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

from jaxaudio.data.audio import check_block
from jaxaudio.models.whisper import HOP_LENGTH, N_FFT, SAMPLE_RATE
from jaxaudio.ops.mel import log10_mel

BLOCK_FRAMES = 1024  # of one call; a little over 10 s, so that 10, 20 and 30 s of audio take no call more
_STRIDE = BLOCK_FRAMES * HOP_LENGTH
_OVERLAP = N_FFT - HOP_LENGTH  # samples that a block shares with the next one
_MARGIN = N_FFT // 2


@dataclasses.dataclass(frozen=True, eq=False)
class FileMel:
    """Log-mel features of a whole file, normalised by the maximum of the whole file.

    Attributes:
      frames: (T, M) float32, T = num_samples // 160: the content.
      closing: (C, M), the frames after the content, where the audio fades into the 30 s of digital silence that Whisper
        appends to every file.
      silence: value of all frames after those.
      num_samples: of the audio, at 16 kHz.
    """

    frames: np.ndarray
    closing: np.ndarray
    silence: float
    num_samples: int

    @property
    def duration_s(self) -> float:
        """Seconds of audio, of which `frames` covers the whole hundredths."""
        return self.num_samples / SAMPLE_RATE

    def window(self, start_frame: int, num_frames: int, *, end_frame: int | None = None) -> np.ndarray:
        """Frames from start_frame on, up to end_frame if given, (num_frames, M).

        Where the content or the clip ends before the window does, the rest is 0.0 (not silence): what Whisper's decoder
        of long audio is given.
        """
        return _padded(self.frames[start_frame:end_frame], num_frames, 0.0)

    def first_window(self, num_frames: int) -> np.ndarray:
        """The first (num_frames, M) as Whisper detects a file's language from them: after the content comes silence."""
        return _padded(np.concatenate([self.frames[:num_frames], self.closing]), num_frames, self.silence)


def _padded(frames: np.ndarray, num_frames: int, value: float) -> np.ndarray:
    window = np.full((num_frames, frames.shape[1]), value, np.float32)
    window[: len(frames)] = frames[:num_frames]
    return window


def file_log_mel(blocks: Iterable[np.ndarray], num_mels: int, *, memory_limit: int = 1 << 26) -> FileMel:
    """Log-mel features of a file, as the released Whisper computes them before it transcribes.

    That is the spectrogram of the file with 30 s of zeros after it, clipped to 8 decades below its one maximum; here it
    is computed in blocks of fixed length. See `jaxaudio.ops.mel.whisper_log_mel` for the features themselves.

    Args:
      blocks: consecutive samples, mono in [-1, 1] at 16 kHz, in arrays (A,) of any lengths.
      num_mels: 80, or 128 since large-v3.
      memory_limit: bytes; larger features (64 MiB are 35 minutes at 80 mels) are a memory map of a nameless temporary
        file (in the folder of TMPDIR), which is gone when the array is.
    Raises:
      ValueError: no samples, a sample that is not finite (with the second where it is), or a block that is not one
        channel of floats.
    """
    num_samples, num_frames, highest = 0, 0, np.float32(-10)
    with tempfile.SpooledTemporaryFile(memory_limit) as file:
        for samples_read, stretch in _stretches(blocks):
            if not num_frames:
                stretch[:_MARGIN] = stretch[_MARGIN + 1 : 2 * _MARGIN + 1][::-1]  # the start is reflected
            log_mel = np.asarray(log10_mel(stretch[None], num_mels))[0]
            highest = max(highest, log_mel.max())
            num_samples, num_frames = samples_read, num_frames + len(log_mel)
            file.write(log_mel.tobytes())
        frames = _mapped(file, (num_frames, num_mels), memory_limit)
    for start in range(0, num_frames, BLOCK_FRAMES):
        part = frames[start : start + BLOCK_FRAMES]
        part[:] = _normalized(part, highest)
    silence = _normalized(np.float32(-10), highest)
    content = num_samples // HOP_LENGTH
    return FileMel(frames[:content], np.array(frames[content:]), float(silence), num_samples)


def _normalized(log_mel, highest):
    return (np.maximum(log_mel, highest - np.float32(8)) + np.float32(4)) / np.float32(4)


def _mapped(file, shape, memory_limit):
    """The float32 array that was written to a spooled file: a map of it where it is on disk, else a copy."""
    file.flush()
    if file.tell() > memory_limit:
        return np.memmap(file, np.float32, "r+", shape=shape)
    file.seek(0)
    return np.frombuffer(bytearray(file.read()), np.float32).reshape(shape)


def _stretches(blocks: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of equal length, BLOCK_FRAMES frames each, of the samples with room for a margin before them.

    Yields the number of samples read so far and one buffer, over and over.
    """
    buffer = np.zeros(_STRIDE + _OVERLAP, np.float32)
    filled = _MARGIN
    for num_samples, block in _closed(blocks):
        while len(block):
            taken = block[: len(buffer) - filled]
            buffer[filled : filled + len(taken)] = taken
            filled, block = filled + len(taken), block[len(taken) :]
            if filled == len(buffer):
                yield num_samples, buffer
                buffer[:_OVERLAP] = buffer[-_OVERLAP:]
                filled = _OVERLAP


def _closed(blocks: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """The blocks, each with the number of samples so far; last, zeros up to a stretch's end beyond the last sample."""
    num_samples = 0
    for block in blocks:
        check_block(block, num_samples, SAMPLE_RATE)
        num_samples += len(block)
        yield num_samples, block
    if not num_samples:
        raise ValueError("the audio has no samples; expected at least one")
    yield num_samples, np.zeros(-(_MARGIN + num_samples) % _STRIDE + _OVERLAP, np.float32)
