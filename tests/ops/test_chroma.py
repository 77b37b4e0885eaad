"""Chroma equals librosa's."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from jaxaudio.ops.chroma import chroma, chroma_filters

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("rate", "n_fft", "num_chroma", "tuning"),
    [(32_000, 16_384, 12, 0.0), (22_050, 2048, 12, 0.3), (16_000, 1023, 24, -0.2), (44_100, 512, 7, 0.0)],
)
def test_filters_equal_librosas(rate, n_fft, num_chroma, tuning):
    expected = librosa.filters.chroma(sr=rate, n_fft=n_fft, n_chroma=num_chroma, tuning=tuning).T
    filters = chroma_filters(rate, n_fft, num_chroma, tuning=tuning)
    np.testing.assert_allclose(filters, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="read-only"):
        filters[0, 0] = 1


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
def test_chroma_equals_librosas(pad_mode):
    waveform = np.stack([RNG.standard_normal(6000), tones([60, 64, 67], 6000)]).astype(np.float32)
    waveform[1, 3000:] = 0
    options = {"n_fft": 1024, "hop_length": 300, "pad_mode": pad_mode}
    expected = librosa.feature.chroma_stft(y=waveform.astype(np.float64), sr=16_000, tuning=0.0, **options)
    for form in ("fft", "matmul"):
        ours = chroma(jnp.asarray(waveform), sample_rate=16_000, **options, form=form)
        np.testing.assert_allclose(ours, expected.swapaxes(1, 2), rtol=1e-5, atol=1e-5, err_msg=form)


def tones(midi_pitches, num_samples):
    seconds = np.arange(num_samples) / 16_000
    return sum(np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * seconds) for pitch in midi_pitches)


def test_a_tone_is_its_pitch_class_in_every_octave():
    for pitch in (57, 60, 66, 78):
        waveform = jnp.asarray(tones([pitch], 16_384)[None], jnp.float32)
        classes = chroma(waveform, sample_rate=16_000, n_fft=4096, hop_length=4096).argmax(axis=-1)
        np.testing.assert_array_equal(classes, pitch % 12)


def test_silence_stays_zero_and_has_a_gradient():
    def loss(waveform):
        return jnp.sum(chroma(waveform, sample_rate=16_000, n_fft=64, hop_length=32) ** 2)

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((1, 128)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_chroma >= 1 and n_fft >= 2, got 0 and 64"):
        chroma_filters(16_000, 64, 0)
    with pytest.raises(ValueError, match="needs at least 33 samples, got 32"):
        chroma(jnp.zeros((1, 32)), sample_rate=16_000, n_fft=64, hop_length=16)
