"""The two decoders behind `jaxaudio.data.audio`: libsndfile through soundfile, FFmpeg through PyAV.

Both are held to the length that the file promises, because both return what is left of a damaged file without a word.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av
    import soundfile

_CHUNK = 1 << 14  # samples per channel that libsndfile decodes at a time
# AAC, MP3 and Opus add a few frames of priming and padding, which containers count in different ways.
_LOSSY_TOLERANCE_S = 0.1
_MALFORMED = 3  # libsndfile's code for a format that it knows and a file that breaks it
_UNKNOWN_LENGTH = (1 << 63) - 1  # libsndfile's frame count where a FLAC header leaves it open


class AudioError(ValueError):
    """An audio file that cannot be read; the message names the file, what is wrong with it and what to do."""


@dataclasses.dataclass(frozen=True)
class AudioInfo:
    """The facts of an audio file.

    Attributes:
      path: As it was given.
      container: libsndfile's or FFmpeg's name of the file format, in lower case ("wav", "mov,mp4,m4a,3gp,3g2,mj2").
      codec: libsndfile's subtype or FFmpeg's codec, in lower case ("pcm_16", "vorbis", "aac").
      num_channels: Before the down-mix.
      bit_depth: Bits of one sample; None for lossy codecs, and where FFmpeg does not tell 24 from 32 bits.
      sample_rate: Of the file, in Hz.
      num_samples: Per channel. Exact for what libsndfile reads; the header's duration, exact to a frame of the codec,
        for mp4 and Matroska; counted by decoding where no header has it.
      duration_s: num_samples / sample_rate.
    """

    path: str
    container: str
    codec: str
    num_channels: int
    bit_depth: int | None
    sample_rate: int
    num_samples: int
    duration_s: float


@dataclasses.dataclass(frozen=True)
class Source:
    """An open file.

    Attributes:
      info: Its facts; num_samples and duration_s are 0 where promised_s is None.
      promised_s: Seconds by the header; None where there is no header to trust.
      full_scale: Largest positive sample of its format; 1.0 for floating-point and lossy ones.
      chunks: Iterator of decoded samples (A, channels), float32, at the file's rate. Its end is checked: it raises
        AudioError for a file without samples, for one cut short and for one that stops being decodable.
    """

    info: AudioInfo
    promised_s: float | None
    full_scale: float
    chunks: Iterator[np.ndarray]


@contextlib.contextmanager
def open_audio(path: str | os.PathLike) -> Iterator[Source]:
    """Opens a file with soundfile, or with PyAV where soundfile cannot read it or would not read all of it.

    Raises:
      AudioError: See `jaxaudio.data.audio.read_blocks`.
    """
    import soundfile

    head = _check_is_file(path)
    try:
        file = soundfile.SoundFile(os.fspath(path))
    # TypeError: soundfile asks for the sample rate of whatever is called .raw; FFmpeg looks inside.
    except (soundfile.LibsndfileError, TypeError) as error:
        file, reason = None, str(error)
        if getattr(error, "code", None) == _MALFORMED:  # FFmpeg would return what is left of it
            raise AudioError(f"{path}: is damaged or cut short ({reason}); copy or record it again.") from error
    if file is not None:
        with file:
            reason = _why_incomplete(file, path)
            if reason is None:
                yield _soundfile_source(file, path)
                return
    try:
        import av
    except ImportError as error:
        raise AudioError(
            f"{path}: soundfile does not read it ({reason}). PyAV may: pip install 'jaxaudio[media]' (the package "
            f"av). It reads m4a, mp4, webm and more; this file begins with {head!r}."
        ) from error
    try:
        # Absolute, so that no colon in a name passes for a protocol; and a playlist must not fetch from elsewhere.
        container = av.open(str(pathlib.Path(path).absolute()), options={"protocol_whitelist": "file"})
    except av.FFmpegError as error:
        hint = " An mp4 or m4a that was cut short has lost its index." if head[4:8] == b"ftyp" else ""
        raise AudioError(
            f"{path}: neither soundfile ({reason}) nor PyAV ({error.strerror}) finds audio in it; it begins with "
            f"{head!r}.{hint} Expected an audio file, such as wav, flac, ogg, mp3 or m4a."
        ) from error
    with container:
        yield _av_source(container, path, head)


def _check_is_file(path: str | os.PathLike) -> bytes:
    """The first bytes of a file that is one."""
    if os.path.isdir(path):
        raise AudioError(f"{path}: is a folder; expected an audio file. Name the files in it.")
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except FileNotFoundError as error:
        raise AudioError(f"{path}: there is no such file; expected an audio file. Check the name.") from error
    if not head:
        raise AudioError(f"{path}: is empty (0 bytes); expected an audio file. Copy or record it again.")
    return head


def _checked(
    timed_chunks: Iterator[tuple[np.ndarray, float]],
    info: AudioInfo,
    promised_s: float | None,
    tolerance_s: float,
    errors: tuple[type[Exception], ...],
) -> Iterator[np.ndarray]:
    """The chunks of pairs (samples, second where they end), then an AudioError unless the promised end was reached."""
    end_s = None
    expected = "audio of unknown length" if promised_s is None else f"{promised_s:.3f} s"
    try:
        for chunk, chunk_end_s in timed_chunks:
            end_s = chunk_end_s
            yield chunk
    except errors as error:
        reason = getattr(error, "strerror", None) or error  # FFmpeg's errors also print a number
        raise AudioError(
            f"{info.path}: decoding stopped after {end_s or 0.0:.3f} s; expected {expected}. The file is damaged or "
            f"cut short ({reason}); copy or record it again."
        ) from error
    if end_s is None:
        raise AudioError(f"{info.path}: has a header but no samples; expected some. Record or export it again.")
    if promised_s is not None and promised_s - end_s > tolerance_s:
        raise AudioError(
            f"{info.path}: is cut short: the header promises {promised_s:.3f} s and {end_s:.3f} s were decoded. Copy "
            "or record it again, or convert what is left to another file."
        )


def _full_scale(bits: int) -> float:
    return 1.0 - 2.0 ** (1 - bits)


# libsndfile


def _soundfile_source(file: "soundfile.SoundFile", path: str | os.PathLike) -> Source:
    import soundfile

    bits = re.fullmatch(r"(?:PCM|ALAC|DWVW)_[SU]?(\d+)", file.subtype)
    float_bits = {"FLOAT": 32, "DOUBLE": 64}.get(file.subtype)
    info = AudioInfo(
        path=os.fspath(path),
        container=file.format.lower(),
        codec=file.subtype.lower(),
        num_channels=file.channels,
        bit_depth=int(bits[1]) if bits else float_bits,
        sample_rate=file.samplerate,
        num_samples=file.frames,
        duration_s=file.frames / file.samplerate,
    )
    promised_s = _promised_samples(file, info.bit_depth) / file.samplerate
    tolerance_s = _LOSSY_TOLERANCE_S if file.subtype.startswith("MPEG") else 0.0
    return Source(
        info=info,
        promised_s=promised_s,
        full_scale=_full_scale(int(bits[1])) if bits else 1.0,
        chunks=_checked(_soundfile_chunks(file), info, promised_s, tolerance_s, (soundfile.LibsndfileError,)),
    )


def _soundfile_chunks(file: "soundfile.SoundFile") -> Iterator[tuple[np.ndarray, float]]:
    num_samples = 0
    while len(chunk := file.read(_CHUNK, dtype="float32", always_2d=True)):
        num_samples += len(chunk)
        yield chunk, num_samples / file.samplerate


def _promised_samples(file: "soundfile.SoundFile", bit_depth: int | None) -> int:
    """Samples per channel by the header; libsndfile corrects sizes beyond the end of the file and only logs it."""
    log = re.search(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", file.extra_info, re.M)
    if log is None:
        return file.frames
    declared, actual = int(log[1]), int(log[2])
    # Programs that write to a pipe put the largest number here: the length is not known, nothing is promised.
    is_open = 0x7FFFF000 <= declared <= 0x7FFFFFFF or 0xFFFFF000 <= declared <= 0xFFFFFFFF
    if is_open or declared <= actual or not actual:
        return file.frames
    return declared * 8 // (bit_depth * file.channels) if bit_depth else file.frames * declared // actual


def _why_incomplete(file: "soundfile.SoundFile", path: str | os.PathLike) -> str | None:
    """Why libsndfile would stop before the end of the audio and call it complete; None where it does not."""
    if file.format == "FLAC" and file.frames == _UNKNOWN_LENGTH:
        return "its header does not say how long it is"
    if file.subtype.startswith("MPEG") and not _states_mp3_length(path):
        return "no header of this MP3 says how long all of it is, and libsndfile stops where it guesses the end"
    if file.format == "OGG":
        num_streams, is_cut = _walk_ogg(path)
        if is_cut:
            raise AudioError(
                f"{path}: is cut short in the middle of an Ogg page; the pages before it hold "
                f"{file.frames / file.samplerate:.3f} s, and an Ogg file does not say how much it promised. Copy or "
                "record it again, or convert what is left to another file."
            )
        if num_streams > 1:
            return f"it holds {num_streams} Ogg streams and libsndfile reads the first"
    return None


def _states_mp3_length(path: str | os.PathLike) -> bool:
    """Whether a Xing or Info frame counts the frames and bytes, and its bytes reach to the end of the file."""
    with open(path, "rb") as file:
        tag, start = file.read(10), 0
        if tag[:3] == b"ID3":  # its size has seven bits per byte
            start = 10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(tag[6:10]))
        file.seek(start)
        frame = file.read(2048)
        size = os.fstat(file.fileno()).st_size - start
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    has_frames_and_bytes = at >= 0 and frame[at + 7] & 3 == 3
    return has_frames_and_bytes and size <= 1.01 * int.from_bytes(frame[at + 12 : at + 16], "big") + 1024


def _walk_ogg(path: str | os.PathLike) -> tuple[int, bool]:
    """Logical streams of an Ogg file, and whether it ends inside a page without having ended its stream (RFC 3533)."""
    num_streams, has_ended = 0, False
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while header := file.read(27):
            if len(header) < 27 or header[:4] != b"OggS":
                return num_streams, not has_ended
            num_streams += header[5] >> 1 & 1  # begins a stream
            has_ended = bool(header[5] >> 2 & 1)
            end = file.tell() + header[26] + sum(file.read(header[26]))
            if end > size:
                return num_streams, True
            file.seek(end)
    return num_streams, False


# FFmpeg


def _av_source(container: "av.container.InputContainer", path: str | os.PathLike, head: bytes) -> Source:
    import av

    stream = container.streams.best("audio")
    if stream is None:
        kinds = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
        raise AudioError(
            f"{path}: PyAV finds {kinds} in it ({container.format.name}) but no audio; it begins with {head!r}. "
            "Expected an audio file, such as wav, flac, ogg, mp3 or m4a."
        )
    context = stream.codec_context
    if context is None or not context.sample_rate:
        raise AudioError(
            f"{path}: PyAV has no decoder for the audio in this {container.format.name} file; expected a codec that "
            "FFmpeg knows. Convert it to flac or wav with the program that wrote it."
        )
    promised_s = _promised_seconds(container, stream)
    num_samples = round((promised_s or 0.0) * context.sample_rate)
    bit_depth = _av_bit_depth(context)
    info = AudioInfo(
        path=os.fspath(path),
        container=container.format.name,
        codec=context.name,
        num_channels=context.channels,
        bit_depth=bit_depth,
        sample_rate=context.sample_rate,
        num_samples=num_samples,
        duration_s=num_samples / context.sample_rate,
    )
    return Source(
        info=info,
        promised_s=promised_s,
        full_scale=_full_scale(bit_depth) if bit_depth and not context.name.startswith("pcm_f") else 1.0,
        chunks=_checked(_av_chunks(stream, info), info, promised_s, _LOSSY_TOLERANCE_S, (av.FFmpegError,)),
    )


def _promised_seconds(container: "av.container.InputContainer", stream: "av.AudioStream") -> float | None:
    """Seconds by the header of an mp4 or Matroska file; elsewhere FFmpeg estimates them from the bit rate."""
    if not {"mp4", "matroska"} & set(container.format.name.split(",")):
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if "DURATION" in stream.metadata:  # Matroska's durations count from 0, not from the stream's own start
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds) - _start_seconds(stream)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / 1e6 - _start_seconds(stream)
    return None


def _start_seconds(stream: "av.AudioStream") -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _av_bit_depth(context: "av.AudioCodecContext") -> int | None:
    if bits := re.match(r"pcm_[suf](\d+)", context.name):
        return int(bits[1])
    return 16 if context.codec.lossless and context.format.bits == 16 else None


def _av_chunks(stream: "av.AudioStream", info: AudioInfo) -> Iterator[tuple[np.ndarray, float]]:
    start_s, end_s = _start_seconds(stream), 0.0
    for frame in stream.container.decode(stream):
        if (frame.sample_rate, frame.layout.nb_channels) != (info.sample_rate, info.num_channels):
            raise AudioError(
                f"{info.path}: changes from {info.sample_rate} Hz and {info.num_channels} channels to "
                f"{frame.sample_rate} Hz and {frame.layout.nb_channels}; expected one format. Split or convert it."
            )
        samples = frame.to_ndarray()  # planar (channels, A), packed (1, A * channels)
        samples = samples.T if frame.format.is_planar else samples.reshape(-1, info.num_channels)
        # By the file's clock, which runs on where a recording was paused; its samples do not.
        end_s = (end_s if frame.time is None else frame.time - start_s) + frame.samples / info.sample_rate
        yield _to_float(samples), end_s


def _to_float(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.uint8:
        return ((samples.astype(np.int16) - 128) / 128).astype(np.float32)
    scale = -np.iinfo(samples.dtype).min if samples.dtype.kind == "i" else 1
    return (samples / scale).astype(np.float32)
