"""Containers of FFmpeg, and files that do not hold what they promise."""

import pathlib
import struct
import sys

import av
import numpy as np
import pytest
import soundfile

from jaxaudio.data.audio import AudioError, audio_info, load_audio, read_blocks, scan
from jaxaudio.data.decoders import open_audio

RATE = 48000


def _tone(duration_s=2.0, rate=RATE, channels=1):
    times = np.arange(round(duration_s * rate))[:, None] / rate
    return (0.3 * np.sin(2 * np.pi * (220 * times + np.arange(channels) / 5))).astype(np.float32)


def _encode(path, codec, waveform, *, sample_format="fltp", video=False, rate=RATE, bit_rate=None, **options):
    layout = {1: "mono", 2: "stereo"}[waveform.shape[1]]
    samples = waveform if sample_format.startswith("flt") else np.round(waveform * 32767).astype(np.int16)
    samples = samples.T if sample_format.endswith("p") else samples.reshape(1, -1)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=sample_format, layout=layout)
        frame.sample_rate = rate
        packets = stream.encode(frame) + stream.encode(None)
        if video:
            _add_pictures(container, len(waveform) * 10 // rate + 20)  # two seconds longer than the sound
        container.mux(packets)
    return path


def _add_pictures(container, count):
    stream = container.add_stream("mpeg4", rate=10)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    for _ in range(count):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), format="yuv420p")))
    container.mux(stream.encode(None))


