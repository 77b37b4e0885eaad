"""The header of a .jac file: what its codes mean. See `codec_files` for where it stands. NumPy, no JAX.

b"JACF", version (2 bytes), length of the JSON (2), JSON of `CodecHeader`, CRC-32 of all that (4), in little-endian.
"""

import dataclasses
import json
import math
import mmap
import struct
import zlib
from typing import Any

MAX_PAYLOAD = 1 << 20
"""Bytes of a chunk's codes; a header that would need more is refused before anything is allocated."""
MAX_SAMPLES = 1 << 36  # a month at 24 kHz

_MAGIC, _VERSION = b"JACF", 1
_FIXED = struct.Struct("<4sHH")
_CRC = struct.Struct("<I")
_RANGES = {
    "sample_rate": (1, 1 << 24),
    "channels": (1, 64),
    "num_codebooks": (1, 1024),
    "codebook_size": (2, 1 << 24),
    "chunk_frames": (1, (1 << 16) - 1),
    "chunk_samples": (1, 1 << 31),
    "chunk_segments": (0, (1 << 16) - 1),
    "num_samples": (0, MAX_SAMPLES),
    "num_chunks": (0, MAX_SAMPLES),
}


class CodecFileError(ValueError):
    """A .jac file that cannot be read or written; the message has what is wrong with it and what was expected."""


@dataclasses.dataclass(frozen=True)
class CodecHeader:
    """What a .jac file says of itself.

    Attributes:
      codec: name of the codec that made the codes.
      config_hash: of its config.
      codebooks_hash: of the codebooks that codes point into, which differ between trainings of one config.
      sample_rate: of the waveform, in Hz.
      channels: of the waveform.
      num_codebooks: of each frame.
      codebook_size: codes are from 0 to codebook_size - 1.
      frame_rate: frames of a second, in Hz (within a segment, where there are segments).
      chunk_frames: frames of every chunk but the last, which may have fewer.
      chunk_samples: samples from the start of a chunk to the start of the next.
      chunk_segments: segments with a scale in every chunk but the last; 0 where the codec scales nothing. The last two
        segments of a recording may be shorter, so that the last two chunks may have fewer frames.
      entropy: name of the entropy coder's model, None without one.
      entropy_hash: first digits of the hash of the entropy coder's model, None without one.
      num_samples: of the waveform, per channel; None where the writer did not come to its end.
      num_chunks: None likewise.
    """

    codec: str
    config_hash: str
    codebooks_hash: str
    sample_rate: int
    channels: int
    num_codebooks: int
    codebook_size: int
    frame_rate: float
    chunk_frames: int
    chunk_samples: int
    chunk_segments: int = 0
    entropy: str | None = None
    entropy_hash: str | None = None
    num_samples: int | None = None
    num_chunks: int | None = None

    @property
    def code_bits(self) -> int:
        """Bits of one plain code."""
        return (self.codebook_size - 1).bit_length()

    @property
    def kbps(self) -> float:
        """Plain bits of the codes, in kbit/s."""
        return self.num_codebooks * self.code_bits * self.frame_rate / 1000

    def payload_bytes(self, num_frames: int) -> int:
        """Of that many plain frames."""
        return math.ceil(num_frames * self.num_codebooks * self.code_bits / 8)


_DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(CodecHeader) if field.default is not dataclasses.MISSING
}
_KNOWN = {field.name for field in dataclasses.fields(CodecHeader)}


def check_header(header: CodecHeader) -> None:
    """Refuses a header that says what cannot be, before anything of the size that it says is allocated.

    Raises:
      CodecFileError: has the field, its value and what was expected.
    """
    fields = vars(header)
    _check_fields(fields)
    if header.payload_bytes(header.chunk_frames) > MAX_PAYLOAD:
        raise CodecFileError(
            f"the header has chunks of {header.chunk_frames} frames of {header.num_codebooks} codebooks of "
            f"{header.codebook_size}; expected at most {MAX_PAYLOAD} bytes"
        )
    if (header.entropy is None) != (header.entropy_hash is None):
        raise CodecFileError(f"the header's entropy is {header.entropy!r} with the hash {header.entropy_hash!r}")
    num_chunks = None if header.num_samples is None else math.ceil(header.num_samples / header.chunk_samples)
    if header.num_chunks != num_chunks:
        raise CodecFileError(
            f"the header's num_chunks is {header.num_chunks}; expected {num_chunks} for {header.num_samples} samples, "
            f"{header.chunk_samples} in a chunk"
        )


