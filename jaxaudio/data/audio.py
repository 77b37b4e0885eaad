"""Audio files as mono float32 samples: decoded in blocks, down-mixed, resampled, and checked for what they promise.

soundfile (libsndfile) is tried first, then PyAV (FFmpeg), whatever the file is called. No function here writes.
"""

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Iterator

import numpy as np

from jaxaudio.data.decoders import AudioError, AudioInfo, open_audio

__all__ = [
    "RESAMPLER",
    "SAMPLE_RATE",
    "AudioError",
    "AudioInfo",
    "AudioScan",
    "audio_info",
    "check_block",
    "load_audio",
    "read_blocks",
    "scan",
]

SAMPLE_RATE = 16_000  # of the speech that models here hear

_QUALITY = "VHQ"


def _resampler() -> str:
    try:
        return f"soxr {importlib.metadata.version('soxr')} {_QUALITY}"
    except importlib.metadata.PackageNotFoundError:  # the installation without its readers, which resamples nothing
        return f"soxr (not installed) {_QUALITY}"


RESAMPLER = _resampler()
"""Library, version and quality of every resampling done here; `inspect` and the results of a manifest name it."""


@dataclasses.dataclass(frozen=True)
class AudioScan:
    """What the samples of a file are like, over all channels at the file's own rate.

    Attributes:
      num_samples: Decoded samples per channel.
      peak: Largest magnitude; 1.0 is full scale.
      rms: Root of the mean square.
      num_clipped: Samples at or beyond the largest value that the format holds (for integers, on either side).
      digital_silence: Share of the instants, 0 to 1, at which every channel is exactly 0.
      num_not_finite: Samples that are NaN or infinite; the other figures leave them out.
    """

    num_samples: int
    peak: float
    rms: float
    num_clipped: int
    digital_silence: float
    num_not_finite: int


def audio_info(path: str | os.PathLike) -> AudioInfo:
    """What the header of an audio file says; see `AudioInfo` for how exact the length is.

    Only a file whose header does not state its length is decoded, and then held to `read_blocks`' rules.

    Raises:
      AudioError: The file is missing, a folder, empty, not audio, of an unknown codec, cut inside an Ogg page, or in
        need of PyAV where that is not installed.
    """
    with open_audio(path) as source:
        if source.promised_s is not None:
            return source.info
        num_samples = sum(map(len, source.chunks))
        return dataclasses.replace(
            source.info, num_samples=num_samples, duration_s=num_samples / source.info.sample_rate
        )


def scan(path: str | os.PathLike) -> AudioScan:
    """Decodes a whole file in blocks and measures its samples, also where they are not finite.

    Raises:
      AudioError: As `read_blocks`, except for samples that are not finite.
    """
    num_samples = num_clipped = num_silent = num_not_finite = 0
    peak = energy = 0.0
    with open_audio(path) as source:
        for chunk in source.chunks:
            finite = np.isfinite(chunk)
            magnitude = np.abs(np.where(finite, chunk, 0.0), dtype=np.float64)
            num_samples += len(chunk)
            num_not_finite += int(chunk.size - finite.sum())
            num_clipped += int((magnitude >= source.full_scale).sum())
            num_silent += int((chunk == 0).all(axis=1).sum())
            peak = max(peak, float(magnitude.max(initial=0.0)))
            energy += float(np.square(magnitude).sum())
        num_finite = num_samples * source.info.num_channels - num_not_finite
    rms = math.sqrt(energy / max(num_finite, 1))
    return AudioScan(num_samples, peak, rms, num_clipped, num_silent / num_samples, num_not_finite)


