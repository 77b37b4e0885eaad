import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from jaxaudio.ops.vector_quantize import dequantize, nearest_codes, residual_codes

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 9, 5)).astype(np.float32)
CODEBOOKS = (RNG.standard_normal((3, 17, 5)) * np.array([1, 0.5, 0.2])[:, None, None]).astype(np.float32)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_nearest_codes_equal_scipys(distance):
    expected = cdist(X.reshape(-1, 5), CODEBOOKS[0], distance).argmin(1).reshape(2, 9)
    np.testing.assert_array_equal(nearest_codes(jnp.asarray(X), jnp.asarray(CODEBOOKS[0]), distance), expected)


def test_first_of_equals():
    codebook = jnp.array([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0]])
    assert nearest_codes(jnp.array([0.9, 0.0]), codebook) == 1


def test_residual_codes_equal_a_slow_loop_and_dequantize_sums_them():
    codes = np.asarray(jax.jit(residual_codes)(jnp.asarray(X), jnp.asarray(CODEBOOKS)))
    assert codes.shape == (2, 3, 9)
    for row in range(2):
        for step in range(9):
            residual = X[row, step].astype(np.float64)
            for level in range(3):
                code = ((residual - CODEBOOKS[level]) ** 2).sum(1).argmin()
                assert codes[row, level, step] == code
                residual = residual - CODEBOOKS[level][code]
            restored = sum(CODEBOOKS[level][codes[row, level, step]] for level in range(3))
            got = dequantize(jnp.asarray(codes), jnp.asarray(CODEBOOKS))[row, step]
            np.testing.assert_allclose(got, restored, atol=1e-5)
    first = dequantize(jnp.asarray(codes[:, :1]), jnp.asarray(CODEBOOKS))
    np.testing.assert_array_equal(first, CODEBOOKS[0][codes[:, 0]])
    assert np.abs(X - first).sum() > np.abs(X - dequantize(jnp.asarray(codes), jnp.asarray(CODEBOOKS))).sum()