def _check_fields(fields: dict[str, Any]) -> None:
    """Each by itself."""
    for name in ("codec", "config_hash", "codebooks_hash", "entropy", "entropy_hash"):
        value = fields[name]
        is_absent = value is None and name.startswith("entropy")
        if not is_absent and not (isinstance(value, str) and 0 < len(value) <= 200):
            raise CodecFileError(f"the header's {name} is {value!r:.100}; expected a text of 1 to 200 characters")
    for name, (least, most) in _RANGES.items():
        value = fields[name]
        is_absent = value is None and name in ("num_samples", "num_chunks")
        if not is_absent and not (type(value) is int and least <= value <= most):
            raise CodecFileError(f"the header's {name} is {value!r:.100}; expected an integer from {least} to {most}")
    rate = fields["frame_rate"]
    if type(rate) is not float or not 0 < rate < 1e6:
        raise CodecFileError(f"the header's frame_rate is {rate!r:.100}; expected a number of Hz")


def header_bytes(header: CodecHeader) -> bytes:
    """The header as it stands in a file; its length does not depend on num_samples and num_chunks."""
    longest = dataclasses.replace(header, num_samples=MAX_SAMPLES, num_chunks=MAX_SAMPLES)
    text = _to_json(header).ljust(len(_to_json(longest)))
    record = _FIXED.pack(_MAGIC, _VERSION, len(text)) + text
    return record + _CRC.pack(zlib.crc32(record))


def _to_json(header: CodecHeader) -> bytes:
    fields = {name: value for name, value in dataclasses.asdict(header).items() if value is not None}
    return json.dumps(fields, separators=(",", ":")).encode("ascii")


def read_header(data: bytes | mmap.mmap) -> tuple[CodecHeader, bool]:
    """The header of a file, from whichever of its two copies is whole; and whether both are.

    Raises:
      CodecFileError: there is none, both are damaged, or it says what cannot be.
    """
    first, last = data.find(_MAGIC), data.rfind(_MAGIC)
    if first < 0:
        raise CodecFileError(
            f"is no .jac file, or both copies of its header are gone: it begins with {data[:16]!r}, not with {_MAGIC!r}"
        )
    texts = [text for text in (_text(data, first), _text(data, last)) if text is not None]
    if not texts:
        raise CodecFileError("both copies of its header are damaged, without which codes mean nothing; copy it again")
    try:
        fields = json.loads(texts[0])
    except (ValueError, RecursionError) as error:
        raise CodecFileError(f"its header is not JSON: {error}") from error
    if not isinstance(fields, dict) or not _KNOWN - set(_DEFAULTS) <= set(fields) <= _KNOWN:
        raise CodecFileError(f"its header is {fields!r:.200}; expected the fields {sorted(_KNOWN)}")
    _check_fields(_DEFAULTS | fields)
    header = CodecHeader(**fields)
    check_header(header)
    return header, header.num_chunks is None or (first == 0 and first < last and len(texts) == 2)


def _text(data: bytes | mmap.mmap, at: int) -> bytes | None:
    """The JSON of the header there, None if it is damaged."""
    fixed = data[at : at + _FIXED.size]
    if len(fixed) < _FIXED.size:
        return None
    _, version, length = _FIXED.unpack(fixed)
    end = at + _FIXED.size + length
    if data[end : end + _CRC.size] != _CRC.pack(zlib.crc32(data[at:end])):
        return None
    if version != _VERSION:
        raise CodecFileError(f"is a .jac file of version {version}; this jaxaudio reads version {_VERSION}")
    return data[at + _FIXED.size : end]
