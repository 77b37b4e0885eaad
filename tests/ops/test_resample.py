"""Resampling equals SciPy's polyphase filter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from jaxaudio.ops.resample import resample

RNG = np.random.default_rng(0)
RATIOS = [(1, 2), (1, 3), (2, 3), (3, 2), (3, 1), (160, 441), (147, 160), (640, 441), (10, 11), (6, 4)]


@pytest.mark.parametrize(("up", "down"), RATIOS)
@pytest.mark.parametrize("num_samples", [1, 1999])
def test_resampling_equals_scipys(up, down, num_samples):
    waveform = RNG.standard_normal((2, num_samples)).astype(np.float32)
    expected = scipy.signal.resample_poly(waveform.astype(np.float64), up, down, axis=1)
    np.testing.assert_allclose(resample(jnp.asarray(waveform), up, down), expected, rtol=1e-5, atol=1e-5)


def test_every_length_around_a_block_equals_scipys():
    for num_samples in range(28, 34):  # 20 inputs and 30 outputs are a block
        waveform = RNG.standard_normal((1, num_samples)).astype(np.float32)
        expected = scipy.signal.resample_poly(waveform.astype(np.float64), 3, 2, axis=1)
        np.testing.assert_allclose(resample(jnp.asarray(waveform), 3, 2), expected, rtol=1e-5, atol=1e-5)


def test_equal_rates_change_nothing():
    waveform = jnp.asarray(RNG.standard_normal((2, 5)), jnp.float32)
    np.testing.assert_array_equal(resample(waveform, 441, 441), waveform)


def test_gradient_is_the_transposed_filter():
    """The sum of a low-passed waveform times anything has the gradient that SciPy's response to each impulse gives."""
    weights = RNG.standard_normal((1, 27)).astype(np.float32)
    expected = scipy.signal.resample_poly(np.eye(40), 2, 3, axis=1) @ weights[0]
    gradient = jax.grad(lambda waveform: jnp.sum(weights * resample(waveform, 2, 3)))(jnp.zeros((1, 40)))
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-5, atol=1e-5)


def test_bad_ratios_are_refused():
    with pytest.raises(ValueError, match="positive up and down, got up = 0 and down = 3"):
        resample(jnp.zeros((1, 8)), 0, 3)
    with pytest.raises(ValueError, match=r"up = 15991 and down = 16000 .* matrix of 16020 x 15991"):
        resample(jnp.zeros((1, 8)), 15_991, 16_000)
