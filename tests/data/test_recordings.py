"""Recordings of folders, zips and lists against soundfile and soxr; every bad file is named."""

import io
import re
import zipfile

import numpy as np
import pytest
import soundfile
import soxr

from jaxaudio.data.audio import AudioError
from jaxaudio.data.manifests import Utterance, write_manifest
from jaxaudio.data.recordings import list_recordings, load_recordings

RATE = 8000


def noise(num_samples, channels=1, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (num_samples, channels)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a mono wav, a stereo flac in another one, a zip with two wavs, and what is no recording."""
    root = tmp_path_factory.mktemp("recordings")
    (root / "b").mkdir()
    soundfile.write(root / "a.wav", noise(1000), RATE, subtype="FLOAT")
    soundfile.write(root / "b" / "c.FLAC", noise(700, 2, seed=1), RATE)
    (root / "notes.txt").write_text("not a recording")
    with zipfile.ZipFile(root / "digits.zip", "w") as archive:
        for number in range(2):
            buffer = io.BytesIO()
            soundfile.write(buffer, noise(300 + number, seed=2 + number), RATE, format="WAV", subtype="FLOAT")
            archive.writestr(f"recordings/{number}.wav", buffer.getvalue())
        archive.writestr("recordings/readme.md", "no")
    return root


NAMES = ["a.wav", "b/c.FLAC", "digits.zip/recordings/0.wav", "digits.zip/recordings/1.wav"]


def test_what_is_found(folder):
    assert list_recordings(folder) == NAMES
    assert list_recordings(folder / "digits.zip") == NAMES[2:]
    write_manifest([Utterance(str(folder / "b" / "c.FLAC")), Utterance(str(folder / "a.wav"))], folder / "list.jsonl")
    assert list_recordings(folder / "list.jsonl") == NAMES[:2]


def test_samples_are_the_files(folder):
    found = load_recordings(folder, NAMES, sample_rate=RATE)
    assert [recording.name for recording in found] == NAMES
    np.testing.assert_array_equal(found[0].waveform, noise(1000))
    np.testing.assert_allclose(found[1].waveform[:, 0], noise(700, 2, seed=1).mean(axis=1), atol=1e-4)  # 16 bits
    np.testing.assert_array_equal(found[3].waveform, noise(301, seed=3))
    assert found[0].peak == pytest.approx(np.abs(noise(1000)).max())
    of_zip = load_recordings(folder / "digits.zip", NAMES[2:], sample_rate=RATE)
    np.testing.assert_array_equal(of_zip[1].waveform, found[3].waveform)


def test_other_rates_and_channels(folder):
    mono, stereo = load_recordings(folder, NAMES[:2], sample_rate=6000, channels=2)
    expected = soxr.resample(noise(1000)[:, 0], RATE, 6000, quality="VHQ")
    np.testing.assert_allclose(mono.waveform, np.stack([expected, expected], axis=1), atol=1e-6)
    assert stereo.waveform.shape == (525, 2)
    assert stereo.sample_rate == 6000


def test_cache_is_read_until_a_file_changes(folder, tmp_path, monkeypatch):
    direct = load_recordings(folder, NAMES, sample_rate=6000)
    first = load_recordings(folder, NAMES, sample_rate=6000, cache_dir=tmp_path)
    monkeypatch.setattr("jaxaudio.data.recordings._decode_all", lambda *_: pytest.fail("decoded again"))
    second = load_recordings(folder, NAMES, sample_rate=6000, cache_dir=tmp_path)
    for one, other, again in zip(direct, first, second, strict=True):
        np.testing.assert_array_equal(one.waveform, other.waveform)
        np.testing.assert_array_equal(one.waveform, again.waveform)
    assert isinstance(again.waveform.base, np.memmap)
    (folder / "a.wav").touch()
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        load_recordings(folder, NAMES, sample_rate=6000, cache_dir=tmp_path)


def test_every_bad_file_is_named(tmp_path):
    soundfile.write(tmp_path / "good.wav", noise(100), RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan], np.float32), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "three.wav", noise(100, 3), RATE)
    (tmp_path / "text.wav").write_text("this is no audio at all")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("bad.wav", b"RIFF")
    names = list_recordings(tmp_path)
    with pytest.raises(AudioError, match="4 of 5 recordings cannot be read") as error:
        load_recordings(tmp_path, names, sample_rate=RATE, channels=2)
    for text in ("nan.wav: a sample at 0.0001 s", "three.wav: has 3 channels; expected 2", "text.wav", "z.zip/bad.wav"):
        assert text in str(error.value)
    with pytest.raises(AudioError, match="gone.wav: there is no such file"):
        load_recordings(tmp_path, ["gone.wav"], sample_rate=RATE, cache_dir=tmp_path)
    assert not list(tmp_path.glob("recordings-*"))
    soundfile.write(tmp_path / "short.wav", noise(1), 48_000)
    with pytest.raises(AudioError, match="shorter than one sample at 100 Hz"):
        load_recordings(tmp_path, ["short.wav"], sample_rate=100)


def test_nothing_to_find(tmp_path):
    with pytest.raises(AudioError, match=re.escape(f"{tmp_path}/none: there is no such")):
        list_recordings(tmp_path / "none")
    with pytest.raises(AudioError, match="has no recording"):
        list_recordings(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(AudioError, match="a.zip: is no zip that can be read"):
        list_recordings(tmp_path)
