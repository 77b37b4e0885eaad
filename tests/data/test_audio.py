import io
import os
import pathlib
import tracemalloc
import zipfile

import av
import numpy as np
import pytest
import scipy.io.wavfile
import soundfile
import soxr

from jaxaudio.data import audio
from jaxaudio.data.audio import AudioError, AudioInfo, AudioScan, audio_info, load_audio, read_blocks, scan


@pytest.fixture(scope="module")
def data_dir():
    if "JAXAUDIO_DATA" not in os.environ:
        pytest.skip("JAXAUDIO_DATA does not name the folder of real recordings")
    return pathlib.Path(os.environ["JAXAUDIO_DATA"])


def _noise(num_samples, *channels, seed=0):
    return (0.2 * np.random.default_rng(seed).standard_normal((num_samples, *channels))).astype(np.float32)


def test_16_bit_samples_are_divided_by_32768(tmp_path):
    """Whisper's convention; exact, also at both ends of the scale."""
    integers = np.random.default_rng(0).integers(-32768, 32768, 16000).astype(np.int16)
    integers[:2] = -32768, 32767
    scipy.io.wavfile.write(tmp_path / "a.wav", 16000, integers)
    waveform = load_audio(tmp_path / "a.wav")
    assert waveform.dtype == np.float32
    np.testing.assert_array_equal(waveform, integers / np.float32(32768))


@pytest.mark.parametrize(
    ("name", "subtype", "channels", "rate", "container", "bit_depth", "tolerance"),
    [
        ("a.wav", "PCM_U8", 1, 8000, "wav", 8, 1 / 127),
        ("a.wav", "PCM_24", 2, 44100, "wav", 24, 1e-6),
        ("a.wav", "PCM_32", 6, 96000, "wav", 32, 1e-6),
        ("a.wav", "FLOAT", 1, 16000, "wav", 32, 0),
        ("a.wav", "DOUBLE", 1, 16000, "wav", 64, 0),
        ("a.wav", "ULAW", 1, 8000, "wav", None, 0.04),
        ("a.flac", "PCM_16", 2, 48000, "flac", 16, 1e-4),
        ("a.aiff", "PCM_S8", 1, 22050, "aiff", 8, 1 / 127),
        ("a.ogg", "VORBIS", 1, 16000, "ogg", None, 0.05),
        ("a.mp3", "MPEG_LAYER_III", 2, 44100, "mp3", None, 0.05),
        ("called.raw", "PCM_16", 1, 16000, "wav", 16, 1e-4),
    ],
)
def test_facts_and_samples_of_each_format(tmp_path, name, subtype, channels, rate, container, bit_depth, tolerance):
    path = tmp_path / name
    times = np.arange(rate)[:, None] / rate
    waveform = 0.5 * np.sin(2 * np.pi * (220 * times + np.arange(channels) / 7)) + 0.02 * _noise(rate, channels)
    soundfile.write(tmp_path / "written", waveform, rate, format=container, subtype=subtype)
    os.rename(tmp_path / "written", path)
    info = audio_info(path)
    if name == "called.raw":  # soundfile takes the name's word and asks for a rate; PyAV looks inside
        subtype = "pcm_s16le"
    expected = AudioInfo(str(path), container, subtype.lower(), channels, bit_depth, rate, rate, 1.0)
    assert info == expected
    read = load_audio(path, rate)
    assert len(read) == rate
    np.testing.assert_allclose(read, waveform.mean(axis=1), atol=tolerance + 1e-7)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_blocks_equal_resampling_the_whole_file(tmp_path, rate):
    waveform = _noise(3 * rate + 17, 2, seed=rate)
    soundfile.write(tmp_path / "a.wav", waveform, rate, subtype="FLOAT")
    whole = soxr.resample(waveform.astype(np.float64).mean(axis=1), rate, 16000, quality="VHQ")
    for block_s in (0.01, 0.5, 1.0 + 1 / 16000, 30.0):
        blocks = list(read_blocks(tmp_path / "a.wav", block_s=block_s))
        size = round(block_s * 16000)
        assert {block.shape for block in blocks[:-1]} <= {(size,)}
        assert 0 < len(blocks[-1]) <= size
        assert {block.dtype for block in blocks} == {np.dtype(np.float32)}
        joined = np.concatenate(blocks)
        assert len(joined) == len(whole)
        np.testing.assert_allclose(joined, whole, atol=1e-5)
        np.testing.assert_array_equal(joined, load_audio(tmp_path / "a.wav"))


