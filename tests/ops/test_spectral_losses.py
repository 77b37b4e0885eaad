"""Mel losses equal torch.stft with librosa's filters, assembled as each paper or public code does."""

import functools
import math

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxaudio.ops.spectral_losses import (
    audiocraft_mel_loss,
    dac_mel_loss,
    encodec_mel_loss,
    soundstream_mel_loss,
    waveform_l1_loss,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Empty filters")  # 64 mels do not fit the shortest windows
RATE = 16_000
RNG = np.random.default_rng(0)
SHAPES = [(2, 1600, 1), (1, 1003, 2)]
LOSSES = [
    functools.partial(soundstream_mel_loss, win_lengths=(64, 512)),
    functools.partial(encodec_mel_loss, win_lengths=(32, 256)),
    functools.partial(audiocraft_mel_loss, win_lengths=(64, 256)),
    functools.partial(dac_mel_loss, win_lengths=(32, 512), num_mels=(5, 40)),
]


def pair(shape):
    target = (0.3 * RNG.standard_normal(shape)).astype(np.float32)
    return target, (0.8 * target + 0.1 * RNG.standard_normal(shape)).astype(np.float32)


def check(loss, expected, shape):
    target, reconstruction = pair(shape)
    value = loss(jnp.asarray(target), jnp.asarray(reconstruction), sample_rate=RATE)
    rows = [torch.from_numpy(x.swapaxes(1, 2).reshape(-1, shape[1])) for x in (target, reconstruction)]
    np.testing.assert_allclose(value, float(expected(*rows)), rtol=1e-4)


def stft(rows, win_length, center=False):
    window = torch.hann_window(win_length)
    return torch.stft(rows, win_length, win_length // 4, window=window, center=center, return_complex=True)


def padded(rows, win_length):
    """Mirrored, then zeros up to a whole number of hops."""
    hop_length = win_length // 4
    margin = (win_length - hop_length) // 2
    rows = functional.pad(rows[:, None], (margin, margin), mode="reflect")[:, 0]
    frames = (rows.shape[1] - win_length) / hop_length + 1
    return functional.pad(rows, (0, (math.ceil(frames) - 1) * hop_length + win_length - rows.shape[1]))


def filters(win_length, num_mels, **options):
    return torch.from_numpy(librosa.filters.mel(sr=RATE, n_fft=win_length, n_mels=num_mels, **options))


@pytest.mark.parametrize("shape", SHAPES)
def test_soundstreams(shape):
    def expected(target, reconstruction):
        total = 0.0
        for win_length in (64, 512):
            mel = filters(win_length, 64)
            x, y = (mel @ stft(padded(rows, win_length), win_length).abs() for rows in (target, reconstruction))
            assert x.shape[-1] == math.ceil(shape[1] / (win_length // 4))
            logs = torch.log(x.clamp(min=1e-5)) - torch.log(y.clamp(min=1e-5))
            total += (x - y).abs().sum(dim=(1, 2)).mean()
            total += math.sqrt(win_length / 2) * logs.norm(dim=1).sum(dim=1).mean()
        return total

    check(LOSSES[0], expected, shape)


def torchaudio_mel(rows, win_length, fmin):
    spectrum = stft(padded(rows, win_length), win_length) / torch.hann_window(win_length).square().sum().sqrt()
    return filters(win_length, 64, fmin=fmin, htk=True, norm=None) @ spectrum.abs().square()


@pytest.mark.parametrize("shape", SHAPES)
def test_encodecs(shape):
    def expected(target, reconstruction):
        total = 0.0
        for win_length in (32, 256):
            x, y = (torchaudio_mel(rows, win_length, 0.0) for rows in (target, reconstruction))
            total += functional.l1_loss(x, y) + functional.mse_loss(x, y)
        return total / 2

    check(LOSSES[1], expected, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_audiocrafts(shape):
    def expected(target, reconstruction):
        total = 0.0
        for win_length in (64, 256):
            x, y = (torchaudio_mel(rows, win_length, 64.0) for rows in (target, reconstruction))
            total += functional.l1_loss(x, y) + functional.mse_loss(torch.log10(1e-5 + x), torch.log10(1e-5 + y))
        return total / 4

    check(LOSSES[2], expected, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_dacs(shape):
    def expected(target, reconstruction):
        total = 0.0
        for win_length, num_mels in ((32, 5), (512, 40)):
            mel = filters(win_length, num_mels)
            x, y = (mel @ stft(rows, win_length, center=True).abs() for rows in (target, reconstruction))
            total += functional.l1_loss(torch.log10(x.clamp(min=1e-5)), torch.log10(y.clamp(min=1e-5)))
        return total

    check(LOSSES[3], expected, shape)


def test_samples():
    target, reconstruction = pair((2, 50, 2))
    value = waveform_l1_loss(jnp.asarray(target), jnp.asarray(reconstruction))
    np.testing.assert_allclose(value, np.abs(target - reconstruction).mean(), rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_silence_and_perfection_have_finite_gradients(loss):
    target = jnp.asarray(pair((1, 800, 1))[0]).at[:, 200:].set(0)
    gradient = jax.jit(jax.grad(lambda x, y: loss(x, y, sample_rate=RATE), argnums=1))
    for reconstruction in (target, jnp.zeros_like(target)):
        assert np.isfinite(gradient(target, reconstruction)).all()
    assert float(loss(target, target, sample_rate=RATE)) == 0


def test_a_window_without_its_mels_is_refused():
    waveform = jnp.zeros((1, 800, 1))
    with pytest.raises(ValueError, match=r"got \(5, 10\) for windows \(64,\)"):
        dac_mel_loss(waveform, waveform, sample_rate=RATE, win_lengths=(64,), num_mels=(5, 10))
