import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudio.ops.spec_augment import SpecAugmentConfig, spec_augment, warp_time

NONE = {"time_warp": 0, "num_frequency_masks": 0, "num_time_masks": 0}


def random_mel(rows, frames=60, mels=20, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, frames, mels)), jnp.float32)


@pytest.fixture(scope="module")
def masked():
    """40 spectrograms with two bands of up to 6 mels and two stretches of up to 9 frames."""
    mel = random_mel(40)
    config = SpecAugmentConfig(0, 6, 2, 20, 2, max_time_fraction=0.15)
    return mel, np.asarray(jax.jit(spec_augment, static_argnums=2)(jax.random.key(0), mel, config))


def runs(flags):
    """Lengths of the stretches of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags, [0]])))
    return edges[1::2] - edges[::2]


def test_masks_are_bands_and_stretches_of_the_mean_and_the_rest_is_untouched(masked):
    mel, out = map(np.asarray, masked)
    widths, heights = [], []
    for before, after in zip(mel, out, strict=True):
        changed = before != after
        np.testing.assert_allclose(after[changed], before.mean(), atol=1e-6)
        frames, bands = changed.all(axis=1), changed.all(axis=0)
        np.testing.assert_array_equal(changed, frames[:, None] | bands[None, :])
        widths.append(runs(frames))
        heights.append(runs(bands))
    for found, widest in ((widths, 9), (heights, 6)):  # 9 is 0.15 of 60 frames; two may touch or overlap
        assert all(len(row) <= 2 and row.sum() <= 2 * widest for row in found)
        alone = np.concatenate([row for row in found if len(row) == 2])
        assert alone.max() == widest
        assert alone.min() == 1
        assert {len(row) for row in found} >= {1, 2}


def test_each_example_is_augmented_on_its_own(masked):
    changed = np.concatenate(masked, axis=2).reshape(40, -1)
    assert len(np.unique(changed, axis=0)) == 40
    same = jnp.repeat(random_mel(1), 8, axis=0)
    out = np.asarray(spec_augment(jax.random.key(1), same, SpecAugmentConfig(5, 6, 1, 9, 1)))
    assert len(np.unique(out.reshape(8, -1), axis=0)) == 8


def test_librispeech_basic_is_the_default():
    config = SpecAugmentConfig()
    assert (config.time_warp, config.frequency_mask, config.num_frequency_masks) == (80, 27, 1)
    assert (config.time_mask, config.num_time_masks, config.max_time_fraction) == (100, 1, 1.0)
    mel = random_mel(2, 200, 80)
    out = spec_augment(jax.random.key(0), mel)
    np.testing.assert_array_equal(out, spec_augment(jax.random.key(0), mel, config))
    assert np.isfinite(out).all()


def test_nothing_to_do_changes_nothing():
    mel = random_mel(2)
    np.testing.assert_array_equal(spec_augment(jax.random.key(0), mel, SpecAugmentConfig(**NONE)), mel)


@pytest.mark.parametrize(("source", "target"), [(10, 20), (20, 10), (15, 15), (1, 29), (29, 1), (7, 8)])
def test_time_warp_is_linear_interpolation_between_three_points(source, target):
    mel = random_mel(1, 30, 3)[0]
    # The frame that lands on output t, by numpy's interpolation of the points (0, target, last) -> (0, source, last).
    points = {0: 0, target: source, 29: 29} if target < 29 else {0: 0, 29: 29}
    where = np.interp(np.arange(30), list(points), list(points.values()))
    if target == 29:  # the whole spectrogram is left of the point
        where = np.append(np.arange(29) * source / target, 29)
    expected = np.stack([np.interp(where, np.arange(30), band) for band in mel.T], axis=1)
    found = jax.jit(warp_time)(mel, jnp.int32(source), jnp.int32(target))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_warps_move_points_by_less_than_w_and_keep_the_ends():
    ramp = jnp.broadcast_to(jnp.arange(60, dtype=jnp.float32)[None, :, None], (64, 60, 2))
    out = np.asarray(spec_augment(jax.random.key(3), ramp, SpecAugmentConfig(**NONE | {"time_warp": 8})))[..., 0]
    np.testing.assert_allclose(out[:, [0, -1]], [[0, 59]] * 64, atol=1e-4)
    assert (np.diff(out, axis=1) > 0).all()
    shifts = np.abs(out - np.arange(60)).max(axis=1)
    assert shifts.max() < 8
    assert shifts.max() > 6


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"time_warp": -1}, "time_warp must be at least 0, got -1"),
        ({"num_time_masks": -2}, "num_time_masks must be at least 0, got -2"),
        ({"max_time_fraction": 1.5}, r"max_time_fraction must be in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_policies(fields, match):
    with pytest.raises(ValueError, match=match):
        SpecAugmentConfig(**fields)


def test_policies_that_do_not_fit():
    with pytest.raises(ValueError, match="time_warp 30 needs more than twice as many frames, got 60"):
        spec_augment(jax.random.key(0), random_mel(1), SpecAugmentConfig(time_warp=30))
    with pytest.raises(ValueError, match="frequency_mask 21 is wider than 20 mels"):
        spec_augment(jax.random.key(0), random_mel(1), SpecAugmentConfig(0, 21))
