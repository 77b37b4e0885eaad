"""Recordings to .jac files and back, in the memory of some seconds whatever their length."""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import flax.traverse_util
import numpy as np

from jaxaudio.data.audio import read_blocks
from jaxaudio.data.codec_files import (
    CHUNK_S,
    Chunk,
    CodecFile,
    CodecFileError,
    CodecHeader,
    CodecWriter,
    EntropyCoder,
    LostChunks,
    open_codec_file,
)
from jaxaudio.data.files import atomic_path
from jaxaudio.generate.codec import Codec
from jaxaudio.generate.codec_segments import BATCH_SIZE as SEGMENTS
from jaxaudio.generate.sample_queue import SampleQueue
from jaxaudio.nn.codec import CodecConfig

SUFFIXES = (".wav", ".flac")
_MAX_WAV = (1 << 32) - 4096  # bytes that the sizes in a wav file can count
_SILENCE = 1 << 16  # samples that are written at a time


@dataclasses.dataclass(frozen=True)
class Compressed:
    """What `encode_file` wrote.

    Attributes:
      header: of the file.
      num_bytes: of the file.
      kbps: all of the file, in kbit/s.
    """

    header: CodecHeader
    num_bytes: int
    kbps: float


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `decode_file` wrote.

    Attributes:
      header: of the .jac file.
      notes: what is wrong with the .jac file beside lost chunks, in sentences.
      lost: what could not be read of it and is silence now.
      num_clipped: samples beyond full scale, which 16 bits do not hold.
    """

    header: CodecHeader
    notes: tuple[str, ...]
    lost: tuple[LostChunks, ...]
    num_clipped: int


def file_header(codec: Codec, num_codebooks: int, chunk_size: int | None = None) -> CodecHeader:
    """The header of files of a codec, without what is only known at their end.

    Args:
      codec: of the codes.
      num_codebooks: of each frame.
      chunk_size: segments of a chunk, frames where there are no segments; by default about `CHUNK_S`.
    """
    config = codec.config
    if config.segment_length is None:
        segments, frames = 0, chunk_size or round(CHUNK_S * config.frame_rate)
        samples = frames * config.hop_length
    else:
        segments = chunk_size or SEGMENTS
        frames = segments * math.ceil(config.segment_length / config.hop_length)
        samples = segments * config.segment_stride
    return CodecHeader(
        codec=codec.name,
        config_hash=codec.config_hash[:16],
        codebooks_hash=_codebooks_hash(codec),
        sample_rate=config.sample_rate,
        channels=config.channels,
        num_codebooks=num_codebooks,
        codebook_size=config.codebook_size,
        frame_rate=float(config.frame_rate),
        chunk_frames=frames,
        chunk_samples=samples,
        chunk_segments=segments,
    )


@functools.lru_cache(maxsize=1)
def _codebooks_hash(codec: Codec) -> str:
    """Of the codebooks that codes point into: of two trainings of one config they differ."""
    digest = hashlib.sha256()
    for path, array in sorted(flax.traverse_util.flatten_dict(codec.params, sep="/").items()):
        if path.endswith("/codebooks"):
            digest.update(np.asarray(array, "<f4").tobytes())
    return digest.hexdigest()[:16]


def check_codec(codec: Codec, header: CodecHeader, name: str) -> None:
    """Refuses to decode a file with another codec than its own.

    Raises:
      CodecFileError: it is of another codec (has the names and hashes of both), or its header says of its codec what is
        not so (has the values); begins with `name`.
    """
    ours = file_header(codec, header.num_codebooks, header.chunk_segments or header.chunk_frames)
    if (header.config_hash, header.codebooks_hash) != (ours.config_hash, ours.codebooks_hash):
        another = "another training of " if header.config_hash == ours.config_hash else ""
        raise CodecFileError(
            f"{name}: was encoded with the codec {header.codec} (config {header.config_hash}, codebooks "
            f"{header.codebooks_hash}), but {another}{ours.codec} (config {ours.config_hash}, codebooks "
            f"{ours.codebooks_hash}) is given"
        )
    _check_codebooks(codec, header.num_codebooks, f"in {name}")
    fields = [field.name for field in dataclasses.fields(ours) if getattr(ours, field.name) is not None]
    wrong = [field for field in fields if field != "codec" and getattr(header, field) != getattr(ours, field)]
    if wrong:
        values = ", ".join(f"{field} {getattr(header, field)}; expected {getattr(ours, field)}" for field in wrong)
        raise CodecFileError(f"{name}: its header has {values} for {ours.codec}")


def encode_file(
    codec: Codec,
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    num_codebooks: int,
    coder: EntropyCoder | None = None,
    overwrite: bool = False,
    progress: Callable[[float], None] = lambda seconds: None,
) -> Compressed:
    """Encodes an audio file into a .jac file, which appears whole or not at all.

    Args:
      codec: to encode with.
      source: read as `data.audio.read_blocks` does, at the codec's rate and channels.
      destination: .jac file to write.
      num_codebooks: of each frame.
      coder: makes the codes shorter; decoding needs the same one.
      overwrite: whether a file at the destination is replaced.
      progress: told the seconds of audio of each step.
    Raises:
      AudioError: the recording cannot be read, or has channels that the codec has not; see `read_blocks`.
      FileExistsError: there is a file at the destination.
      ValueError: the codec has no so many codebooks; has both numbers.
    """
    config, num_samples = codec.config, 0
    _check_codebooks(codec, num_codebooks, "asked for")
    _check_absent(destination, overwrite)

    def blocks() -> Iterator[np.ndarray]:
        nonlocal num_samples
        for block in read_blocks(source, config.sample_rate, block_s=CHUNK_S, channels=config.channels):
            num_samples += len(block)
            yield block
            progress(len(block) / config.sample_rate)

    with atomic_path(destination) as temporary, temporary.open("wb") as file:
        header = file_header(codec, num_codebooks)
        writer = CodecWriter(file, header, coder)
        for codes, scales in _chunked(codec.encode_blocks(blocks(), num_codebooks=num_codebooks), header):
            writer.add(codes, scales)
        header = writer.finish(num_samples)
        num_bytes = file.seek(0, os.SEEK_END)
    return Compressed(header, num_bytes, num_bytes * 8 / 1000 * config.sample_rate / num_samples)


def _chunked(
    pieces: Iterable[tuple[np.ndarray, np.ndarray | None]], header: CodecHeader
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """What `Codec.encode_blocks` gives, as the chunks of a file; segments come as many at a time as a chunk has."""
    if header.chunk_segments:
        yield from pieces
        return
    frames = SampleQueue(codes.T for codes, _ in pieces)
    while frames.has(1):
        yield frames.take(header.chunk_frames).T, None


def decode_file(
    codec: Codec,
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    coder: EntropyCoder | None = None,
    overwrite: bool = False,
    progress: Callable[[float], None] = lambda seconds: None,
) -> Restored:
    """Decodes a .jac file into a wav or flac file of 16 bits, which appears whole or not at all.

    What cannot be read is silence of the same length; the model starts anew after it.

    Args:
      codec: that the file was encoded with.
      source: .jac file.
      destination: file to write; its suffix, .wav or .flac, is its format.
      coder: entropy coder of the file, if it has one.
      overwrite: whether a file at the destination is replaced.
      progress: told the seconds of audio of each step.
    Raises:
      CodecFileError: the file is of another codec (has the names of both), or cannot be read; see
        `data.codec_files.open_codec_file`.
      FileExistsError: there is a file at the destination.
      ValueError: the destination has another suffix, or is a .wav and would not hold so much.
    """
    destination = pathlib.Path(destination)
    if destination.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{destination}: expected a name that ends in {' or '.join(SUFFIXES)}")
    _check_absent(destination, overwrite)
    with open_codec_file(source) as file:
        header, num_clipped, num_written = file.header, 0, 0
        check_codec(codec, header, file.name)
        if destination.suffix.lower() == ".wav" and header.num_samples * header.channels * 2 > _MAX_WAV:
            raise ValueError(
                f"{destination}: {header.num_samples / header.sample_rate:.0f} s are too much for a .wav; name a .flac"
            )
        with atomic_path(destination) as temporary, _open_audio(temporary, header) as audio:
            for waveform in _waveforms(codec, file, coder):
                waveform = waveform[: header.num_samples - num_written]
                scaled = np.rint(waveform * 32768)
                num_clipped += int(np.count_nonzero(np.abs(waveform) > 1))
                audio.write(np.clip(scaled, -32768, 32767).astype(np.int16))
                num_written += len(waveform)
                progress(len(waveform) / header.sample_rate)
        return Restored(header, file.notes, file.lost, num_clipped)


def _open_audio(path: pathlib.Path, header: CodecHeader):
    import soundfile

    return soundfile.SoundFile(path, "w", header.sample_rate, header.channels, "PCM_16")


def _waveforms(codec: Codec, file: CodecFile, coder: EntropyCoder | None) -> Iterator[np.ndarray]:
    """The waveform (A, channels) in pieces; silence for chunks that are lost."""
    header, chunks, first = file.header, file.chunks(coder), 0
    if header.chunk_segments:
        pieces = itertools.chain.from_iterable(_pieces(codec.config, header, part) for part in chunks)
        yield from codec.decode_blocks(pieces, header.num_samples)
        return
    for lost in [*file.lost, None]:
        end = header.num_chunks if lost is None else lost.first
        if end > first:
            run = ((chunk.codes, None) for chunk in itertools.islice(chunks, end - first))
            yield from codec.decode_blocks(run, _num_samples(header, first, end))
        if lost is not None:
            next(chunks)
            first = lost.last + 1
            num_samples = _num_samples(header, lost.first, first)
            for start in range(0, num_samples, _SILENCE):
                yield np.zeros((min(_SILENCE, num_samples - start), header.channels), np.float32)


def _num_samples(header: CodecHeader, first: int, end: int) -> int:
    """Of the chunks from `first` on, before `end`."""
    return min(end * header.chunk_samples, header.num_samples) - first * header.chunk_samples


def _pieces(
    config: CodecConfig, header: CodecHeader, part: Chunk | LostChunks
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes and scales of chunks with segments; those of lost chunks have the scale 0, which is silence."""
    if isinstance(part, Chunk):
        yield part.codes, part.scales
        return
    for index in range(part.first, part.last + 1):
        starts = np.arange(header.chunk_segments) * config.segment_stride + index * header.chunk_samples
        lengths = np.minimum(config.segment_length, header.num_samples - starts[starts < header.num_samples])
        num_frames = int(np.ceil(lengths / config.hop_length).sum())
        yield np.zeros((header.num_codebooks, num_frames), np.int32), np.zeros(len(lengths), np.float32)


def _check_codebooks(codec: Codec, num_codebooks: int, where: str) -> None:
    most = codec.config.num_codebooks
    if not 1 <= num_codebooks <= most:
        raise ValueError(f"{num_codebooks} codebooks {where}, but {codec.name} has 1 to {most}")


def _check_absent(path: str | os.PathLike, overwrite: bool) -> None:
    if not overwrite and os.path.exists(path):
        raise FileExistsError(f"{os.fspath(path)} exists; name another file, or give --overwrite")