def read_blocks(
    path: str | os.PathLike, sample_rate: int = SAMPLE_RATE, *, block_s: float = 30.0, channels: int | None = None
) -> Iterator[np.ndarray]:
    """Decodes a file block by block: mean of the channels, resampled with soxr at its highest quality (`RESAMPLER`).

    The samples do not depend on `block_s`, and are those of resampling the whole file at once. Memory is that of a
    block, whatever the length of the file. Integer samples are divided by their full scale (16-bit: 32768); samples
    beyond full scale, of float files or made by resampling, are left as they are.

    A file that ends before what it promises is an error, never a short result. Ogg files that end between two pages,
    MP3 without a length header, raw AAC and live WebM promise no length: there the end of the file is the end.

    Args:
      path: wav, flac, ogg, mp3 and whatever else libsndfile reads; m4a, mp4, webm and whatever else FFmpeg reads if
        PyAV is installed. Of several audio streams FFmpeg's choice is taken.
      sample_rate: Of the result, in Hz.
      block_s: Seconds of one block.
      channels: Of the result, which then is (A, channels): a mono file gives every channel the same, and one channel
        is the mean of a file's.

    Returns:
      An iterator of float32 arrays (A,), or (A, channels), of round(block_s * sample_rate) samples, the last one
      shorter. The file is opened by the first `next`, which is where errors of the file come from.

    Raises:
      ValueError: A rate or a block of less than one sample (has the value).
      AudioError: The file is missing, a folder, empty, not audio, of an unknown codec, in need of PyAV where that is
        not installed, without samples, cut short (has the seconds promised and decoded), of several channels that
        are not the number asked for (has both), or holds a sample that is not finite (has its second).
    """
    if sample_rate < 1:
        raise ValueError(f"sample_rate={sample_rate}; expected at least 1 Hz.")
    block_samples = round(block_s * sample_rate)
    if block_samples < 1:
        raise ValueError(f"block_s={block_s}: less than one sample at {sample_rate} Hz.")
    pieces = _pieces(path, sample_rate, channels or 1)
    return _reblock(pieces if channels else (piece[:, 0] for piece in pieces), block_samples)


def load_audio(path: str | os.PathLike, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A whole file as one float32 array (A,); everything else as `read_blocks`."""
    return np.concatenate(list(read_blocks(path, sample_rate)))


def _pieces(path: str | os.PathLike, sample_rate: int, channels: int) -> Iterator[np.ndarray]:
    """Pieces (A, channels) of any length, mixed and resampled."""
    with open_audio(path) as source:
        info, resampler = source.info, None
        if info.num_channels not in (1, channels) and channels > 1:
            raise AudioError(
                f"{path}: has {info.num_channels} channels; expected {channels}, or 1 that all of them share. Mix it "
                "to either first."
            )
        width = min(info.num_channels, channels)
        if info.sample_rate != sample_rate:
            import soxr

            resampler = soxr.ResampleStream(info.sample_rate, sample_rate, width, dtype="float32", quality=_QUALITY)
        num_read = num_written = 0
        for chunk in source.chunks:
            _check_finite(chunk, num_read, info)
            num_read += len(chunk)
            piece = chunk if info.num_channels == width else chunk.mean(axis=1, keepdims=True)
            if resampler:
                piece = resampler.resample_chunk(piece)
            num_written += len(piece)
            yield np.repeat(piece, channels // width, axis=1)
        if resampler:
            tail = resampler.resample_chunk(np.zeros((0, width), np.float32), last=True)
            num_written += len(tail)
            yield np.repeat(tail, channels // width, axis=1)
        if not num_written:
            raise AudioError(
                f"{path}: {num_read} samples at {info.sample_rate} Hz are less than one sample at {sample_rate} Hz; "
                "expected audio that lasts."
            )


def check_block(block: np.ndarray, num_before: int, sample_rate: int) -> None:
    """Refuses what is not a block of mono samples; `num_before` samples came before it.

    Raises:
      ValueError: another rank than one, no floats, or a sample that is not finite; has the shape and dtype, or the
        sample and its second.
    """
    if block.ndim != 1 or block.dtype.kind != "f":
        raise ValueError(
            f"expected blocks (A,) of mono floats in [-1, 1], got shape {block.shape}, dtype {block.dtype}; "
            "mix channels down, and divide 16-bit integers by 32768"
        )
    finite = np.isfinite(block)
    if not finite.all():
        first = int(finite.argmin())
        second = (num_before + first) / sample_rate
        raise ValueError(f"the audio has a sample that is {block[first]} at {second:.4f} s; samples must be finite")


def _check_finite(chunk: np.ndarray, num_before: int, info: AudioInfo) -> None:
    if np.isfinite(chunk).all():
        return
    row, channel = np.argwhere(~np.isfinite(chunk))[0]
    raise AudioError(
        f"{info.path}: a sample of channel {channel + 1} is {chunk[row, channel]} at "
        f"{(num_before + row) / info.sample_rate:.4f} s; expected finite samples. Export the file again, or mend it."
    )


def _reblock(pieces: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Blocks of exactly `size` samples, the last one shorter, from pieces of any length."""
    held, num_held = [], 0
    for piece in pieces:
        while num_held + len(piece) >= size:
            held.append(piece[: size - num_held])
            piece = piece[size - num_held :]
            yield np.concatenate(held)
            held, num_held = [], 0
        held.append(piece)
        num_held += len(piece)
    if num_held:
        yield np.concatenate(held)
