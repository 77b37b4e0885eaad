"""The .jac file: the codes of one recording in chunks, of which each survives the damage of others. NumPy, no JAX.

    header   see `codec_header`
    chunk    marker (4 bytes), index (4), frames (2), scales (2), length of the payload (4), the scales (float32),
             the payload, CRC-32 of all that (4)
    ...      the other chunks
    header   again: either of the two is enough

All integers are little-endian. A payload is the chunk's codes at ceil(log2(codebook_size)) bits each, frame by frame,
the coarsest codebook first, the highest bit first; or, where that is shorter, what an entropy coder made of them. A
chunk knows nothing of the others.

A chunk costs 20 bytes beside its codes: at `CHUNK_S`, 5 s, that is 0.03 kbit/s, 0.5 % of 6 kbit/s and 2 % of 1.5.
Chunks of 1 s would cost 2.7 % and 11 %, and leave an entropy coder no past to learn from; longer ones lose more to one
wrong bit. Each of the two headers takes 60 to 110 bytes.
"""

import contextlib
import dataclasses
import io
import math
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from jaxaudio.data.codec_header import (
    MAX_PAYLOAD,
    MAX_SAMPLES,
    CodecFileError,
    CodecHeader,
    check_header,
    header_bytes,
    read_header,
)

CHUNK_S = 5.0

_MARKER = b"\xa9JC\xd7"
_HASH = 16  # digits of an entropy coder's hash that a header has
_FIXED = struct.Struct("<4sIHHI")
_CRC = struct.Struct("<I")


@runtime_checkable
class EntropyCoder(Protocol):
    """Makes the codes of a chunk shorter, and gives them back; every chunk by itself.

    Attributes:
      name: for people.
      hash: hexadecimal; two coders of the same hash read each other's bytes.
    """

    name: str
    hash: str

    def encode(self, codes: np.ndarray) -> bytes:
        """The bytes of codes (Q, T) int32."""
        ...

    def decode(self, data: bytes, num_codebooks: int, num_frames: int) -> np.ndarray:
        """The codes (Q, T) int32 of those bytes; a ValueError if they are not such."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk that is as it was written.

    Attributes:
      index: its place, from 0.
      codes: (Q, T) int32.
      scales: (segments,) float32; None where the codec scales nothing.
    """

    index: int
    codes: np.ndarray
    scales: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class LostChunks:
    """Neighbouring chunks that cannot be read.

    Attributes:
      first, last: their indices.
      start_s, end_s: the part of the waveform that they held, in seconds.
      reason: why.
    """

    first: int
    last: int
    start_s: float
    end_s: float
    reason: str


class CodecFile:
    """A .jac file whose chunks were all checked.

    Args:
      data: the whole file; `open_codec_file` maps it, so that little of it is in memory.
      name: of the file, for messages.

    Attributes:
      name: as given.
      header: of the file; where the writer did not come to its end, with the length that the chunks have.
      notes: what is wrong with the file beside lost chunks, in sentences.
      lost: what cannot be read, in order.

    Raises:
      CodecFileError: it is no .jac file, both copies of its header are damaged, the header says what cannot be, or none
        of its chunks is whole.
    """

    def __init__(self, data: bytes | mmap.mmap, name: str):
        self._data, self.name = data, name
        try:
            self.header, has_both = read_header(data)
            self._found, broken = _find_chunks(data, self.header)
            if not self._found and self.header.num_chunks != 0:
                raise CodecFileError("none of its chunks is whole; copy it again, or encode the audio again")
            notes = (
                [] if has_both else ["one of the two copies of its header is damaged or missing; the other was read"]
            )
            if self.header.num_chunks is None:
                notes.append("was not written to its end; its length is that of the chunks in it")
                self.header = self._with_length()
        except CodecFileError as error:
            raise CodecFileError(f"{name}: {error}") from error
        self.notes, self.lost = tuple(notes), tuple(self._list_lost(broken))

    def chunks(self, coder: EntropyCoder | None = None) -> Iterator[Chunk | LostChunks]:
        """All chunks in order, lost neighbours as one.

        Args:
          coder: the file's entropy coder, needed if the header names one.
        Raises:
          CodecFileError: the coder is missing or not the file's (has names and hashes of both); or a chunk that is as
            it was written holds no such codes, because what wrote it was wrong (has the chunk).
        """
        header = self.header
        if header.entropy is not None and (coder is None or coder.hash[:_HASH] != header.entropy_hash):
            given = "none is given" if coder is None else f"{coder.name} ({coder.hash[:_HASH]}) is given"
            raise CodecFileError(
                f"{self.name}: its codes need the entropy model {header.entropy} ({header.entropy_hash}), but {given}"
            )
        lost = {part.first: part for part in self.lost}
        index = 0
        while index < header.num_chunks:
            if index in lost:
                yield lost[index]
                index = lost[index].last + 1
            else:
                yield self._chunk(index, coder)
                index += 1

    def _chunk(self, index: int, coder: EntropyCoder | None) -> Chunk:
        header, at = self.header, self._found[index]
        num_frames, num_scales, length = self._sizes(index)
        at += _FIXED.size
        scales = np.frombuffer(self._data[at : at + 4 * num_scales], "<f4").astype(np.float32)
        payload = self._data[at + 4 * num_scales : at + 4 * num_scales + length]
        try:
            _check_scales(scales)
            if length == header.payload_bytes(num_frames):
                codes = _unpack(payload, header, num_frames)
            else:
                codes = coder.decode(payload, header.num_codebooks, num_frames)
            _check_codes(codes, header, num_frames)
        except ValueError as error:
            raise CodecFileError(f"{self.name}: chunk {index} was written wrong: {error}") from error
        return Chunk(index, codes, scales if header.chunk_segments else None)

    def _sizes(self, index: int) -> tuple[int, int, int]:
        """Frames, scales and bytes of the payload of a chunk that was found."""
        at = self._found[index]
        return _FIXED.unpack(self._data[at : at + _FIXED.size])[2:]

    def _with_length(self) -> CodecHeader:
        header, last = self.header, max(self._found)
        num_frames, num_scales, _ = self._sizes(last)
        share = (num_scales, header.chunk_segments) if header.chunk_segments else (num_frames, header.chunk_frames)
        num_samples = last * header.chunk_samples + math.ceil(share[0] * header.chunk_samples / share[1])
        if num_samples > MAX_SAMPLES:
            raise CodecFileError(f"its last chunk is {last}, at sample {last * header.chunk_samples}; that cannot be")
        return dataclasses.replace(header, num_samples=num_samples)

    def _list_lost(self, broken: dict[int, str]) -> Iterator[LostChunks]:
        header, expected = self.header, 0
        for index in [*sorted(self._found), header.num_chunks]:
            if index > expected:
                reasons = sorted({broken[lost] for lost in broken if expected <= lost < index})
                yield LostChunks(
                    expected,
                    index - 1,
                    expected * header.chunk_samples / header.sample_rate,
                    min(index * header.chunk_samples, header.num_samples) / header.sample_rate,
                    "; ".join(reasons) or "missing, or damaged where it begins",
                )
            expected = index + 1


