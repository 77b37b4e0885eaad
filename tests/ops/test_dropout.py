"""Dropout masks: the right rate, no pattern, and the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxaudio import sharding
from jaxaudio.ops.dropout import dropout, keep_mask

GENERATORS = ["jax", "hash"]
SHAPE = (64, 100, 157)  # a million entries; neither a power of two nor a multiple of one throughout


def mask(seed, rate, generator, shape=SHAPE):
    return np.asarray(keep_mask(jax.random.key(seed), shape, rate, generator))


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.97])
def test_rate_is_within_five_deviations_of_the_binomial(rate, generator):
    keep = mask(1, rate, generator)
    assert abs(keep.sum() - keep.size * (1 - rate)) <= 5 * np.sqrt(keep.size * rate * (1 - rate))


@pytest.mark.parametrize("generator", GENERATORS)
def test_entries_are_uncorrelated(generator):
    """Sums of products of neighbours along each axis, at several lags, and with masks of other keys, are N(0, 1)."""
    rate = 0.3
    keys = {seed: mask(seed, rate, generator) for seed in (1, 2, 12345)}
    centred = {seed: (keep - (1 - rate)) / np.sqrt(rate * (1 - rate)) for seed, keep in keys.items()}
    x = centred[1]
    pairs = [(x, centred[2]), (x, centred[12345])]
    for axis in range(3):
        for lag in (1, 2, 4, 16, 32):
            size = x.shape[axis]
            pairs.append((x.take(range(lag, size), axis), x.take(range(size - lag), axis)))
    flat = x.reshape(-1)
    pairs += [(flat[lag:], flat[:-lag]) for lag in (256, 4096, 65536)]
    scores = [np.sum(a * b) / np.sqrt(a.size) for a, b in pairs]
    assert np.max(np.abs(scores)) < 5
    # Sums over rows and columns vary as independent entries' sums do: variance 1, within five deviations of it.
    for axis in (0, 1, 2, (0, 1), (1, 2), (0, 2)):
        sums = x.sum(axis) / np.sqrt(np.prod([x.shape[a] for a in np.atleast_1d(axis)]))
        assert abs(np.mean(sums**2) - 1) < 5 * np.sqrt(2 / sums.size), axis


@pytest.mark.parametrize("generator", GENERATORS)
def test_mask_does_not_depend_on_its_sharding(generator):
    draw = lambda key: keep_mask(key, (16, 8, 24), 0.4, generator)  # noqa: E731
    with jax.debug_key_reuse(False):
        key = jax.random.key(5)
        whole = np.asarray(draw(key))
        mesh = sharding.make_mesh("data:2,fsdp:2,model:2")
        for spec in [(("data", "fsdp", "model"),), ("model", None, ("data", "fsdp")), (None, "data", "model")]:
            out = jax.sharding.NamedSharding(mesh, PartitionSpec(*spec))
            sharded = jax.jit(draw, out_shardings=out)(key)
            assert not sharded.is_fully_replicated
            np.testing.assert_array_equal(sharded, whole)


@pytest.mark.parametrize("generator", GENERATORS)
def test_kept_entries_grow_and_the_rest_are_zero(generator):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20, 30)), jnp.float32)
    with jax.debug_key_reuse(False):
        key = jax.random.key(2)
        keep = np.asarray(keep_mask(key, x.shape, 0.25, generator))
        np.testing.assert_allclose(dropout(key, x, 0.25, generator), np.where(keep, x / 0.75, 0), rtol=1e-6)
        assert dropout(key, x.astype(jnp.bfloat16), 0.25, generator).dtype == jnp.bfloat16
        assert not np.array_equal(keep, keep_mask(jax.random.key(3), x.shape, 0.25, generator))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_impossible_rates_are_errors(rate):
    with pytest.raises(ValueError, match=rf"\[0, 1\), got {rate}"):
        keep_mask(jax.random.key(0), (3,), rate)


def test_unknown_generator_is_an_error():
    # Below the type checks of the tests: what a user without them gets.
    with pytest.raises(ValueError, match="got 'xorshift'"):
        keep_mask.__wrapped__(jax.random.key(0), (3,), 0.5, "xorshift")
