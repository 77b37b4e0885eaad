"""The .jac file against a slow parser of its own, damaged in every way that a file gets damaged, and for an hour."""

import dataclasses
import io
import json
import math
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from jaxaudio.data.codec_files import (
    Chunk,
    CodecFile,
    CodecFileError,
    CodecHeader,
    CodecWriter,
    LostChunks,
    open_codec_file,
)
from jaxaudio.data.codec_header import DICTIONARY, header_bytes

HEADER = CodecHeader(
    codec="tiny", config_hash="00ff", codebooks_hash="ab", sample_rate=1000, channels=1,
    num_codebooks=3, codebook_size=100, frame_rate=50.0, chunk_frames=8, chunk_samples=160,
)  # fmt: skip


class ZlibCoder:
    name, hash = "zlib", "z1"

    def encode(self, codes):
        return zlib.compress(codes.T.astype(np.uint8).tobytes())

    def decode(self, data, num_codebooks, num_frames):
        codes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(num_frames, num_codebooks)
        return codes.T.astype(np.int32)


def some_codes(num_frames: int, header: CodecHeader = HEADER, seed: int = 0) -> np.ndarray:
    shape = (header.num_codebooks, num_frames)
    return np.random.default_rng(seed).integers(0, header.codebook_size, shape, np.int32)


def write(pieces, num_samples, header=HEADER, coder=None) -> bytes:
    """A file of these (codes, scales)."""
    file = io.BytesIO()
    writer = CodecWriter(file, header, coder)
    for codes, scales in pieces:
        writer.add(codes, scales)
    writer.finish(num_samples)
    return file.getvalue()


def four_chunks() -> tuple[bytes, list[np.ndarray]]:
    """30 frames, 590 samples: chunks of 8, 8, 8 and 6 frames."""
    pieces = np.split(some_codes(30), [8, 16, 24], axis=1)
    return write([(piece, None) for piece in pieces], 590), pieces


def slow_parse(data: bytes) -> tuple[dict, list[tuple[int, list[float], str]]]:
    """JSON, and (frames, scales, payload as a text of bits) of each chunk; every CRC checked bit by bit."""

    def crc(part):
        value = 0xFFFFFFFF
        for byte in part:
            value ^= byte
            for _ in range(8):
                value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        return value ^ 0xFFFFFFFF

    length, num_samples = struct.unpack("<HQ", data[6:16])
    head, at, chunks = data[: 20 + length], 20 + length, []
    assert data[:6] == b"JACF\1\0"
    assert struct.unpack("<I", head[-4:])[0] == crc(head[:-4])
    while data[at : at + 4] == b"\xa9JC\xd7":
        index, frames, scales, size = struct.unpack("<IHHI", data[at + 4 : at + 16])
        assert index == len(chunks)
        end = at + 16 + 4 * scales + size
        assert struct.unpack("<I", data[end : end + 4])[0] == crc(data[at:end])
        values = struct.unpack(f"<{scales}f", data[at + 16 : at + 16 + 4 * scales])
        chunks.append((frames, list(values), "".join(f"{byte:08b}" for byte in data[end - size : end])))
        at = end + 4
    assert data[at:] == head
    text = zlib.decompressobj(-15, zdict=DICTIONARY).decompress(head[16:-4])
    return json.loads(text) | {"num_samples": num_samples}, chunks


@pytest.mark.parametrize("codebook_size", [2, 100, 1024, 2048, 65537])
def test_the_layout_is_what_a_slow_parser_reads(codebook_size):
    header = dataclasses.replace(HEADER, codebook_size=codebook_size)
    pieces = np.split(some_codes(21, header), [8, 16], axis=1)
    pieces[0][0, 0], pieces[2][2, 4] = codebook_size - 1, 0
    fields, chunks = slow_parse(write([(piece, None) for piece in pieces], 419, header))
    assert fields == {
        name: value
        for name, value in dataclasses.asdict(header).items() | {"num_samples": 419}.items()
        if value is not None
    }
    bits = math.ceil(math.log2(codebook_size))
    assert header.kbps == pytest.approx(3 * 50 * bits / 1000)
    for piece, (frames, scales, text) in zip(pieces, chunks, strict=True):
        assert (frames, scales) == (piece.shape[1], [])
        expected = "".join(f"{code:0{bits}b}" for frame in piece.T for code in frame)
        assert text.rstrip("0") == expected.rstrip("0")
        assert 0 <= len(text) - len(expected) < 8


