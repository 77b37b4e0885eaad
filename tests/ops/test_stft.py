"""Spectra equal those of torch, librosa and SciPy; the way back returns what went in."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.signal
import torch

from jaxaudio.ops.stft import frame, hann_window, istft, power, power_spectrum, stft

RNG = np.random.default_rng(0)
WAVEFORM = RNG.standard_normal((2, 1003)).astype(np.float32)


@pytest.mark.parametrize(
    ("num_samples", "length", "hop"),
    [(100, 12, 4), (100, 10, 4), (101, 7, 7), (50, 3, 8), (20, 20, 5), (23, 20, 1), (40, 16, 24)],
)
def test_frames_equal_a_sliding_window(num_samples, length, hop):
    waveform = np.arange(2 * num_samples, dtype=np.float32).reshape(2, num_samples)
    expected = np.lib.stride_tricks.sliding_window_view(waveform, length, axis=1)[:, ::hop]
    frames = frame(jnp.asarray(waveform), length, hop)
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize(("num_samples", "length", "hop"), [(9, 10, 4), (10, 0, 4), (10, 4, 0)])
def test_frames_that_do_not_fit_are_refused(num_samples, length, hop):
    with pytest.raises(ValueError, match=f"frame_length = {length} .* {num_samples} samples and hop_length = {hop}"):
        frame(jnp.zeros((1, num_samples)), length, hop)


@pytest.mark.parametrize(
    ("n_fft", "hop", "win_length", "center"), [(64, 16, None, True), (65, 24, 40, True), (50, 60, None, False)]
)
def test_stft_equals_torch(n_fft, hop, win_length, center):
    window = torch.hann_window(win_length or n_fft, dtype=torch.float64)
    options = {"n_fft": n_fft, "hop_length": hop, "win_length": win_length, "center": center}
    expected = torch.stft(torch.from_numpy(WAVEFORM).double(), **options, window=window, return_complex=True)
    spectrum = stft(jnp.asarray(WAVEFORM), **options)
    np.testing.assert_allclose(spectrum, expected.mT.numpy(), rtol=1e-5, atol=1e-5)


def test_stft_equals_librosa_and_scipy():
    waveform = WAVEFORM.astype(np.float64)
    ours = stft(jnp.asarray(WAVEFORM), n_fft=64, hop_length=20, pad_mode="constant")
    theirs = librosa.stft(waveform, n_fft=64, hop_length=20).swapaxes(1, 2)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    ours = stft(jnp.asarray(WAVEFORM), n_fft=64, hop_length=20, center=False)
    options = {"window": "hann", "nperseg": 64, "noverlap": 44, "boundary": None, "padded": False}
    theirs = scipy.signal.stft(waveform, **options)[2].swapaxes(1, 2) * 32  # SciPy divides by the window's sum
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n_fft", "hop", "win_length", "num_samples"), [(64, 16, None, 1003), (65, 20, 41, 640), (40, 30, None, 903)]
)
def test_istft_returns_what_went_in(n_fft, hop, win_length, num_samples):
    waveform = jnp.asarray(WAVEFORM[:, :num_samples])
    spectrum = stft(waveform, n_fft=n_fft, hop_length=hop, win_length=win_length)
    back = istft(spectrum, n_fft=n_fft, hop_length=hop, win_length=win_length, length=num_samples)
    np.testing.assert_allclose(back, waveform, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [None, 301])
def test_istft_of_any_spectrum_equals_torch(length):
    spectrum = (RNG.standard_normal((2, 20, 33)) + 1j * RNG.standard_normal((2, 20, 33))).astype(np.complex64)
    window = torch.hann_window(64, dtype=torch.float64)
    expected = torch.istft(torch.from_numpy(spectrum).mT.to(torch.complex128), 64, 16, window=window, length=length)
    np.testing.assert_allclose(
        istft(jnp.asarray(spectrum), n_fft=64, hop_length=16, length=length), expected.numpy(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("n_fft", "win_length"), [(64, None), (45, 30)])
def test_both_forms_of_the_power_spectrum_equal_the_squared_magnitude(n_fft, win_length):
    options = {"n_fft": n_fft, "hop_length": 16, "win_length": win_length}
    expected = np.abs(stft(jnp.asarray(WAVEFORM), **options)) ** 2
    for form in ("auto", "fft", "matmul"):
        ours = power_spectrum(jnp.asarray(WAVEFORM), **options, form=form)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * expected.max(), err_msg=form)


def test_power_pads_short_frames():
    frames = RNG.standard_normal((1, 3, 10)).astype(np.float32)
    expected = np.abs(np.fft.rfft(frames, 16)) ** 2
    for form in ("fft", "matmul"):
        np.testing.assert_allclose(power(jnp.asarray(frames), n_fft=16, form=form), expected, rtol=1e-5, atol=1e-5)


def test_the_platform_chooses_the_form():
    def program(platform, n_fft):
        traced = jax.jit(lambda x: power(x, n_fft=n_fft)).trace(jax.ShapeDtypeStruct((1, 2, 8), jnp.float32))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.fft" in program("cpu", 8)
    assert "stablehlo.dot_general" not in program("cpu", 8)
    assert "stablehlo.fft" not in program("tpu", 8)
    assert "HIGHEST" in program("tpu", 8)
    assert "stablehlo.fft" in program("tpu", 4096)


@pytest.mark.parametrize("form", ["fft", "matmul"])
def test_gradient_of_the_power_spectrum_equals_a_finite_difference(form):
    weights = jnp.asarray(RNG.standard_normal((1, 11, 17)), jnp.float32)
    waveform, direction = (jnp.asarray(RNG.standard_normal((1, 80)), jnp.float32) for _ in range(2))

    def loss(waveform):
        return jnp.sum(weights * power_spectrum(waveform, n_fft=32, hop_length=8, form=form))

    # The spectrum is quadratic in the waveform, so that a central difference is exact for any step.
    expected = (loss(waveform + direction) - loss(waveform - direction)) / 2
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(waveform), direction), expected, rtol=1e-4)
    silence = jax.grad(loss)(jnp.zeros((1, 80)))
    np.testing.assert_array_equal(silence, 0)


def test_istft_is_differentiable():
    spectrum = stft(jnp.asarray(WAVEFORM[:1, :200]), n_fft=32, hop_length=8)
    direction = stft(jnp.asarray(WAVEFORM[1:, :200]), n_fft=32, hop_length=8)

    def loss(amount):
        return jnp.sum(istft(spectrum + amount * direction, n_fft=32, hop_length=8) ** 2)

    expected = (loss(1.0) - loss(-1.0)) / 2
    np.testing.assert_allclose(jax.grad(loss)(0.0), expected, rtol=1e-4)


def test_hann_window_is_scipys_periodic_one():
    expected = scipy.signal.get_window("hann", 400)
    np.testing.assert_allclose(hann_window(400), expected, atol=1e-7)
    np.testing.assert_array_equal(hann_window(5, 9), np.pad(hann_window(5), 2))


def test_bad_arguments_are_refused():
    short = jnp.zeros((1, 32))
    with pytest.raises(ValueError, match="reflecting 32 samples at the ends needs at least 33 samples, got 32"):
        stft(short, n_fft=64, hop_length=16)
    with pytest.raises(ValueError, match="win_length <= n_fft = 16, got 17"):
        stft(short, n_fft=16, hop_length=4, win_length=17)
    with pytest.raises(ValueError, match="win_length <= n_fft = 16, got 0"):
        stft(short, n_fft=16, hop_length=4, win_length=0)
    spectrum = stft(short, n_fft=16, hop_length=4)
    with pytest.raises(ValueError, match="17 bins for n_fft = 32, got 9"):
        istft(spectrum, n_fft=32, hop_length=4)
    with pytest.raises(ValueError, match="9 frames give 1 to 40 samples, but length is 41"):
        istft(spectrum, n_fft=16, hop_length=4, length=41)
    with pytest.raises(ValueError, match="sample 0 is under no window.*hop_length 4, center False"):
        istft(spectrum, n_fft=16, hop_length=4, center=False)
    with pytest.raises(ValueError, match="sample 8 is under no window: win_length 16, hop_length 16"):
        istft(spectrum, n_fft=16, hop_length=16)
