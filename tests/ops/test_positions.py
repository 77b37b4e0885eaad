"""Position encodings against loops, complex numbers and the public peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from jaxaudio.ops.positions import rotate, sinusoids, t5_buckets


def tensor2tensor_sinusoids(position, dim):
    """get_timing_signal_1d: sin then cos, min_timescale 1, max_timescale 1e4."""
    half = dim // 2
    increment = np.log(1e4) / (half - 1)
    angles = [position * np.exp(-i * increment) for i in range(half)]
    return [np.sin(angle) for angle in angles] + [np.cos(angle) for angle in angles]


def musicgen_sinusoids(position, dim, max_period):
    """create_sin_embedding: cos then sin, max_period to a power instead of exp."""
    half = dim // 2
    angles = [position / max_period ** (i / (half - 1)) for i in range(half)]
    return [np.cos(angle) for angle in angles] + [np.sin(angle) for angle in angles]


def test_sinusoids_equal_both_formulas():
    positions = jnp.array([[0, 1, 2], [17, 39, 40]])
    ours = sinusoids(positions, 12)
    other = sinusoids(positions, 12, max_period=500.0, order="cos_sin")
    assert ours.shape == (2, 3, 12)
    for index in np.ndindex(2, 3):
        position = int(positions[index])
        np.testing.assert_allclose(ours[index], tensor2tensor_sinusoids(position, 12), atol=1e-5)
        np.testing.assert_allclose(other[index], musicgen_sinusoids(position, 12, 500.0), atol=1e-5)
    # A float32 phase of 2047 is only known to 1.2e-4, and its frequency to 6e-8 of itself.
    far = sinusoids(jnp.array([2047]), 64)[0]
    np.testing.assert_allclose(far, tensor2tensor_sinusoids(2047, 64), atol=5e-4)


@pytest.mark.parametrize("dim", [7, 2, 0])
def test_sinusoids_of_an_impossible_width_are_an_error(dim):
    with pytest.raises(ValueError, match=f"even dim of at least 4, got {dim}"):
        sinusoids(jnp.arange(3), dim)


def test_rotate_is_a_complex_multiplication():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 11, 40, 3]])
    ours = rotate(jnp.asarray(x), jnp.asarray(positions), base=500.0)
    pairs = x[..., :4] + 1j * x[..., 4:].astype(np.float64)
    phase = positions[..., None, None] * 500.0 ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * phase)
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)
    assert rotate(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions)).dtype == jnp.bfloat16


def test_rotate_equals_llama():
    rng = np.random.default_rng(1)
    query, key = (rng.standard_normal((2, 7, 3, 16)).astype(np.float32) for _ in range(2))
    frequencies = 1.0 / 1e4 ** (torch.arange(0, 16, 2).float() / 16)
    angles = (torch.arange(7).float()[:, None] * frequencies).repeat(1, 2)[None]
    heads_first = [torch.tensor(x).transpose(1, 2) for x in (query, key)]
    theirs = apply_rotary_pos_emb(*heads_first, angles.cos(), angles.sin())
    for x, expected in zip((query, key), theirs, strict=True):
        ours = rotate(jnp.asarray(x), jnp.arange(7)[None])
        np.testing.assert_allclose(ours, expected.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (20, 50)])
def test_buckets_equal_t5(sizes, bidirectional):
    options = {"num_buckets": sizes[0], "max_distance": sizes[1], "bidirectional": bidirectional}
    distance = np.arange(-300, 301).reshape(1, -1)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distance), **options).numpy()
    bucket = lambda x: t5_buckets(x, **options)  # noqa: E731
    np.testing.assert_array_equal(bucket(jnp.asarray(distance)), theirs)
    np.testing.assert_array_equal(jax.jit(bucket)(jnp.asarray(distance)), theirs)


def test_buckets_of_the_released_models():
    """First distance of each bucket, 32 buckets in both directions, max_distance 128."""
    starts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    expected = np.searchsorted(starts, np.arange(300), side="right") - 1
    np.testing.assert_array_equal(t5_buckets(-jnp.arange(300)), expected)
    np.testing.assert_array_equal(t5_buckets(jnp.arange(1, 300)), expected[1:] + 16)
    np.testing.assert_array_equal(t5_buckets(jnp.arange(300), bidirectional=False), np.zeros(300))
