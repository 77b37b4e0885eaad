"""A loaded codec: recordings of any length to codes and back.

Whole or in pieces, alone or in a batch, a recording has the same codes. Only a codec that scales segments codes these
one by one, as its authors do; see `codec_segments`.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaudio.generate.codec_segments import decode_segments, encode_segments
from jaxaudio.generate.sample_queue import SampleQueue
from jaxaudio.nn.codec import Codec as CodecModel
from jaxaudio.nn.codec import CodecConfig
from jaxaudio.nn.streaming import State
from jaxaudio.nn.transformer import unstack_layers

CHUNK_S = 10.0
_LOOK_AHEAD = 16  # frames; more than any codec of ours looks ahead

Piece = tuple[np.ndarray, np.ndarray | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """The codes of one recording.

    Attributes:
      codes: (Q, T) int32; those of segments follow each other.
      num_samples: of the recording.
      scales: (segments,) float32, the loudness of each segment; None for a codec without segments.
    """

    codes: np.ndarray
    num_samples: int
    scales: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """A model with its parameters.

    Args:
      name: of the published model or of the folder, for people.
      model: one of the codecs of `models`.
      params: the model's.
    """

    name: str
    model: CodecModel
    params: Any

    def __post_init__(self):
        object.__setattr__(self, "params", unstack_layers(jax.tree.map(jnp.asarray, self.params)))

    @property
    def config(self) -> CodecConfig:
        """The model's."""
        return self.model.config

    @functools.cached_property
    def config_hash(self) -> str:
        """Hexadecimal digest of the kind of model and its sizes."""
        text = json.dumps([type(self.model).__name__, dataclasses.asdict(self.config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def kbps(self, num_codebooks: int) -> float:
        """Kilobits a second of so many codebooks, without headers and entropy coding."""
        return num_codebooks * math.log2(self.config.codebook_size) * self.config.frame_rate / 1000

    def num_codebooks_for(self, kbps: float) -> int:
        """How many codebooks a bitrate is.

        Raises:
          ValueError: the model was not trained for it, or it is less than one codebook or more than all; has the
            bitrates that there are.
        """
        bandwidths, most = self.config.bandwidths, self.config.num_codebooks
        if bandwidths and kbps not in bandwidths:
            known = ", ".join(f"{bandwidth:g}" for bandwidth in bandwidths)
            raise ValueError(f"{self.name} has no {kbps:g} kbps; choose of {known}")
        count = math.floor(kbps / self.kbps(1) + 1e-9)
        if bandwidths:
            return max(1, count)
        if not 1 <= count <= most:
            raise ValueError(f"{self.name} has {self.kbps(1):.3g} to {self.kbps(most):.3g} kbps, got {kbps:g}")
        return count

    def encode(self, waveform: np.ndarray, *, num_codebooks: int | None = None, chunk_s: float = CHUNK_S) -> Encoded:
        """The codes of a recording (A, channels), or (A,) of a mono codec; arguments and errors as `encode_blocks`."""
        pieces = list(self.encode_blocks([waveform], num_codebooks=num_codebooks, chunk_s=chunk_s))
        scales = None if self.config.segment_length is None else np.concatenate([scales for _, scales in pieces])
        return Encoded(np.concatenate([codes for codes, _ in pieces], axis=1), len(waveform), scales)

    def encode_batch(self, waveforms: Sequence[np.ndarray], *, num_codebooks: int | None = None) -> list[Encoded]:
        """As `encode` for each of the recordings, of any lengths; those up to 10 s go through the model at once.

        Raises:
          ValueError: as `encode_blocks`.
        """
        count = self._checked_count(num_codebooks)
        limit = 0 if self.config.segment_length is not None else round(CHUNK_S * self.config.sample_rate)
        short = [index for index, waveform in enumerate(waveforms) if 0 < len(waveform) <= limit]
        out = {i: self.encode(w, num_codebooks=count) for i, w in enumerate(waveforms) if i not in short}
        if short:
            rows = [self._checked(waveforms[index]) for index in short]
            codes, frames = self._encode_last(rows, count, _bucket(self._num_frames(max(map(len, rows)))), None)
            for index, row, num_frames in zip(short, codes, frames, strict=True):
                out[index] = Encoded(row[:, :num_frames], len(waveforms[index]))
        return [out[index] for index in range(len(waveforms))]

    def encode_blocks(
        self, blocks: Iterable[np.ndarray], *, num_codebooks: int | None = None, chunk_s: float = CHUNK_S
    ) -> Iterator[Piece]:
        """The codes of a recording that comes in blocks, in memory for one chunk.

        Args:
          blocks: float samples (n, channels), or (n,) of a mono codec, at the codec's rate, n as it comes.
          num_codebooks: how many levels; all if None.
          chunk_s: how much goes through the model at once, in whole frames, at least one; no code depends on it.
            A causal codec gives frames out as soon as their last sample is there.
        Yields:
          codes (Q, t), and the scales (segments,) of a codec with segments, which come whole; else None.
        Raises:
          ValueError: no samples, samples of another rank or number of channels, not finite or no floats, or more
            codebooks than the model has; has what came and what is expected.
        """
        count = self._checked_count(num_codebooks)
        samples = SampleQueue(self._checked(block) for block in blocks)
        if not samples.has(1):
            raise ValueError("there are no samples to encode")
        if self.config.segment_length is not None:
            yield from encode_segments(self.config, lambda *rows: np.asarray(self._encode(count, *rows)[0]), samples)
            return
        state, num_frames, hop = None, 0, self.config.hop_length
        first, chunk, held = self._piece_frames(chunk_s)
        while samples.has(((chunk if state else first) + held) * hop):
            piece = samples.take((chunk if state else first) * hop)
            codes, state = self._encode(count, piece[None], None, state, last=False)
            num_frames += codes.shape[-1]
            yield np.asarray(codes[0]), None
        piece = samples.take((first + held) * hop)
        if len(piece):
            size = self._num_frames(len(piece))
            size = _halved(chunk + held, size) if state else _bucket(size)
            codes, _ = self._encode_last([piece], count, size, state)
            yield codes[0][:, : self._num_frames(samples.num_taken) - num_frames], None

    def decode(self, encoded: Encoded, *, chunk_s: float = CHUNK_S) -> np.ndarray:
        """The waveform (num_samples, channels) of codes; arguments and errors as `decode_blocks`."""
        pieces = self.decode_blocks([(encoded.codes, encoded.scales)], encoded.num_samples, chunk_s=chunk_s)
        return np.concatenate(list(pieces))

    def decode_blocks(
        self, pieces: Iterable[Piece], num_samples: int | None = None, *, chunk_s: float = CHUNK_S
    ) -> Iterator[np.ndarray]:
        """The waveform of codes that come in pieces, in memory for one chunk.

        Args:
          pieces: codes (Q, t) with the scales of their segments or None, as `encode_blocks` gives them.
          num_samples: of the recording; all that the codes stand for if None. A codec with segments needs it.
          chunk_s: as for `encode_blocks`.
        Yields:
          samples (n, channels).
        Raises:
          ValueError: no codes, codes or levels that the model has not, or a recording of another length than the codes;
            has what came and what is expected.
        """
        if self.config.segment_length is not None:
            checked = ((self._checked_codes(codes).T, scales) for codes, scales in pieces)
            if num_samples is None:
                raise ValueError(f"{self.name} codes segments, whose lengths follow from num_samples: it must be given")
            yield from decode_segments(
                self.config, lambda *rows: np.asarray(self._decode(*rows)[0]), checked, num_samples
            )
            return
        frames = SampleQueue(self._checked_codes(codes) for codes, _ in pieces)
        if not frames.has(1):
            raise ValueError("there are no codes to decode")
        state, num_written = None, 0
        first, chunk, held = self._piece_frames(chunk_s)
        while frames.has((chunk if state else first) + held):
            piece = frames.take(chunk if state else first)
            waveform, state = self._decode(piece.T[None], None, state, last=False)
            waveform = np.asarray(waveform[0])[: None if num_samples is None else num_samples - num_written]
            num_written += len(waveform)
            yield waveform
        piece = frames.take(first + held)
        total = frames.num_taken * self.config.hop_length
        num_samples = total if num_samples is None else num_samples
        if self._num_frames(num_samples) != frames.num_taken:
            raise ValueError(
                f"{frames.num_taken} frames are {total} samples, which a recording of {num_samples} has not"
            )
        if len(piece):
            size = _halved(chunk + held, len(piece)) if state else _bucket(len(piece))
            waveform, _ = self._decode(_padded(piece, size).T[None], np.array([len(piece)], np.int32), state)
            # Odd strides may leave a few samples less than a whole frame, see `SEANetConfig.short_transpose`: silence.
            waveform = np.asarray(waveform[0])[: min(num_samples, total - _short_samples(self.config)) - num_written]
            yield _padded(waveform, num_samples - num_written)

    def _num_frames(self, num_samples: int) -> int:
        return -(-num_samples // self.config.hop_length)

    def _piece_frames(self, chunk_s: float) -> tuple[int, int, int]:
        """Frames of the first piece and of the others, and how many must be left for the last."""
        chunk, seanet = max(1, math.ceil(chunk_s * self.config.frame_rate - 1e-9)), self.config.seanet
        if self.config.causal:
            # What is mirrored at the beginning must be there.
            return max(chunk, seanet.kernel_size if seanet.pad_mode == "reflect" else 1), chunk, 0
        return max(chunk, _LOOK_AHEAD), chunk, 1

    def _encode(self, count, waveform, lengths=None, state=None, last=True):
        return _encode(self.model, count, last, self.params, waveform, lengths, state)

    def _encode_last(
        self, rows: list[np.ndarray], count: int, num_frames: int, state: State | None
    ) -> tuple[np.ndarray, list[int]]:
        """Codes (B, Q, T) of rows padded to so many frames, and how many frames each row has by itself."""
        waveform = np.stack([_padded(row, num_frames * self.config.hop_length) for row in rows])
        codes, _ = self._encode(count, waveform, np.array([len(row) for row in rows], np.int32), state)
        return np.asarray(codes), [self._num_frames(len(row)) for row in rows]

    def _decode(self, codes, lengths=None, state=None, last=True):
        return _decode(self.model, last, self.params, codes, lengths, state)

    def _checked_count(self, num_codebooks: int | None) -> int:
        most = self.config.num_codebooks
        if num_codebooks is not None and not 1 <= num_codebooks <= most:
            raise ValueError(f"{self.name} has 1 to {most} codebooks, got {num_codebooks}")
        return num_codebooks or most

    def _checked(self, block: np.ndarray) -> np.ndarray:
        channels = self.config.channels
        if block.ndim == 1 and channels == 1:
            block = block[:, None]
        if block.ndim != 2 or block.shape[1] != channels or block.dtype.kind != "f":
            raise ValueError(
                f"{self.name} takes floats of shape (samples, {channels}), got {block.dtype} of shape {block.shape}; "
                "mix channels down or repeat them, and divide 16-bit integers by 32768"
            )
        if not np.isfinite(block).all():
            row, channel = np.argwhere(~np.isfinite(block))[0]
            raise ValueError(f"sample {row} of a block is {block[row, channel]}; samples must be finite")
        return block.astype(np.float32)

    def _checked_codes(self, codes: np.ndarray) -> np.ndarray:
        """Codes (t, Q) int32."""
        codes, size = np.asarray(codes), self.config.codebook_size
        if codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise ValueError(f"codes must be integers of shape (codebooks, frames), got {codes.dtype}, {codes.shape}")
        self._checked_count(codes.shape[0])
        if codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise ValueError(f"codes must be in 0..{size - 1}, got {codes.min()}..{codes.max()}")
        return codes.T.astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(model, num_codebooks, last, params, waveform, lengths, state):
    return model.apply(
        {"params": params}, waveform, num_codebooks, lengths=lengths, state=state, last=last, method="encode"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(model, last, params, codes, lengths, state):
    return model.apply({"params": params}, codes, lengths=lengths, state=state, last=last, method="decode")


def _short_samples(config: CodecConfig) -> int:
    """How much shorter than whole frames the decoder's output is: a step at the rate of each odd stride's output."""
    if not config.seanet.short_transpose:
        return 0
    short, length = 0, config.hop_length
    for stride in reversed(config.seanet.strides):
        length //= stride
        short += length * (stride % 2)
    return short


def _bucket(num_frames: int) -> int:
    """At least so many frames, of few possible numbers: each is a program to compile."""
    step = 1 << max(0, num_frames.bit_length() - 4)
    return -(-num_frames // step) * step


def _halved(most: int, num_frames: int) -> int:
    """`most` halved as often as it stays at least num_frames: what is left after whole chunks is mostly much less."""
    while most // 2 >= num_frames:
        most //= 2
    return most


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    return np.pad(rows, ((0, length - len(rows)), (0, 0)))