def test_a_chunk_costs_20_bytes_and_a_header_under_110():
    data, pieces = four_chunks()
    payload = sum(math.ceil(piece.size * 7 / 8) for piece in pieces)
    head = len(header_bytes(HEADER))
    assert len(data) == payload + 4 * 20 + 2 * head
    assert head < 110


@pytest.mark.parametrize("coder", [None, ZlibCoder()])
def test_round_trip(coder, tmp_path):
    pieces = [(np.zeros((3, 8), np.int32), None), (some_codes(8), None), (some_codes(1), None)]
    (tmp_path / "a.jac").write_bytes(write(pieces, 321, coder=coder))
    with open_codec_file(tmp_path / "a.jac") as file:
        assert (file.notes, file.lost) == ((), ())
        assert file.header == dataclasses.replace(
            HEADER, num_samples=321, entropy=coder and "zlib", entropy_hash=coder and "z1"
        )
        for index, (chunk, (codes, _)) in enumerate(zip(file.chunks(coder), pieces, strict=True)):
            assert chunk.index == index
            assert chunk.scales is None
            np.testing.assert_array_equal(chunk.codes, codes, strict=True)


def test_an_entropy_coder_never_makes_a_file_longer():
    noise, zeros = [(some_codes(8), None)], [(np.zeros((3, 80), np.int32), None)]
    header = dataclasses.replace(HEADER, chunk_frames=80, chunk_samples=1600)
    names = len(header_bytes(dataclasses.replace(HEADER, entropy="zlib", entropy_hash="z1"))) - len(
        header_bytes(HEADER)
    )
    assert len(write(noise, 160, coder=ZlibCoder())) == len(write(noise, 160)) + 2 * names
    assert len(write(zeros, 1600, header, ZlibCoder())) < len(write(zeros, 1600, header)) - 100


def test_segments_keep_their_scales():
    header = dataclasses.replace(HEADER, chunk_segments=2, chunk_frames=10, chunk_samples=198)
    pieces = [
        (some_codes(10), np.float32([0.1, 2.0])),
        (some_codes(9), np.float32([1e-8, 0.5])),
        (some_codes(1), np.float32([3.0])),
    ]
    data = write(pieces, 400, header)
    for chunk, (codes, scales) in zip(CodecFile(data, "a").chunks(), pieces, strict=True):
        np.testing.assert_array_equal(chunk.codes, codes, strict=True)
        np.testing.assert_array_equal(chunk.scales, scales, strict=True)
    file = CodecFile(damage(data, 1, header=header), "a")
    assert [(part.first, part.start_s, part.end_s) for part in file.lost] == [(1, 0.198, 0.396)]


