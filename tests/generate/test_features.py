"""The features of a file equal those that openai-whisper's `transcribe` computes, whatever blocks the file comes in."""

import gc
import os

import numpy as np
import pytest
import torch
import whisper.audio

from jaxaudio.generate.features import BLOCK_FRAMES, file_log_mel
from jaxaudio.ops import mel

torch.set_num_threads(1)
NOISE = (0.1 * np.random.default_rng(0).standard_normal(2 * 160 * BLOCK_FRAMES)).astype(np.float32)
STRETCH = 160 * BLOCK_FRAMES


def theirs(waveform, num_mels):
    """What `whisper.transcribe` makes of a file: (T + 3000, num_mels)."""
    return whisper.audio.log_mel_spectrogram(waveform, num_mels, padding=480_000).numpy().T


# Around the ends of a stretch the frames that see the last samples lie in one call or in two.
SIZES = [1, 159, 160, 200, 201, 5000, *(STRETCH + shift for shift in (-201, -200, -199, 39, 40, 41)), len(NOISE)]


@pytest.mark.parametrize("num_samples", SIZES)
def test_file_features_equal_openais(num_samples):
    waveform = NOISE[-num_samples:]
    expected = theirs(waveform, 80)
    ours = file_log_mel(np.split(waveform, [num_samples // 3, num_samples // 2]), 80)
    assert (ours.num_samples, ours.duration_s) == (num_samples, num_samples / 16_000)
    assert ours.frames.shape == (num_samples // 160, 80)
    np.testing.assert_allclose(ours.frames, expected[:-3000], atol=1e-5)
    np.testing.assert_allclose(ours.first_window(3000), expected[:3000], atol=1e-5)
    np.testing.assert_array_equal(ours.first_window(300), ours.first_window(3000)[:300])


@pytest.mark.parametrize("num_mels", [80, 128])
def test_the_maximum_is_that_of_the_whole_file(num_mels):
    waveform = np.concatenate([1e-4 * NOISE[:170_000], NOISE[:400], 1e-4 * NOISE[:9_000]])
    ours = file_log_mel(iter(np.array_split(waveform, 7)), num_mels)
    np.testing.assert_allclose(ours.frames, theirs(waveform, num_mels)[:-3000], atol=1e-5)


def test_the_loudest_frame_may_follow_the_content():
    click = np.zeros(319, np.float32)
    click[-1] = 1
    ours = file_log_mel([click], 80)
    np.testing.assert_allclose(ours.first_window(3000), theirs(click, 80)[:3000], atol=1e-5)
    assert len(ours.frames) == 1 <= ours.first_window(3000).argmax() // 80


def test_silence_is_silence():
    ours = file_log_mel([np.zeros(1000, np.float32)], 80)
    assert ours.silence == -1.5
    np.testing.assert_array_equal(ours.first_window(50), np.full((50, 80), -1.5, np.float32))


def test_windows_are_padded_with_zeros():
    ours = file_log_mel([NOISE[:4800]], 80)
    assert ours.frames.shape == (30, 80)
    np.testing.assert_array_equal(ours.window(5, 10), ours.frames[5:15])
    for window, start, end in [(ours.window(20, 16), 20, 30), (ours.window(4, 16, end_frame=9), 4, 9)]:
        expected = whisper.audio.pad_or_trim(ours.frames[start:end].T, 16).T
        np.testing.assert_array_equal(window, expected)
    np.testing.assert_array_equal(ours.window(30, 4), np.zeros((4, 80)))


def test_one_program_serves_every_duration():
    mel.log10_mel.clear_cache()
    for num_samples in (1, 480, 5000, 2 * STRETCH):
        file_log_mel([NOISE[:num_samples]], 80)
    assert mel.log10_mel._cache_size() == 1


def test_long_features_lie_in_a_file_that_goes_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    in_memory = file_log_mel([NOISE], 80)
    on_disk = file_log_mel([NOISE], 80, memory_limit=100_000)
    assert isinstance(on_disk.frames, np.memmap)
    assert not isinstance(in_memory.frames, np.memmap)
    np.testing.assert_array_equal(on_disk.frames, in_memory.frames)
    np.testing.assert_array_equal(on_disk.closing, in_memory.closing)
    assert not isinstance(on_disk.closing, np.memmap)
    assert os.listdir(tmp_path) == []
    if os.path.isdir("/proc/self/fd"):
        assert open_files_below(tmp_path) == 1  # the map's own, without a name
        del on_disk
        gc.collect()
        assert open_files_below(tmp_path) == 0


def open_files_below(folder):
    links = []
    for entry in os.scandir("/proc/self/fd"):
        try:
            links.append(os.readlink(entry.path))
        except FileNotFoundError:  # the folder's own handle
            continue
    return sum(link.startswith(str(folder)) for link in links)


def test_bad_audio_is_refused():
    with pytest.raises(ValueError, match="the audio has no samples"):
        file_log_mel([], 80)
    with pytest.raises(ValueError, match="the audio has no samples"):
        file_log_mel([np.zeros(0, np.float32)], 80)
    broken = NOISE[:32_000].copy()
    broken[24_000] = np.nan
    with pytest.raises(ValueError, match=r"nan at 2\.5000 s"):
        file_log_mel([NOISE[:16_000], broken], 80)
    broken[24_000] = -np.inf
    with pytest.raises(ValueError, match=r"-inf at 1\.5000 s"):
        file_log_mel([broken], 80)
    with pytest.raises(ValueError, match=r"shape \(2, 100\), dtype float32"):
        file_log_mel([np.zeros((2, 100), np.float32)], 80)
    with pytest.raises(ValueError, match=r"shape \(100,\), dtype int16; .* by 32768"):
        file_log_mel([np.zeros(100, np.int16)], 80)
