"""Codecs that code segments one by one, each at its own loudness: EnCodec at 48 kHz.

Defossez et al. 2022, section 3.1: segments of 1 s that overlap by 10 ms, divided by their root mean square. The last
ones are as short as the signal leaves them.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxaudio.generate.sample_queue import SampleQueue
from jaxaudio.models.encodec import EnCodecConfig

BATCH_SIZE = 4  # segments that go through the model at once

Rows = Callable[[np.ndarray, np.ndarray], np.ndarray]


def encode_segments(
    config: EnCodecConfig, encode_rows: Rows, samples: SampleQueue
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The codes (Q, t) and the loudness (n,) of the next n segments.

    Args:
      config: of the model.
      encode_rows: from samples (n, segment_length, channels) and lengths (n,) to codes (n, Q, T).
      samples: of the recording.
    """
    while samples.has(1):
        segments = []
        while len(segments) < BATCH_SIZE and samples.has(1):
            segments.append(samples.peek(config.segment_length))
            samples.take(config.segment_stride)
        scales = np.array([_loudness(segment) for segment in segments], np.float32)
        scaled = [segment / scale for segment, scale in zip(segments, scales, strict=True)]
        codes = encode_rows(_stack(scaled, config.segment_length), np.array([len(x) for x in segments], np.int32))
        frames = [-(-len(segment) // config.hop_length) for segment in segments]
        yield np.concatenate([row[:, :count] for row, count in zip(codes, frames, strict=True)], axis=1), scales


def decode_segments(
    config: EnCodecConfig, decode_rows: Rows, pieces: Iterable[tuple[np.ndarray, np.ndarray]], num_samples: int
) -> Iterator[np.ndarray]:
    """The waveform (n, channels) as it is ready: segments faded into each other by triangles, their sum divided out.

    Args:
      config: of the model.
      decode_rows: from codes (n, Q, T) and lengths (n,) in frames to samples (n, A, channels).
      pieces: codes (Q, t) and loudness (n,) of whole segments.
      num_samples: of the recording.
    Raises:
      ValueError: segments that a recording of so many samples has not; has both numbers of frames.
    """
    size = -(-config.segment_length // config.hop_length) * config.hop_length
    stride, hop = config.segment_stride, config.hop_length
    window = (0.5 - np.abs(np.arange(1, size + 1, dtype=np.float32) / (size + 1) - 0.5))[:, None]
    sums = np.zeros((size, config.channels + 1), np.float32)  # samples and weights from the present segment on
    begin = 0
    for codes, scales in pieces:
        starts = begin + stride * np.arange(len(scales))
        lengths = np.minimum(config.segment_length, num_samples - starts)
        frames = -(-lengths // hop)
        if (lengths <= 0).any() or frames.sum() != codes.shape[1]:
            raise ValueError(
                f"{len(scales)} segments from sample {begin} on of a recording of {num_samples} have "
                f"{np.maximum(frames, 0).sum()} frames, got {codes.shape[1]}"
            )
        rows = np.split(codes.T, np.cumsum(frames)[:-1])
        stacked = _stack(rows, size // hop).transpose(0, 2, 1)
        decoded = decode_rows(stacked, frames.astype(np.int32)) * scales[:, None, None]
        ready = []
        for segment, count in zip(decoded, frames * hop, strict=True):
            sums[:count, :-1] += window[:count] * segment[:count]
            sums[:count, -1:] += window[:count]
            ready.append(sums[:stride, :-1] / np.maximum(sums[:stride, -1:], np.finfo(np.float32).tiny))
            sums = np.concatenate([sums[stride:], np.zeros_like(sums[:stride])])
        end = begin + stride * len(scales)
        if num_samples - end <= 0:
            yield np.concatenate(ready)[: num_samples - begin]
        else:
            yield np.concatenate(ready)
        begin = end


def _stack(rows: list[np.ndarray], length: int) -> np.ndarray:
    return np.stack([np.pad(row, ((0, length - len(row)), (0, 0))) for row in rows])


def _loudness(segment: np.ndarray) -> np.float32:
    mono = segment.mean(axis=1, dtype=np.float32)
    return np.sqrt(np.mean(mono**2, dtype=np.float32)) + np.float32(1e-8)
