"""Reads 110 000 .jac files that were damaged or made up: what was written must come out, or a CodecFileError.

A program of its own, so that it can be stopped if it hangs, and that checked annotations do not slow it down 20 times.
It prints how many files of each example were read with losses, and how many made-up files were read at all.
"""

import dataclasses
import io
import json
import random
import struct
import tracemalloc
import zlib

import numpy as np

from jaxaudio.data.codec_files import Chunk, CodecFile, CodecFileError, CodecHeader, CodecWriter
from jaxaudio.data.codec_header import DICTIONARY, header_bytes

NUM_INPUTS = 110_000
MEASURED = 50  # memory is measured for one input of so many, which takes longer
MAX_PEAK = 400_000  # bytes; the files have under 1500

HEADER = CodecHeader(
    codec="tiny", config_hash="00ff", codebooks_hash="ab", sample_rate=1000, channels=1,
    num_codebooks=2, codebook_size=1000, frame_rate=50.0, chunk_frames=6, chunk_samples=120,
)  # fmt: skip


class Coder:
    name, hash = "zlib", "z1"

    def encode(self, codes):
        return zlib.compress(codes.tobytes())

    def decode(self, data, num_codebooks, num_frames):
        try:
            return np.frombuffer(zlib.decompress(data), np.int32).reshape(num_codebooks, num_frames)
        except zlib.error as error:
            raise ValueError(str(error)) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A valid file: its bytes, the header's, each chunk's, and what is in each chunk."""

    data: bytes
    head: bytes
    records: list[bytes]
    codes: list[np.ndarray]


def example(frames: list[int], segments: int = 0, coder: Coder | None = None) -> Example:
    header = dataclasses.replace(HEADER, chunk_segments=segments)
    if coder is not None:
        header = dataclasses.replace(header, chunk_frames=60, chunk_samples=1200)
    rng, file = np.random.default_rng(len(frames)), io.BytesIO()
    writer = CodecWriter(file, header, coder)
    ends, codes = [file.tell()], []
    for num_frames in frames:
        codes.append(rng.integers(0, 1000, (2, num_frames), np.int32) // (1 if coder is None else 999))
        scales = rng.random(min(segments, num_frames // 3), np.float32) if segments else None
        writer.add(codes[-1], scales)
        ends.append(file.tell())
    last = frames[-1] * header.chunk_samples // header.chunk_frames
    header = writer.finish((len(frames) - 1) * header.chunk_samples + last)
    data = file.getvalue()
    records = [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    return Example(data, header_bytes(header), records, codes)


EXAMPLES = [
    example([6]),
    example([6, 6, 3]),
    example([6, 3], segments=2),
    example([60, 60, 20], coder=Coder()),
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The file with one piece of damage, as disks, networks and text editors do it."""
    out = bytearray(data)
    first, last = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    kind = rng.randrange(10)
    if kind == 0:
        for _ in range(rng.randrange(1, 9)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.randrange(1, 9)):
            out[rng.randrange(len(out))] = rng.choice((0, 255, rng.randrange(256)))
    elif kind == 2:
        del out[first:]
    elif kind == 3:
        del out[:first]
    elif kind == 4:
        del out[first : first + rng.randrange(1, 40)]
    elif kind == 5:
        out[first:first] = rng.randbytes(rng.randrange(1, 40))
    elif kind == 6:
        out[first:first] = out[last : last + rng.randrange(1, 200)]
    elif kind == 7:
        out[first:last] = bytes(last - first) if rng.random() < 0.5 else rng.randbytes(last - first)
    elif kind == 8:
        middle = rng.randrange(first, last + 1)
        out[first:last] = out[middle:last] + out[first:middle]
    else:
        out = bytearray(data.replace(b"\n", b"\r\n") if rng.random() < 0.5 else data.replace(b"\0", b""))
    return bytes(out)


HOSTILE = (
    0, 1, -1, 2, 3, 255, 65_535, 1 << 16, 1 << 31, 1 << 40, 1 << 63, 1e9, 1e-300, float("nan"), float("inf"),
    True, None, "", "x", [], {}, [[0]],
)  # fmt: skip