def test_an_hour_is_written_and_read_in_the_memory_of_a_chunk(tmp_path):
    header = dataclasses.replace(HEADER, num_codebooks=8, codebook_size=1024, chunk_frames=375, chunk_samples=120_000)
    header = dataclasses.replace(header, sample_rate=24_000, frame_rate=75.0)
    codes = some_codes(375, header)
    tracemalloc.start()
    with (tmp_path / "hour.jac").open("wb") as stream:
        writer = CodecWriter(stream, header)
        for _ in range(720):
            writer.add(codes)
        writer.finish(720 * 120_000)
    with open_codec_file(tmp_path / "hour.jac") as file:
        num_chunks = sum(np.array_equal(chunk.codes, codes) for chunk in file.chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_chunks == 720
    assert peak < 2_000_000
    size = (tmp_path / "hour.jac").stat().st_size
    assert size / 3600 / 6000 * 8 < 1.0056  # of 6 kbit/s


# Damage


def record_at(data: bytes, index: int, header: CodecHeader = HEADER) -> slice:
    """Where chunk `index` of an undamaged file is."""
    at = len(header_bytes(header))
    for _ in range(index):
        at += 20 + 4 * struct.unpack_from("<H", data, at + 10)[0] + struct.unpack_from("<I", data, at + 12)[0]
    return slice(
        at, at + 20 + 4 * struct.unpack_from("<H", data, at + 10)[0] + struct.unpack_from("<I", data, at + 12)[0]
    )


def damage(data: bytes, index: int, offset: int = -5, header: CodecHeader = HEADER) -> bytes:
    """A bit of the chunk changed; -5 is its payload's last byte."""
    record = record_at(data, index, header)
    at = record.start + offset if offset >= 0 else record.stop + offset
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def check(data: bytes, lost: list[tuple[int, int]], notes: int = 0, reason: str = "") -> CodecFile:
    """All chunks of `four_chunks` but those are there, in order, and exact."""
    file, pieces = CodecFile(data, "a.jac"), four_chunks()[1]
    assert [(part.first, part.last) for part in file.lost] == lost
    assert len(file.notes) == notes
    expected = 0
    for part in file.chunks():
        if isinstance(part, LostChunks):
            assert part.first == expected
            assert re.search(reason, part.reason)
            assert (part.start_s, part.end_s) == (part.first * 0.16, min((part.last + 1) * 0.16, 0.59))
            expected = part.last + 1
        else:
            assert isinstance(part, Chunk)
            assert part.index == expected
            np.testing.assert_array_equal(part.codes, pieces[part.index], strict=True)
            expected += 1
    assert expected == 4
    return file


@pytest.mark.parametrize("index", range(4))
def test_a_wrong_bit_loses_only_its_chunk(index):
    data, _ = four_chunks()
    record = record_at(data, index)
    for offset in range(record.stop - record.start):
        check(damage(data, index, offset), [(index, index)])
    check(damage(data, index), [(index, index)], reason="its checksum is wrong")
    check(damage(data, index, 1), [(index, index)], reason="damaged where it begins")


def test_missing_added_and_exchanged_bytes_lose_only_their_chunks():
    data, _ = four_chunks()
    first, second, third = (record_at(data, index) for index in range(3))
    for at in (second.start, second.start + 6, second.start + 20, second.stop - 1):
        check(data[:at] + data[at + 1 :], [(1, 1)])
        check(data[:at] + b"\0" + data[at:], [(1, 1)] if at > second.start else [])
    check(data[: first.start + 9] + data[second.start + 9 :], [(0, 1)])
    check(data[: first.start] + data[third.start :], [(0, 1)], reason="missing")
    check(damage(damage(data, 0), 3), [(0, 0), (3, 3)])
    parts = [data[part] for part in (first, second, third)]
    check(data[: first.start] + parts[2] + parts[0] + parts[0] + parts[1] + data[third.stop :], [])


def test_a_truncated_file_keeps_what_came_before():
    data, _ = four_chunks()
    starts = [record_at(data, index).start for index in range(4)] + [record_at(data, 3).stop]
    for length in range(starts[1], len(data)):
        whole = sum(start <= length for start in starts[1:])
        check(data[:length], [(whole, 3)] if whole < 4 else [], notes=1)
    check(data[: starts[2] + 20], [(2, 3)], 1, "the file ends in the middle of it")
    for length in range(starts[0], starts[1]):
        with pytest.raises(CodecFileError, match="a.jac: none of its chunks is whole"):
            CodecFile(data[:length], "a.jac")


def test_either_copy_of_the_header_is_enough():
    data, _ = four_chunks()
    size = record_at(data, 0).start
    for at in range(size):
        check(data[:at] + b"\xff" + data[at + 1 :], [], notes=1)
        check(data[: at - size] + b"\xff" + data[len(data) + at - size + 1 :], [], notes=1)
    check(data[size:], [], notes=1)
    check(b"junk before" + data, [], notes=1)
    both = bytearray(data)
    both[20] ^= 1
    both[20 - size] ^= 1
    with pytest.raises(CodecFileError, match="a.jac: both copies of its header are damaged"):
        CodecFile(bytes(both), "a.jac")


def test_a_file_that_was_not_finished_has_the_length_of_its_chunks():
    file = io.BytesIO()
    writer, pieces = CodecWriter(file, HEADER), four_chunks()[1]
    for piece in pieces:
        writer.add(piece)
    found = CodecFile(file.getvalue(), "a")
    assert (found.header.num_samples, found.header.num_chunks) == (3 * 160 + 120, 4)
    assert found.notes == ("was not written to its end; its length is that of the chunks in it",)
    assert len(list(found.chunks())) == 4
    header = dataclasses.replace(HEADER, chunk_segments=2, chunk_frames=10, chunk_samples=198)
    file = io.BytesIO()
    writer = CodecWriter(file, header)
    writer.add(some_codes(10), np.ones(2, np.float32))
    writer.add(some_codes(5), np.ones(1, np.float32))
    assert CodecFile(file.getvalue(), "a").header.num_samples == 198 + 99


def test_the_entropy_coder_must_be_the_files():
    data = write([(np.zeros((3, 8), np.int32), None)], 160, coder=ZlibCoder())
    with pytest.raises(CodecFileError, match=r"a.jac: .* entropy model zlib \(z1\), but none is given"):
        next(CodecFile(data, "a.jac").chunks())
    other = ZlibCoder()
    other.hash = "z2"
    with pytest.raises(CodecFileError, match=r"zlib \(z1\), but zlib \(z2\) is given"):
        next(CodecFile(data, "a.jac").chunks(other))


def test_chunks_that_were_written_wrong_are_an_error():
    """Their checksum is right, so no damage explains them."""

    class Wrong(ZlibCoder):
        def encode(self, codes):
            return b"abc"

    data = write([(some_codes(8), None)], 160, coder=Wrong())
    coder = ZlibCoder()
    coder.decode = lambda *_: np.full((3, 8), 100, np.int32)
    with pytest.raises(CodecFileError, match="a: chunk 0 was written wrong: codes are from 100 to 100; .* 0 to 99"):
        next(CodecFile(data, "a").chunks(coder))
    plain = bytearray(write([(some_codes(8), None)], 160))
    record = record_at(bytes(plain), 0)
    plain[record.start + 16 : record.stop - 4] = b"\xff" * 21
    plain[record.stop - 4 : record.stop] = struct.pack("<I", zlib.crc32(plain[record.start : record.stop - 4]))
    with pytest.raises(CodecFileError, match="a: chunk 0 was written wrong: codes are from 127 to 127"):
        next(CodecFile(bytes(plain), "a").chunks())


# What is no file, or no header


@pytest.mark.parametrize("content", [b"RIFF1234WAVEfmt ", b"\0", b"JAC", bytes(10_000)])
def test_what_is_no_jac_file_is_refused(content, tmp_path):
    (tmp_path / "x.jac").write_bytes(content)
    message = f"is no .jac file, or both copies of its header are gone: it begins with {content[:16]!r}, not"
    with pytest.raises(CodecFileError, match="x.jac: " + re.escape(message)), open_codec_file(tmp_path / "x.jac"):
        pass


def test_no_file_a_folder_and_an_empty_file_are_refused(tmp_path):
    (tmp_path / "empty.jac").touch()
    for name, message in (("no.jac", "there is no such file"), (".", "is a folder"), ("empty.jac", "is empty")):
        with pytest.raises(CodecFileError, match=message), open_codec_file(tmp_path / name):
            pass


def forged(text: bytes, version: int = 1, num_samples: int = 160) -> bytes:
    """A file with this header, of which the checksums are right, and one chunk."""
    data = write([(some_codes(8), None)], 160)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=DICTIONARY)
    text = deflater.compress(text) + deflater.flush()
    record = b"JACF" + struct.pack("<HHQ", version, len(text), num_samples) + text
    return record + struct.pack("<I", zlib.crc32(record)) + data[record_at(data, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": ""}, "codec is ''; expected a text"),
        ({"codec": 7}, "codec is 7"),
        ({"config_hash": "x" * 201}, "config_hash is 'xxx"),
        ({"sample_rate": 0}, "sample_rate is 0; expected an integer from 1"),
        ({"channels": 65}, "channels is 65"),
        ({"num_codebooks": 0}, "num_codebooks is 0"),
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"frame_rate": math.inf}, "frame_rate is inf"),
        ({"frame_rate": math.nan}, "frame_rate is nan"),
        ({"chunk_frames": 1 << 16}, "chunk_frames is 65536"),
        ({"chunk_frames": 60_000, "num_codebooks": 1000}, "60000 frames of 1000 codebooks of 100; .* 1048576 bytes"),
        ({"chunk_segments": -1}, "chunk_segments is -1"),
        ({"chunk_samples": 0}, "chunk_samples is 0"),
        ({"entropy": "lm"}, "entropy is 'lm' with the hash None"),
        ({"sample_rate": True}, "sample_rate is True"),
        ({"more": 1}, "its header lacks the fields .., and has .'more'.,"),
        ({"frame_rate": None}, "frame_rate is None"),
    ],
)
def test_a_header_that_cannot_be_is_refused(change, message):
    fields = dataclasses.asdict(HEADER) | change
    del fields["num_samples"]
    with pytest.raises(CodecFileError, match=message):
        CodecFile(forged(json.dumps(fields).encode()), "a.jac")


