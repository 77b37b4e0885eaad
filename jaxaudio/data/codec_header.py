"""The header of a .jac file: what its codes mean. See `codec_files` for where it stands. NumPy, no JAX.

b"JACF", version (2 bytes), length of the text (2), num_samples (8; all ones where the writer did not come to its end),
the text, CRC-32 of all that (4), in little-endian. The text is the JSON of the other fields of `CodecHeader` without
those that are None, deflated (RFC 1951) with `DICTIONARY`, which makes it a third as long.
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
_FIXED = struct.Struct("<4sHHQ")
_UNKNOWN = (1 << 64) - 1
_MAX_TEXT = 1 << 14
DICTIONARY = (
    b'{"codec":"encodec_24khz","config_hash":"0123456789abcdef","codebooks_hash":"0123456789abcdef",'
    b'"sample_rate":24000,"channels":1,"num_codebooks":8,"codebook_size":1024,"frame_rate":75.0,"chunk_frames":375,'
    b'"chunk_samples":120000,"chunk_segments":0,"entropy":"encodec_24khz","entropy_hash":"0123456789abcdef"}'
)
"""What version 1 of the format deflates its headers with; another one would be another version."""
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

    @property
    def num_chunks(self) -> int | None:
        """All that the file should have; None where num_samples is."""
        return None if self.num_samples is None else math.ceil(self.num_samples / self.chunk_samples)

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
_NEEDED = {field.name for field in dataclasses.fields(CodecHeader)} - {*_DEFAULTS}


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


def _check_fields(fields: dict[str, Any]) -> None:
    """Each by itself."""
    for name in ("codec", "config_hash", "codebooks_hash", "entropy", "entropy_hash"):
        value = fields[name]
        is_absent = value is None and name.startswith("entropy")
        if not is_absent and not (isinstance(value, str) and 0 < len(value) <= 200):
            raise CodecFileError(f"the header's {name} is {value!r:.100}; expected a text of 1 to 200 characters")
    for name, (least, most) in _RANGES.items():
        value = fields[name]
        is_absent = value is None and name == "num_samples"
        if not is_absent and not (type(value) is int and least <= value <= most):
            raise CodecFileError(f"the header's {name} is {value!r:.100}; expected an integer from {least} to {most}")
    rate = fields["frame_rate"]
    if type(rate) is not float or not 0 < rate < 1e6:
        raise CodecFileError(f"the header's frame_rate is {rate!r:.100}; expected a number of Hz")


def header_bytes(header: CodecHeader) -> bytes:
    """The header as it stands in a file; its length does not depend on num_samples."""
    fields = {name: value for name, value in vars(header).items() if value is not None and name != "num_samples"}
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS, zdict=DICTIONARY)
    text = deflater.compress(json.dumps(fields, separators=(",", ":")).encode("ascii")) + deflater.flush()
    num_samples = _UNKNOWN if header.num_samples is None else header.num_samples
    record = _FIXED.pack(_MAGIC, _VERSION, len(text), num_samples) + text
    return record + _CRC.pack(zlib.crc32(record))


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
    records = [record for record in (_record(data, first), _record(data, last)) if record is not None]
    if not records:
        raise CodecFileError("both copies of its header are damaged, without which codes mean nothing; copy it again")
    num_samples, text = records[0]
    fields = _DEFAULTS | _fields(text) | {"num_samples": None if num_samples == _UNKNOWN else num_samples}
    _check_fields(fields)
    header = CodecHeader(**fields)
    check_header(header)
    return header, num_samples == _UNKNOWN or (first == 0 and first < last and len(records) == 2)


def _record(data: bytes | mmap.mmap, at: int) -> tuple[int, bytes] | None:
    """num_samples and the text of the header there, None if it is damaged."""
    fixed = data[at : at + _FIXED.size]
    if len(fixed) < _FIXED.size:
        return None
    _, version, length, num_samples = _FIXED.unpack(fixed)
    end = at + _FIXED.size + length
    if data[end : end + _CRC.size] != _CRC.pack(zlib.crc32(data[at:end])):
        return None
    if version != _VERSION:
        raise CodecFileError(f"is a .jac file of version {version}; this jaxaudio reads version {_VERSION}")
    return num_samples, data[at + _FIXED.size : end]


def _fields(text: bytes) -> dict[str, Any]:
    """The fields that a header's text has, any values."""
    try:
        inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS, zdict=DICTIONARY)
        fields = json.loads(inflater.decompress(text, _MAX_TEXT))
    except (zlib.error, ValueError, RecursionError) as error:
        raise CodecFileError(f"its header is not JSON: {error}") from error
    names = set(fields) if isinstance(fields, dict) else set()
    missing, unknown = _NEEDED - names, names - _NEEDED - (_DEFAULTS.keys() - {"num_samples"})
    if missing or unknown:
        raise CodecFileError(
            f"its header lacks the fields {sorted(missing)}, and has {sorted(unknown)!r:.200}, which no header has"
        )
    return fields
