"""8-bit weights against their definition, entry by entry."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudio.ops.quantization import dequantize, quantize


@pytest.mark.parametrize(("shape", "num_input_axes"), [((5, 4), 1), ((5, 3, 2), 1), ((3, 2, 5), 2)])
def test_every_entry_is_within_half_a_step(shape, num_input_axes):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    steps, scale = quantize(jnp.asarray(kernel), num_input_axes)
    assert steps.dtype == jnp.int8
    assert scale.shape == shape[num_input_axes:]
    for index in np.ndindex(*shape):
        output = index[num_input_axes:]
        column = kernel[(slice(None),) * num_input_axes + output]
        step = np.abs(column).max() / 127
        np.testing.assert_allclose(scale[output], step, rtol=1e-6)
        assert abs(int(steps[index]) * step - kernel[index]) <= step * 0.5001
    np.testing.assert_allclose(
        dequantize(steps, scale), np.asarray(steps) * np.asarray(scale)[(None,) * num_input_axes]
    )


def test_zeros_stay_zeros():
    steps, scale = quantize(jnp.zeros((3, 2)), 1)
    np.testing.assert_array_equal(dequantize(steps, scale), np.zeros((3, 2)))


def test_axes_beyond_the_rank_are_an_error():
    with pytest.raises(ValueError, match=r"in 1..2, the kernel's rank, got 3"):
        quantize(jnp.zeros((3, 2)), 3)