@contextlib.contextmanager
def open_codec_file(path: str | os.PathLike) -> Iterator[CodecFile]:
    """Opens a .jac file and checks all of it; memory is that of a chunk, whatever the length of the file.

    Raises:
      CodecFileError: there is no such file, or nothing of it can be read; see `CodecFile`.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        what = "is a folder" if os.path.isdir(name) else "there is no such file"
        raise CodecFileError(f"{name}: {what}; expected a .jac file")
    with open(name, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise CodecFileError(f"{name}: is empty (0 bytes); expected a .jac file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield CodecFile(data, name)


class CodecWriter:
    """Writes a .jac file chunk by chunk.

    Args:
      file: open for writing at its beginning, and seekable.
      header: its num_samples is not read; `finish` writes it.
      coder: entropy coder; its name and hash go into the header.
    Raises:
      CodecFileError: the header says what cannot be; has the field and its value.
    """

    def __init__(self, file: io.BufferedIOBase, header: CodecHeader, coder: EntropyCoder | None = None):
        entropy, entropy_hash = (None, None) if coder is None else (coder.name, coder.hash[:_HASH])
        self._header = dataclasses.replace(header, entropy=entropy, entropy_hash=entropy_hash, num_samples=None)
        check_header(self._header)
        self._file, self._coder, self._num_chunks, self._is_last = file, coder, 0, False
        file.write(header_bytes(self._header))

    def add(self, codes: np.ndarray, scales: np.ndarray | None = None) -> None:
        """Writes the next chunk.

        Args:
          codes: (Q, T) int32; T is the header's chunk_frames, except at the end.
          scales: (segments,) float32, where the header has chunk_segments.
        Raises:
          CodecFileError: codes or scales that do not fit the header, or a chunk after a shorter one; has the values.
        """
        header, num_frames = self._header, codes.shape[-1]
        scales = np.zeros(0, np.float32) if scales is None else scales
        try:
            _check_codes(codes, header, num_frames)
            _check_scales(scales)
            if (why := _misfit(header, self._num_chunks, num_frames, len(scales))) is not None:
                raise CodecFileError(why)
            if self._is_last:
                raise CodecFileError("it comes after one that was shorter than the others")
        except CodecFileError as error:
            raise CodecFileError(f"chunk {self._num_chunks}: {error}") from error
        full = (len(scales), header.chunk_segments) if header.chunk_segments else (num_frames, header.chunk_frames)
        self._is_last = full[0] < full[1]
        payload = _pack(codes, header)
        if self._coder is not None and len(coded := self._coder.encode(codes)) < len(payload):
            payload = coded
        record = _FIXED.pack(_MARKER, self._num_chunks, num_frames, len(scales), len(payload))
        record += scales.astype("<f4").tobytes() + payload
        self._file.write(record + _CRC.pack(zlib.crc32(record)))
        self._num_chunks += 1

    def finish(self, num_samples: int) -> CodecHeader:
        """Writes the length of the waveform into the header, and the header once more at the end; returns it.

        Raises:
          CodecFileError: the chunks written are not those of a waveform of this length; has both numbers.
        """
        header = dataclasses.replace(self._header, num_samples=num_samples)
        check_header(header)
        if header.num_chunks != self._num_chunks:
            raise CodecFileError(
                f"{self._num_chunks} chunks were written; expected {header.num_chunks} of {num_samples} samples, "
                f"{header.chunk_samples} in a chunk"
            )
        self._file.write(header_bytes(header))
        self._file.seek(0)
        self._file.write(header_bytes(header))
        return header


def _find_chunks(data: bytes | mmap.mmap, header: CodecHeader) -> tuple[dict[int, int], dict[int, str]]:
    """Where whole chunks begin, by index; and what is wrong with others of which the index can be read."""
    found, broken, effort = {}, {}, 0
    at = data.find(_MARKER)
    while at >= 0:
        index, end, why = _examine(data, at, header)
        if why is None:
            found.setdefault(index, at)
        elif index is not None:
            broken[index] = why
            effort += end - at
            # Damage makes few of these; only a file made for it has long chunks that begin within each other.
            if effort > 2 * len(data) + MAX_PAYLOAD:
                raise CodecFileError("more chunks begin in it than it has bytes for; no damage does that")
        at = data.find(_MARKER, at + 1 if why is not None else end)
    return found, broken


def _examine(data: bytes | mmap.mmap, at: int, header: CodecHeader) -> tuple[int | None, int, str | None]:
    """Index and end of what looks like a chunk, and why it is none; the index is None where it cannot be one."""
    fixed = data[at : at + _FIXED.size]
    if len(fixed) < _FIXED.size:
        return None, at, "cut short"
    _, index, num_frames, num_scales, length = _FIXED.unpack(fixed)
    most = header.payload_bytes(num_frames)
    is_length = length == most or (header.entropy is not None and length < most)
    if not is_length or _misfit(header, index, num_frames, num_scales) is not None:
        return None, at, "its sizes cannot be"
    end = at + _FIXED.size + 4 * num_scales + length
    if end + _CRC.size > len(data):
        return index, len(data), "the file ends in the middle of it"
    if data[end : end + _CRC.size] != _CRC.pack(zlib.crc32(data[at:end])):
        return index, end, "its checksum is wrong"
    return index, end + _CRC.size, None


def _misfit(header: CodecHeader, index: int, num_frames: int, num_scales: int) -> str | None:
    """Why no chunk of this file has these numbers; None if one may have."""
    if header.num_chunks is not None and index >= header.num_chunks:
        return f"index {index}; expected at most {header.num_chunks - 1}"
    may_be_short = header.num_chunks is None or index == header.num_chunks - 1
    if header.chunk_segments:
        least = 1 if may_be_short else header.chunk_segments
        fits = least <= num_scales <= header.chunk_segments and num_scales <= num_frames <= header.chunk_frames
    else:
        least = 1 if may_be_short else header.chunk_frames
        fits = num_scales == 0 and least <= num_frames <= header.chunk_frames
    if fits:
        return None
    return (
        f"{num_frames} frames with {num_scales} scales; expected {header.chunk_frames} with {header.chunk_segments}, "
        "and fewer at the end only"
    )


def _check_scales(scales: np.ndarray) -> None:
    if not np.isfinite(scales).all():
        raise CodecFileError(f"scales are {scales}; expected finite numbers")


def _check_codes(codes: np.ndarray, header: CodecHeader, num_frames: int) -> None:
    if codes.shape != (header.num_codebooks, num_frames) or codes.dtype != np.int32:
        raise CodecFileError(
            f"codes are {codes.dtype} {codes.shape}; expected int32 ({header.num_codebooks}, {num_frames})"
        )
    if codes.size and not 0 <= codes.min() <= codes.max() < header.codebook_size:
        raise CodecFileError(f"codes are from {codes.min()} to {codes.max()}; expected 0 to {header.codebook_size - 1}")


def _pack(codes: np.ndarray, header: CodecHeader) -> bytes:
    shifts = np.arange(header.code_bits - 1, -1, -1, dtype=np.int32)
    return np.packbits((codes.T[:, :, None] >> shifts & 1).astype(np.uint8)).tobytes()


def _unpack(payload: bytes, header: CodecHeader, num_frames: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(payload, np.uint8), count=num_frames * header.num_codebooks * header.code_bits)
    places = 1 << np.arange(header.code_bits - 1, -1, -1, dtype=np.int32)
    codes = bits.reshape(num_frames, header.num_codebooks, header.code_bits) @ places
    return np.ascontiguousarray(codes.T, np.int32)