@pytest.mark.parametrize("rate", [16000, 22050])
def test_channels_are_kept_shared_or_mixed(tmp_path, rate):
    waveform = _noise(rate, 6)
    resampled = soxr.resample(waveform.astype(np.float64), rate, 16000, quality="VHQ") if rate != 16000 else waveform
    for count in (1, 2, 6):
        soundfile.write(tmp_path / f"{count}.wav", waveform[:, :count], rate, subtype="FLOAT")

    def read(count, channels):
        return np.concatenate(list(read_blocks(tmp_path / f"{count}.wav", block_s=0.3, channels=channels)))

    for count, channels, expected in (
        (2, 2, resampled[:, :2]),
        (6, 6, resampled),
        (1, 2, resampled[:, [0, 0]]),
        (1, 1, resampled[:, :1]),
        (6, 1, resampled.mean(axis=1, keepdims=True)),
    ):
        np.testing.assert_allclose(read(count, channels), expected, atol=1e-5)
    np.testing.assert_array_equal(read(2, 1)[:, 0], load_audio(tmp_path / "2.wav"))
    for count, channels in ((6, 2), (2, 6)):
        with pytest.raises(AudioError, match=f"{count}.wav: has {count} channels; expected {channels}, or 1"):
            read(count, channels)


def test_the_resampler_is_recorded():
    assert f"soxr {soxr.__version__} VHQ" == audio.RESAMPLER