def _cut(path, share=0.6):
    content = path.read_bytes()
    cut = path.with_stem(path.stem + "_cut")
    cut.write_bytes(content[: int(len(content) * share)])
    return cut


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "container", "bit_depth", "tolerance", "options"),
    [
        ("a.m4a", "aac", "fltp", "mov,mp4,m4a,3gp,3g2,mj2", None, 0.03, {}),
        ("video.mp4", "aac", "fltp", "mov,mp4,m4a,3gp,3g2,mj2", None, 0.03, {"video": True}),
        ("a.mov", "pcm_s16le", "s16", "mov,mp4,m4a,3gp,3g2,mj2", 16, 1e-4, {}),
        ("a.webm", "libopus", "flt", "matroska,webm", None, 0.03, {}),
        ("live.webm", "libopus", "flt", "matroska,webm", None, 0.03, {"live": "1"}),
        ("video.mkv", "pcm_s16le", "s16", "matroska,webm", 16, 1e-4, {"video": True}),
        ("raw.aac", "aac", "fltp", "aac", None, 0.03, {}),
        ("a.mp2", "mp2", "s16", "mp3", None, 0.03, {}),
        ("misnamed.wav", "aac", "fltp", "mov,mp4,m4a,3gp,3g2,mj2", None, 0.03, {}),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_what_only_ffmpeg_reads(
    tmp_path, name, codec, sample_format, container, bit_depth, tolerance, options, channels
):
    waveform = _tone(channels=channels)
    path = tmp_path / name
    written = path.with_suffix(".m4a") if name == "misnamed.wav" else path
    _encode(written, codec, waveform, sample_format=sample_format, **options).rename(path)
    info = audio_info(path)
    assert (info.container, info.bit_depth, info.num_channels) == (container, bit_depth, channels)
    assert (info.sample_rate, info.codec) == (RATE, codec.removeprefix("lib"))
    read = load_audio(path, RATE)
    assert info.duration_s == info.num_samples / RATE
    assert abs(info.num_samples - len(read)) <= 2048
    assert 0 <= len(read) - len(waveform) <= 2048 + 1024  # codecs pad to whole frames
    # Where a container does not say how much priming to drop, the sound begins that much later.
    delay = max((0, 1024, 312, 481), key=lambda d: np.dot(read[d : d + 48000], waveform[:48000].mean(axis=1)))
    middle = slice(4800, 86400)
    np.testing.assert_allclose(read[delay:][middle], waveform.mean(axis=1)[middle], atol=tolerance)


def test_blocks_of_ffmpegs_frames_equal_the_whole(tmp_path):
    path = _encode(tmp_path / "a.m4a", "aac", _tone())
    whole = load_audio(path)
    np.testing.assert_array_equal(np.concatenate(list(read_blocks(path, block_s=0.1))), whole)
    assert scan(path).rms == pytest.approx(0.3 / np.sqrt(2), abs=0.01)


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("W64", "FLOAT"), ("RF64", "PCM_16")],
)
def test_cut_pcm_files_name_the_seconds_promised_and_decoded(tmp_path, container, subtype):
    path = tmp_path / "a.sound"
    soundfile.write(path, _tone(), RATE, format=container, subtype=subtype)
    message = r"a_cut.sound: is cut short: the header promises 2\.00\d s and 1\.(200|199) s were decoded"
    for reader in (load_audio, scan):
        with pytest.raises(AudioError, match=message):
            reader(_cut(path))
    one_byte = _cut(path, 1 - 0.5 / path.stat().st_size)
    with pytest.raises(AudioError, match="is cut short"):
        load_audio(one_byte)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.flac", r"decoding stopped after \d\.\d+ s; expected 2\.000 s"),
        ("a.mp3", r"promises 2\.000 s and (0\.|1\.0|1\.1)\d+ s were decoded"),
        ("a.ogg", r"cut short in the middle of an Ogg page; the pages before it hold [01]\.\d+ s"),
        ("a.caf", r"damaged or cut short"),
    ],
)
def test_other_files_cut_short(tmp_path, name, message):
    rng = np.random.default_rng(0)
    waveform = _tone() + 0.05 * rng.standard_normal((2 * RATE, 1))
    soundfile.write(tmp_path / name, waveform, RATE)
    with pytest.raises(AudioError, match=message):
        load_audio(_cut(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "options", "message"),
    [
        ("index_last.m4a", "aac", "fltp", {}, "index_last_cut.m4a.*cut short has lost its index"),
        ("index_first.m4a", "aac", "fltp", {"movflags": "faststart"}, r"stopped after 1\.\d+ s; expected 2\.\d+ s"),
        ("a.webm", "libopus", "flt", {}, r"promises 2\.\d+ s and [01]\.\d+ s were decoded"),
        ("video.mkv", "libopus", "flt", {"video": True}, r"promises 2\.\d+ s and [01]\.\d+ s were decoded"),
        ("raw.aac", "aac", "fltp", {}, r"decoding stopped after 1\.\d+ s; expected audio of unknown length"),
    ],
)
def test_ffmpegs_files_cut_short(tmp_path, name, codec, sample_format, options, message):
    waveform = _tone() + 0.05 * np.random.default_rng(0).standard_normal((2 * RATE, 1)).astype(np.float32)
    path = _encode(tmp_path / name, codec, waveform, sample_format=sample_format, **options)
    load_audio(path)
    with pytest.raises(AudioError, match=message):
        load_audio(_cut(path))


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF - 36])
def test_wav_files_from_a_pipe_promise_no_length(tmp_path, size):
    waveform = _tone()
    soundfile.write(tmp_path / "a.wav", waveform, RATE, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(content)
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav", RATE), waveform[:, 0], atol=1e-4)


def test_a_flac_without_a_length_is_read_whole(tmp_path):
    """libsndfile fails on it: the 36 bits of the number of samples are 0, as written by encoders to a pipe."""
    waveform = _tone()
    soundfile.write(tmp_path / "a.flac", waveform, RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(content)
    np.testing.assert_allclose(load_audio(tmp_path / "a.flac", RATE), waveform[:, 0], atol=1e-4)
    info = audio_info(tmp_path / "a.flac")
    assert (info.num_samples, info.bit_depth) == (len(waveform), 16)


@pytest.mark.parametrize("bit_rates", [(32_000, 160_000), (160_000, 32_000)])
def test_an_mp3_without_a_length_header_is_read_whole(tmp_path, bit_rates):
    """From the first frame libsndfile guesses 1.2 s or 6 s for these two times two seconds, and stops there."""
    parts = []
    for bit_rate in bit_rates:
        options = {"write_xing": "0", "id3v2_version": "0"}
        path = _encode(tmp_path / f"{bit_rate}.mp3", "libmp3lame", _tone(), bit_rate=bit_rate, **options)
        parts.append(path.read_bytes())
    (tmp_path / "both.mp3").write_bytes(b"".join(parts))
    assert abs(soundfile.info(tmp_path / "both.mp3").duration - 4) > 1
    assert audio_info(tmp_path / "both.mp3").duration_s == pytest.approx(4, abs=0.15)
    assert len(load_audio(tmp_path / "both.mp3")) / 16000 == pytest.approx(4, abs=0.15)


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3"])
def test_joined_files_are_read_to_the_end(tmp_path, name):
    """libsndfile stops at the end of the first."""
    soundfile.write(tmp_path / name, _tone(), RATE)
    joined = tmp_path / f"joined_{name}"
    joined.write_bytes(2 * (tmp_path / name).read_bytes())
    assert soundfile.info(joined).duration == pytest.approx(2, abs=0.1)
    assert len(load_audio(joined)) / 16000 == pytest.approx(4, abs=0.1)


def test_an_unknown_codec_is_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", _tone(), RATE, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[20:22] = struct.pack("<H", 0x7777)
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.wav: PyAV has no decoder for the audio in this wav file"):
        load_audio(tmp_path / "a.wav")


def test_a_video_without_sound_is_an_error(tmp_path):
    with av.open(str(tmp_path / "silent.mp4"), "w") as container:
        _add_pictures(container, 10)
    with pytest.raises(AudioError, match=r"silent\.mp4: PyAV finds video in it .* but no audio"):
        load_audio(tmp_path / "silent.mp4")


def test_a_change_of_format_is_an_error(tmp_path):
    """Two MP3 of different rates, one after the other."""
    parts = []
    for rate in (48000, 16000):
        options = {"write_xing": "0", "id3v2_version": "0"}
        path = _encode(tmp_path / f"{rate}.mp3", "libmp3lame", _tone(rate=rate), rate=rate, **options)
        parts.append(path.read_bytes())
    (tmp_path / "both.mp3").write_bytes(b"".join(parts))
    with pytest.raises(AudioError, match="changes from 48000 Hz and 1 channels to 16000 Hz"):
        load_audio(tmp_path / "both.mp3")


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = _encode(tmp_path / "a.m4a", "aac", _tone())
    unstated = _encode(tmp_path / "a.mp3", "libmp3lame", _tone(), write_xing="0")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        AudioError, match=r"a\.m4a: .*Format not recognised.*pip install 'jaxaudio\[media\]'.*package av"
    ):
        load_audio(path)
    with pytest.raises(AudioError, match=r"a\.mp3: .*stops where it guesses the end.*jaxaudio\[media\]"):
        load_audio(unstated)


def test_names_that_look_like_addresses_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _encode(tmp_path / "a.m4a", "aac", _tone()).rename("http:a.m4a")
    assert len(load_audio("http:a.m4a")) > 32000
    assert audio_info(pathlib.Path("http:a.m4a")).path == "http:a.m4a"


def test_a_playlist_reaches_no_network(tmp_path):
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    with pytest.raises(AudioError, match=r"list\.m3u8"), open_audio(tmp_path / "list.m3u8") as source:
        list(source.chunks)