def test_a_length_that_cannot_be_is_refused():
    fields = {name: value for name, value in dataclasses.asdict(HEADER).items() if name != "num_samples"}
    with pytest.raises(CodecFileError, match="a.jac: the header's num_samples is 1152921504606846976; expected an int"):
        CodecFile(forged(json.dumps(fields).encode(), num_samples=1 << 60), "a.jac")
    with pytest.raises(CodecFileError, match="a.jac: its header lacks the fields .., and has .'num_samples'."):
        CodecFile(forged(json.dumps(fields | {"num_samples": 160}).encode()), "a.jac")


@pytest.mark.parametrize("text", [b"[]", b"{}", b"null", b'{"codec":"a"}', b"7"])
def test_json_that_is_no_header_is_refused(text):
    with pytest.raises(CodecFileError, match="a.jac: its header lacks the fields .'channels', 'ch"):
        CodecFile(forged(text), "a.jac")


@pytest.mark.parametrize("text", [b"", b"1" * 5000, b"[" * 5000, b" " * 100_000 + b"{}", b"\xff", b"{"])
def test_a_header_that_is_no_json_is_refused(text):
    with pytest.raises(CodecFileError, match="a.jac: its header is not JSON"):
        CodecFile(forged(text), "a.jac")


def test_a_header_that_is_not_deflated_is_refused():
    record = b"JACF" + struct.pack("<HHQ", 1, 3, 160) + b"\xff\xff\xff"
    with pytest.raises(CodecFileError, match="a.jac: its header is not JSON: Error -3"):
        CodecFile(record + struct.pack("<I", zlib.crc32(record)), "a.jac")