def test_memory_is_that_of_a_block(tmp_path):
    """Half an hour at 8 kHz is 115 MB at 16 kHz in float32; the file is a header and a hole."""
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(0), 8000, subtype="PCM_16")
    header, num_bytes = bytearray(path.read_bytes()[:44]), 1800 * 8000 * 2
    header[4:8], header[40:44] = (36 + num_bytes).to_bytes(4, "little"), num_bytes.to_bytes(4, "little")
    path.write_bytes(header)
    os.truncate(path, 44 + num_bytes)
    next(read_blocks(path))  # imports what it needs
    tracemalloc.start()
    num_samples = sum(len(block) for block in read_blocks(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_samples == 1800 * 16000
    assert peak < 12e6
    tracemalloc.start()
    assert scan(path) == AudioScan(1800 * 8000, 0.0, 0.0, 0, 1.0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


def test_a_scan_counts_what_was_put_in(tmp_path):
    waveform = np.full((1000, 2), 0.5, np.float32)
    waveform[:100] = 0.0
    waveform[100:110, 0] = 0.0  # not silence: the other channel sounds
    waveform[200:203, 1] = 1.0
    waveform[300, 0] = -1.25
    soundfile.write(tmp_path / "float.wav", waveform, 16000, subtype="FLOAT")
    measured = scan(tmp_path / "float.wav")
    assert measured == AudioScan(1000, 1.25, measured.rms, 4, 0.1, 0)
    assert measured.rms == pytest.approx(np.sqrt(np.mean(waveform.astype(np.float64) ** 2)), rel=1e-12)
    waveform[400, 0], waveform[401, 1], waveform[402, 1] = np.nan, np.inf, -np.inf
    soundfile.write(tmp_path / "nan.wav", waveform, 16000, subtype="FLOAT")
    finite = np.where(np.isfinite(waveform), waveform, 0).astype(np.float64)
    measured = scan(tmp_path / "nan.wav")
    assert measured == AudioScan(1000, 1.25, measured.rms, 4, 0.1, 3)
    assert measured.rms == pytest.approx(np.sqrt(np.sum(finite**2) / 1997), rel=1e-12)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_integers_clip_at_their_largest_values_on_both_sides(tmp_path, subtype):
    waveform = np.concatenate([np.full(7, 1.5), np.full(5, -1.5), [0.9999, -0.9999]])
    soundfile.write(tmp_path / "a.wav", waveform, 16000, subtype=subtype)
    assert scan(tmp_path / "a.wav").num_clipped == 12


def test_silent_clipped_and_short_audio_is_read(tmp_path):
    cases = {"silent": np.zeros(16000), "clipped": np.sign(_noise(16000)), "short": _noise(1600), "one": _noise(1)}
    for name, waveform in cases.items():
        soundfile.write(tmp_path / f"{name}.wav", waveform, 16000, subtype="FLOAT")
        np.testing.assert_array_equal(load_audio(tmp_path / f"{name}.wav"), waveform.astype(np.float32))


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (-np.inf, "-inf")])
def test_a_sample_that_is_not_finite_is_named_with_its_second(tmp_path, value, shown):
    waveform = _noise(48000, 2)
    waveform[36000, 1] = value
    soundfile.write(tmp_path / "a.wav", waveform, 24000, subtype="FLOAT")
    with pytest.raises(AudioError, match=rf"a\.wav: a sample of channel 2 is {shown} at 1\.5000 s"):
        load_audio(tmp_path / "a.wav")


def test_files_without_audio_are_named(tmp_path):
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "header.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "one.wav", np.zeros(1), 48000)
    (tmp_path / "text.wav").write_text("These are words, not sound.\n" * 40)
    (tmp_path / "text.txt").write_text("These are words, not sound.\n" * 40)
    for name, message in {
        "missing.wav": "missing.wav: there is no such file",
        "": "is a folder",
        "empty.wav": r"empty.wav: is empty \(0 bytes\)",
        "header.wav": "header.wav: has a header but no samples",
        "one.wav": "one.wav: 1 samples at 48000 Hz are less than one sample at 1000 Hz",
        "text.wav": r"text.wav: neither soundfile .* nor PyAV .* begins with b'These are words,'",
        "text.txt": r"text.txt: PyAV finds video in it .* begins with b'These are words,'",
    }.items():
        with pytest.raises(AudioError, match=message):
            list(read_blocks(tmp_path / name, 1000))
        if name in ("header.wav", "one.wav"):
            continue
        for reader in (audio_info, scan):
            with pytest.raises(AudioError, match=message):
                reader(tmp_path / name)


def test_arguments_are_checked_before_the_file_is_opened():
    with pytest.raises(ValueError, match="sample_rate=0"):
        read_blocks("missing.wav", 0)
    with pytest.raises(ValueError, match=r"block_s=1e-05"):
        read_blocks("missing.wav", block_s=1e-5)


def test_the_file_is_closed_when_the_iteration_stops(tmp_path):
    soundfile.write(tmp_path / "a.wav", _noise(16000), 16000)
    blocks = read_blocks(tmp_path / "a.wav", block_s=0.1)
    next(blocks)
    handles = pathlib.Path("/proc/self/fd")
    if not handles.exists():
        pytest.skip("the open files of a process are listed by /proc, which this system lacks")
    is_open = lambda: any("a.wav" in os.readlink(handle) for handle in handles.iterdir() if handle.exists())  # noqa: E731
    assert is_open()
    blocks.close()
    assert not is_open()


@pytest.mark.parametrize(
    "name",
    [
        "speech/jfk.flac",
        "speech/librispeech-198-209-0000.ogg",
        "music/sorohanro_-_solo-trumpet-06.hq.ogg",
        "music/encodec_test_48k.wav",
    ],
)
def test_real_recordings_equal_ffmpegs(data_dir, name):
    """libsndfile decodes them here, FFmpeg in the test."""
    with av.open(str(data_dir / name)) as container:
        convert = av.AudioResampler(format="fltp")
        frames = [piece for frame in container.decode(audio=0) for piece in convert.resample(frame)]
        expected = np.concatenate([frame.to_ndarray() for frame in frames], axis=1).mean(axis=0)
        rate = frames[0].sample_rate
    info = audio_info(data_dir / name)
    assert (info.sample_rate, info.num_samples) == (rate, len(expected))
    np.testing.assert_allclose(load_audio(data_dir / name, rate), expected, atol=1e-5)
    resampled = soxr.resample(expected, rate, 16000, quality="VHQ")
    waveform = load_audio(data_dir / name)
    assert len(waveform) == len(resampled)
    np.testing.assert_allclose(waveform, resampled, atol=1e-5)


def test_spoken_digits_equal_scipys_reading_of_them(data_dir, tmp_path):
    with zipfile.ZipFile(data_dir / "fsdd" / "recordings.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith("_0.wav"))[::15]
        assert names
        for name in names:
            content = archive.read(name)
            rate, integers = scipy.io.wavfile.read(io.BytesIO(content))
            path = tmp_path / pathlib.PurePosixPath(name).name
            path.write_bytes(content)
            assert (rate, audio_info(path).bit_depth) == (8000, 16)
            np.testing.assert_array_equal(load_audio(path, 8000), integers / np.float32(32768))
            assert len(load_audio(path)) == 2 * len(integers)