def forge(data: bytes, head: bytes, rng: random.Random) -> bytes:
    """The file with hostile values in its header, or in the numbers of its chunks, and right checksums for them."""
    if rng.random() < 0.5:
        fields = json.loads(zlib.decompressobj(-15, zdict=DICTIONARY).decompress(head[16:-4]))
        for _ in range(rng.randrange(1, 4)):
            fields[rng.choice([*fields, "entropy", "entropy_hash", "chunk_segments", "new"])] = rng.choice(HOSTILE)
        deflater = zlib.compressobj(1, zlib.DEFLATED, -15, zdict=DICTIONARY)
        text = deflater.compress(json.dumps(fields).encode()) + deflater.flush()
        num_samples = head[8:16] if rng.random() < 0.7 else struct.pack("<Q", rng.choice((0, 1, 1 << 36, 1 << 63)))
        record = head[:6] + struct.pack("<H", len(text)) + num_samples + text
        return record + struct.pack("<I", zlib.crc32(record)) + data[len(head) : -len(head)]
    at = data.find(b"\xa9JC\xd7")
    numbers = list(struct.unpack_from("<IHHI", data, at + 4))
    sizes = (32, 16, 16, 32)
    for place in range(4):
        if rng.random() < 0.4:
            most = (1 << sizes[place]) - 1
            numbers[place] = rng.choice((0, 1, 2, most, most // 2, rng.randrange(200)))
    record = data[at : at + 4] + struct.pack("<IHHI", *numbers) + data[at + 16 : at + 16 + rng.randrange(60)]
    return data[:at] + record + struct.pack("<I", zlib.crc32(record)) + data[at:]


def read(data: bytes) -> dict[int, np.ndarray] | None:
    """The codes of all chunks that the reader gives, None where it refuses the file."""
    try:
        file = CodecFile(data, "a.jac")
        coder = Coder() if file.header.entropy == "zlib" else None
        parts = file.chunks(coder)
        return {part.index: part.codes for _, part in zip(range(10), parts, strict=False) if isinstance(part, Chunk)}
    except CodecFileError:
        return None


def measured_read(data: bytes) -> dict[int, np.ndarray] | None:
    tracemalloc.start()
    found = read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_PEAK, f"{peak} bytes for {data!r}"
    return found


def read_damaged(file: Example, seed: int) -> int:
    """Reads damaged copies of a file; each gives exactly the chunks that are whole. Returns how many lost some."""
    rng, num_with_losses = random.Random(seed), 0
    for number in range(NUM_INPUTS // 5):
        data = mutate(file.data, rng)
        found = measured_read(data) if number % MEASURED == 0 else read(data)
        whole = {index for index, record in enumerate(file.records) if record in data}
        has_header = data.startswith(file.head) or data.endswith(file.head)
        assert found is not None or not has_header or not whole, data
        if found is not None:
            assert set(found) == whole, data
            assert all(np.array_equal(codes, file.codes[index]) for index, codes in found.items()), data
            num_with_losses += len(whole) < len(file.codes)
    return num_with_losses


def read_made_up(seed: int) -> int:
    """Reads forged and random files; returns how many could be read."""
    rng, num_read = random.Random(seed), 0
    for number in range(NUM_INPUTS // 5):
        file = rng.choice(EXAMPLES)
        if number % 4:
            data = forge(file.data, file.head, rng)
        else:
            data = rng.choice((b"", b"JACF\1\0", file.head)) + rng.randbytes(rng.randrange(300))
            data += rng.choice((b"", b"\xa9JC\xd7")) + rng.randbytes(rng.randrange(300))
        num_read += (measured_read(data) if number % MEASURED == 0 else read(data)) is not None
    return num_read


if __name__ == "__main__":
    print(*(read_damaged(file, seed) for seed, file in enumerate(EXAMPLES)), read_made_up(99))
