import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import torch

from jaxaudio.ops.metrics import (
    codebook_perplexity,
    multi_scale_mel_distance,
    multi_scale_stft_distance,
    si_sdr,
    si_snr,
)

RNG = np.random.default_rng(0)
REFERENCE = (0.2 * RNG.standard_normal((2, 4000)) + 0.05).astype(np.float32)
ESTIMATE = (0.7 * REFERENCE + 0.05 * RNG.standard_normal((2, 4000)) - 0.02).astype(np.float32)
PAIRS = list(zip(ESTIMATE, REFERENCE, strict=True))


def slow_si_sdr(estimate, reference):
    """In float64, by the angle between the two: the distortion is what is perpendicular to the reference."""
    cosine = estimate @ reference / np.sqrt((estimate @ estimate) * (reference @ reference))
    return 10 * np.log10(cosine**2 / (1 - cosine**2))


def test_si_sdr_and_si_snr_against_the_angle():
    rows = [(e.astype(np.float64), r.astype(np.float64)) for e, r in PAIRS]
    expected = [slow_si_sdr(e, r) for e, r in rows]
    np.testing.assert_allclose(si_sdr(jnp.asarray(ESTIMATE), jnp.asarray(REFERENCE)), expected, rtol=1e-5)
    expected = [slow_si_sdr(e - e.mean(), r - r.mean()) for e, r in rows]
    np.testing.assert_allclose(si_snr(jnp.asarray(ESTIMATE), jnp.asarray(REFERENCE)), expected, rtol=1e-5)
    assert not np.allclose(expected, [slow_si_sdr(e, r) for e, r in rows], rtol=1e-3)  # the means matter here


def test_si_sdr_of_known_noise_has_its_sign_and_no_scale():
    # A distortion perpendicular to the signal with a hundredth of its energy: 20 dB, whatever the level.
    signal, noise = np.tile([1.0, 1, -1, -1], 100), np.tile([0.1, -0.1, -0.1, 0.1], 100)
    estimates = jnp.asarray(np.stack([signal + noise, 3 * (signal + noise), signal + 10 * noise, -signal - noise]))
    references = jnp.asarray(np.stack([signal] * 4))
    np.testing.assert_allclose(si_sdr(estimates, references), [20, 20, 0, 20], atol=1e-4)
    np.testing.assert_allclose(si_snr(estimates + 5.0, references - 2.0), [20, 20, 0, 20], atol=1e-3)


def test_si_sdr_at_its_ends():
    signal = np.tile([1.0, -1], 8)
    estimates = jnp.asarray(np.stack([2 * signal, 0 * signal, signal]))
    references = jnp.asarray(np.stack([signal, signal, 0 * signal]))
    np.testing.assert_array_equal(si_sdr(estimates, references), [np.inf, -np.inf, np.nan])


def librosa_magnitudes(waveform, win_length):
    return np.abs(librosa.stft(waveform, n_fft=win_length, hop_length=win_length // 4, pad_mode="reflect"))


def slow_mel_distance(estimate, reference):
    total = 0.0
    for num_mels, win_length in zip((5, 10, 20, 40, 80, 160, 320), (32, 64, 128, 256, 512, 1024, 2048), strict=True):
        filters = librosa.filters.mel(sr=16000, n_fft=win_length, n_mels=num_mels)
        mels = [filters @ librosa_magnitudes(waveform, win_length) for waveform in (estimate, reference)]
        total += np.abs(np.diff(np.log10(np.clip(mels, 1e-5, None)), axis=0)).mean()
    return total


@pytest.mark.filterwarnings("ignore:Empty filters")
def test_mel_distance_against_librosa():
    expected = [slow_mel_distance(*pair) for pair in PAIRS]
    ours = multi_scale_mel_distance(jnp.asarray(ESTIMATE), jnp.asarray(REFERENCE), sample_rate=16000)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_stft_distance_against_torch():
    reference = REFERENCE * (np.arange(4000) > 2500)  # where it is silent, the smallest magnitude counts
    expected = np.zeros(2)
    for win_length in (2048, 512):
        window = torch.hann_window(win_length, dtype=torch.float64)
        magnitudes = [
            torch.stft(torch.tensor(w).double(), win_length, win_length // 4, window=window, return_complex=True).abs()
            for w in (ESTIMATE, reference)
        ]
        logs = [magnitude.clamp(1e-5).square().log10() for magnitude in magnitudes]
        for a, b in (magnitudes, logs):
            expected += (a - b).abs().mean(dim=(1, 2)).numpy()
    ours = multi_scale_stft_distance(jnp.asarray(ESTIMATE), jnp.asarray(reference))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_distances_of_equals_are_zero_and_short_waveforms_are_refused():
    same = jnp.asarray(REFERENCE)
    np.testing.assert_array_equal(multi_scale_mel_distance(same, same, sample_rate=16000), np.zeros(2))
    np.testing.assert_array_equal(multi_scale_stft_distance(same, same), np.zeros(2))
    with pytest.raises(ValueError, match="at least 1025 samples, got 1024"):
        multi_scale_stft_distance(same[:, :1024], same[:, :1024])
    with pytest.raises(ValueError, match=r"num_mels for each of win_lengths, got \(5, 10\) and \(32,\)"):
        multi_scale_mel_distance(same, same, sample_rate=16000, num_mels=(5, 10), win_lengths=(32,))


def test_perplexity_against_counts():
    codes = np.stack([np.arange(12).reshape(2, 6) % 4, np.full((2, 6), 3), RNG.integers(0, 5, (2, 6))], axis=1)
    share = np.array([np.mean(codes[:, 2] == code) for code in range(5)])
    expected = [4, 1, np.prod(share**-share, where=share > 0)]
    np.testing.assert_allclose(codebook_perplexity(jnp.asarray(codes), 5), expected, rtol=1e-5)
    is_nan = np.isnan(codebook_perplexity(jnp.asarray(codes), 4))
    np.testing.assert_array_equal(is_nan, [False, False, (codes[:, 2] == 4).any()])