def test_a_later_version_is_named():
    with pytest.raises(CodecFileError, match="a.jac: is a .jac file of version 2; this jaxaudio reads version 1"):
        CodecFile(forged(b"{}", version=2), "a.jac")


def test_beginnings_of_chunks_within_each_other_take_bounded_work():
    """Each of 6000 beginnings promises 900 kB: examined all, that would be 5 GB of checksums."""
    header = dataclasses.replace(HEADER, num_codebooks=16, codebook_size=1 << 16, chunk_frames=28_000)
    header = dataclasses.replace(header, num_samples=1)
    beginning = struct.pack("<4sIHHI", b"\xa9JC\xd7", 0, 28_000, 0, 16 * 2 * 28_000)
    with pytest.raises(CodecFileError, match="more chunks begin in it than it has bytes for"):
        CodecFile(header_bytes(header) + beginning * 60_000, "a.jac")


def test_a_far_index_in_a_file_that_was_not_finished_is_refused():
    header = dataclasses.replace(HEADER, chunk_samples=1 << 31)
    record = struct.pack("<4sIHHI", b"\xa9JC\xd7", 0xFFFFFFFF, 8, 0, 21) + bytes(21)
    data = header_bytes(header) + record + struct.pack("<I", zlib.crc32(record))
    with pytest.raises(CodecFileError, match="its last chunk is 4294967295, at sample 9223372034707292160"):
        CodecFile(data, "a.jac")


# What a writer refuses


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (some_codes(9), None, "9 frames with 0 scales; expected 8 with 0"),
        (some_codes(0), None, "0 frames"),
        (some_codes(8)[:2], None, r"codes are int32 \(2, 8\); expected int32 \(3, 8\)"),
        (some_codes(8).astype(np.int64), None, "codes are int64"),
        (np.full((3, 8), 100, np.int32), None, "codes are from 100 to 100; expected 0 to 99"),
        (np.full((3, 8), -1, np.int32), None, "codes are from -1"),
        (some_codes(8), np.ones(1, np.float32), "8 frames with 1 scales"),
        (some_codes(8), np.float32([np.nan]), r"scales are \[nan\]"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused(codes, scales, message):
    with pytest.raises(CodecFileError, match=f"chunk 0: {message}"):
        CodecWriter(io.BytesIO(), HEADER).add(codes, scales)


def test_a_writer_refuses_a_chunk_after_the_last_and_another_length():
    writer = CodecWriter(io.BytesIO(), HEADER)
    writer.add(some_codes(7))
    with pytest.raises(CodecFileError, match="chunk 1: it comes after one that was shorter"):
        writer.add(some_codes(8))
    with pytest.raises(CodecFileError, match="1 chunks were written; expected 2 of 161 samples, 160 in"):
        writer.finish(161)
    with pytest.raises(CodecFileError, match="num_codebooks is 0"):
        CodecWriter(io.BytesIO(), dataclasses.replace(HEADER, num_codebooks=0))
