import numpy as np
import pytest
import soundfile

from jaxaudio.data.midi import Note
from jaxaudio.data.synthesis import RELEASE_S, synthesize, write_wav

CHORD = [Note(0.0, 1.0, 72, 100, 0), Note(0.0, 1.0, 64, 100, 1), Note(0.5, 1.5, 57, 100, 2), Note(0.0, 1.5, 45, 100, 3)]


def test_pitch_level_and_length():
    waveform = synthesize([Note(0.25, 1.25, 69, 80, 0)], 8000)
    assert waveform.dtype == np.float32
    assert len(waveform) == round((1.25 + RELEASE_S) * 8000) + 1
    assert np.abs(waveform).max() == pytest.approx(0.9, abs=1e-6)
    np.testing.assert_array_equal(waveform[:2000], 0.0)
    spectrum = np.abs(np.fft.rfft(waveform[4000:8000]))  # half a second: bins of 2 Hz
    peaks = np.flatnonzero(spectrum > 0.02 * spectrum.max()) * 2
    assert spectrum.argmax() * 2 == 440
    assert set(peaks) == {440, 880, 1320, 1760, 2200, 2640}


def test_harmonics_above_half_the_sample_rate_do_not_fold_back():
    spectrum = np.abs(np.fft.rfft(synthesize([Note(0.0, 1.5, 93, 80, 0)], 8000)[4000:8000]))
    assert spectrum[[880, 1760]].min() > 100 * np.delete(spectrum, [880, 1760]).max()  # 1760 and 3520 Hz only


def test_nothing_clicks():
    """A click is a jump; the steepest that six harmonics of 110 Hz can be is 2 pi f times the sum of k a_k = 3.61."""
    for held_s in (0.01, 0.1, 0.5023, 1.0):
        waveform = synthesize([Note(0.1, 0.1 + held_s, 45, 100, 0)], 44100)
        assert waveform[0] == 0.0
        assert abs(waveform[-1]) < 1e-3
        steepest = 2 * np.pi * 110 * 3.61 / 44100
        assert np.abs(np.diff(waveform)).max() < steepest


def test_velocity_and_chords_scale_together():
    soft, loud = (
        synthesize([Note(0.0, 0.5, 60, 80, 0), Note(1.0, 1.5, 60, velocity, 0)], 8000) for velocity in (40, 80)
    )
    assert np.abs(soft[8000:]).max() == pytest.approx(0.45, abs=1e-3)
    assert np.abs(loud[8000:]).max() == pytest.approx(0.9, abs=1e-3)


def test_wav_round_trip(tmp_path):
    waveform = synthesize(CHORD, 22050)
    write_wav(tmp_path / "sub" / "chord.wav", waveform, 22050)
    read, sample_rate = soundfile.read(tmp_path / "sub" / "chord.wav", dtype="float32")
    assert sample_rate == 22050
    np.testing.assert_allclose(read, waveform, atol=2**-15)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["chord.wav"]


def test_unusable_input(tmp_path):
    with pytest.raises(ValueError, match="no notes"):
        synthesize([])
    with pytest.raises(ValueError, match=r"end_s=1\.0.* needs 0 <= start_s < end_s"):
        synthesize([Note(1.0, 1.0, 60, 80, 0)])
    with pytest.raises(ValueError, match=r"loud\.wav: the waveform peaks at 1\.5"):
        write_wav(tmp_path / "loud.wav", np.array([0.0, -1.5], np.float32), 8000)
    with pytest.raises(ValueError, match="peaks at nan"):
        write_wav(tmp_path / "nan.wav", np.array([0.0, np.nan], np.float32), 8000)
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        write_wav(tmp_path / "empty.wav", np.zeros(0, np.float32), 8000)
    assert not list(tmp_path.iterdir())
