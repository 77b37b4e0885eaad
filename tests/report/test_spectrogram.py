"""The picture of a recording shows its samples, its frequencies and Whisper's features where they belong."""

import numpy as np
import pytest
import torch
import whisper.audio
from matplotlib.image import imread

from jaxaudio.report import spectrogram
from jaxaudio.report.spectrogram import plot_spectrogram, spectrogram_figure

torch.set_num_threads(1)
SECOND = np.arange(16_000) / 16_000
TONE = np.sin(2 * np.pi * 1000 * SECOND).astype(np.float32)
NOISE = (0.1 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)


def images(figure):
    """The pixels of the spectrogram and of the log-mel, (rows, columns) from the lowest frequency up."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes[1:3]]


def test_a_tone_of_full_scale_has_zero_decibels_at_its_frequency():
    figure = spectrogram_figure(TONE, 16_000)
    level_db, _ = images(figure)
    assert level_db.shape == (257, 100)
    middle = level_db[:, 50]
    assert middle.argmax() == 1000 / (16_000 / 512)
    assert middle.max() == pytest.approx(0, abs=0.01)
    left, right, bottom, top = figure.axes[1].images[0].get_extent()
    assert (left, right, bottom, top) == (0, 1, 0, 8)
    assert figure.axes[2].get_xlabel() == "seconds"


@pytest.mark.parametrize("num_mels", [80, 128])
def test_the_log_mel_is_what_whisper_hears(num_mels):
    _, features = images(spectrogram_figure(NOISE, 16_000, num_mels=num_mels))
    np.testing.assert_allclose(features, whisper.audio.log_mel_spectrogram(NOISE, num_mels), atol=1e-5)


def test_bands_are_labelled_with_their_frequencies():
    figure = spectrogram_figure(TONE, 16_000)
    _, features = images(figure)
    labels = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    place = figure.axes[2].get_yticks()[labels.index("1")]
    assert abs(place - (features[:, 50].argmax() + 0.5)) < 1


def test_the_waveform_lies_between_its_extremes():
    (stairs,) = spectrogram_figure(NOISE, 16_000).axes[0].patches
    high, edges, low = stairs.get_data()
    frames = NOISE.reshape(100, 160)
    np.testing.assert_array_equal(high, frames.max(axis=1))
    np.testing.assert_array_equal(low, frames.min(axis=1))
    np.testing.assert_allclose(edges, np.arange(101) / 100)


def test_other_rates_are_resampled_for_the_log_mel():
    tone = np.sin(2 * np.pi * 1000 * np.arange(24_000) / 24_000).astype(np.float32)
    figure = spectrogram_figure(tone, 24_000)
    _, features = images(figure)
    _, expected = images(spectrogram_figure(TONE, 16_000))
    assert figure.axes[1].images[0].get_extent()[3] == 12
    np.testing.assert_allclose(features[:, 5:-5].max(axis=0), expected[:, 5:-5].max(axis=0), atol=1e-3)
    assert features[:, 50].argmax() == expected[:, 50].argmax()


def test_blocks_and_segments_are_drawn_one_after_another(monkeypatch):
    monkeypatch.setattr(spectrogram, "_SEGMENT_S", 1)
    waveform = np.concatenate([TONE, NOISE, TONE[:8000]])
    whole = images(spectrogram_figure(waveform, 16_000))
    in_blocks = images(spectrogram_figure(iter(np.array_split(waveform, 9)), 16_000))
    for ours, expected in zip(in_blocks, whole, strict=True):
        np.testing.assert_array_equal(ours, expected)
    level_db, features = whole
    assert level_db.shape[1] == features.shape[1] == 250
    np.testing.assert_allclose(level_db[:, :100], images(spectrogram_figure(TONE, 16_000))[0], atol=1e-3)
    assert (level_db.argmax(axis=0)[[20, 80, 220]] == 32).all()


@pytest.mark.parametrize("num_rows", [7, 8, 9, 30, 61])
def test_columns_are_means_of_equally_many_rows(monkeypatch, num_rows):
    monkeypatch.setattr(spectrogram, "_MAX_COLUMNS", 4)
    rows = np.random.default_rng(0).standard_normal((num_rows, 3))
    columns = spectrogram._Columns(spectrogram._mean)
    for part in np.split(rows, [min(5, num_rows), min(16, num_rows), min(17, num_rows)]):
        columns.add(part)
    stride = next(stride for stride in (1, 2, 4, 8) if num_rows // stride <= 8)
    expected = [rows[start : start + stride].mean(axis=0) for start in range(0, num_rows, stride)]
    np.testing.assert_allclose(columns.rows(), expected)


def test_silence_and_single_samples_are_drawn():
    level_db, features = images(spectrogram_figure(np.zeros(1, np.float32), 16_000))
    np.testing.assert_allclose(level_db, -120, rtol=1e-6)
    assert (features == -1.5).all()


def test_long_recordings_are_measured_in_minutes(monkeypatch):
    monkeypatch.setattr(spectrogram, "_MAX_COLUMNS", 50)
    figure = spectrogram_figure([np.zeros(310 * 1000, np.float32)], 1000)
    assert figure.axes[2].get_xlabel() == "minutes"
    assert figure.axes[2].get_xlim() == (0, 310 / 60)


def test_the_file_is_written_in_the_format_of_its_suffix(tmp_path):
    plot_spectrogram(NOISE, 16_000, tmp_path / "a" / "picture.png")
    assert imread(tmp_path / "a" / "picture.png").shape == (1080, 1440, 4)
    with pytest.raises(ValueError, match="wav"):
        plot_spectrogram(NOISE, 16_000, tmp_path / "picture.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_bad_audio_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        spectrogram_figure([], 16_000)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), dtype float32"):
        spectrogram_figure(np.zeros((2, 8), np.float32), 16_000)
    with pytest.raises(ValueError, match="dtype int16; .* by 32768"):
        spectrogram_figure(np.zeros(8, np.int16), 16_000)
    with pytest.raises(ValueError, match=r"inf at 1\.0001 s"):
        spectrogram_figure([NOISE, np.array([0, 0, np.inf], np.float32)], 16_000)


def test_compared_spectrograms_have_one_scale():
    """A tone and the same 20 dB below: both at their frequency, the second 20 dB darker on the scale of the first."""
    figure = spectrogram.compare_spectrograms({"loud": TONE, "soft": 0.1 * TONE}, 16_000)
    pictures = [axes.images[0] for axes in figure.axes]
    loud, soft = (np.asarray(picture.get_array()) for picture in pictures)
    assert loud[:, 50].argmax() == soft[:, 50].argmax() == 1000 / (16_000 / 512)
    assert loud.max() - soft.max() == pytest.approx(20, abs=1e-3)
    assert [picture.get_clim() for picture in pictures] == [(loud.max() - 80, loud.max())] * 2
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loud", "soft"]
