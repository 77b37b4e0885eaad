import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import torch
from whisper.timing import dtw_cpu
from whisper.timing import median_filter as whisper_median_filter

from jaxaudio.ops.alignment import dtw, first_columns, median_filter


def _paths(costs, shape=None, fill=np.nan):
    """Paths of matrices of any sizes, in one padded batch."""
    sizes = np.array([cost.shape for cost in costs])
    padded = np.full((len(costs), *(shape or sizes.max(axis=0))), fill, np.float32)
    for row, cost in zip(padded, costs, strict=True):
        row[: cost.shape[0], : cost.shape[1]] = cost
    path = dtw(jnp.asarray(padded), *jnp.asarray(sizes.T))
    starts = np.asarray(first_columns(path, num_rows=padded.shape[1]))
    rows, columns, mask = (np.asarray(x) for x in path)
    return [(r[m], c[m], s[: len(x)]) for r, c, m, s, x in zip(rows, columns, mask, starts, costs, strict=True)]


def _costs(seed):
    rng = np.random.default_rng(seed)
    shapes = [(1, 1), (1, 17), (12, 1), (12, 17), (9, 17), (12, 4), (3, 3), (2, 16)]
    random = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    ties = [rng.integers(0, 3, shape).astype(np.float32) for shape in shapes]
    return [*random, *ties, np.zeros((7, 9), np.float32)]


@pytest.mark.parametrize("seed", range(5))
def test_dtw_equals_openai_whispers_path_in_an_uneven_batch(seed):
    costs = _costs(seed)
    for cost, (rows, columns, starts) in zip(costs, _paths(costs), strict=True):
        expected_rows, expected_columns = dtw_cpu(cost.astype(np.float64))
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_array_equal(columns, expected_columns)
        jumps = np.pad(np.diff(expected_rows), (1, 0), constant_values=1).astype(bool)
        np.testing.assert_array_equal(starts, expected_columns[jumps])


def test_dtw_of_a_recorded_matrix():
    ((rows, columns, starts),) = _paths([np.random.RandomState(0).rand(4, 9)], shape=(12, 17))
    np.testing.assert_array_equal(rows, [0, 0, 0, 0, 0, 1, 2, 3, 3])
    np.testing.assert_array_equal(columns, range(9))
    np.testing.assert_array_equal(starts, [0, 5, 6, 7])


@pytest.mark.parametrize("fill", [np.inf, -1e9])
def test_neither_neighbours_nor_padding_change_a_path(fill):
    costs = _costs(7)[:8]
    for cost, together in zip(costs, _paths(costs), strict=True):
        (alone,) = _paths([cost], shape=(12, 17), fill=fill)
        for ours, other in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ours, other)


def test_a_path_is_the_cheapest_of_all():
    cost = np.random.default_rng(3).standard_normal((4, 5))

    def cheapest(i, j):
        before = [cheapest(*c) for c in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(c) >= 0]
        return cost[i, j] + min(before, default=0.0)

    ((rows, columns, _),) = _paths([cost], shape=(12, 17))
    np.testing.assert_allclose(cost[rows, columns].sum(), cheapest(3, 4), rtol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 7, 11])
def test_median_filter_equals_openai_whispers_and_scipys(width):
    x = np.random.default_rng(width).standard_normal((2, 3, 40)).astype(np.float32)
    x[1] = np.round(x[1])  # ties
    ours = np.asarray(median_filter(jnp.asarray(x), width))
    np.testing.assert_array_equal(ours, whisper_median_filter(torch.tensor(x), width).numpy())
    np.testing.assert_array_equal(ours, scipy.ndimage.median_filter(x, size=(1, 1, width), mode="mirror"))


def test_median_filter_of_uneven_lengths_equals_each_alone():
    lengths = np.array([20, 13, 7, 5, 4, 3, 1])  # width 7 leaves 3 values and fewer as they are
    x = np.random.default_rng(0).standard_normal((len(lengths), 2, 20)).astype(np.float32)
    x[np.arange(20) >= lengths[:, None, None].repeat(2, axis=1)] = 1e9
    ours = np.asarray(median_filter(jnp.asarray(x), 7, jnp.asarray(lengths)))
    for row, filtered, length in zip(x, ours, lengths, strict=True):
        expected = whisper_median_filter(torch.tensor(row[:, :length]), 7).numpy()
        np.testing.assert_array_equal(filtered[:, :length], expected)


def test_an_axis_too_short_to_reflect_is_left_as_it_is():
    x = jnp.asarray([[3.0, 1.0, 2.0]])
    np.testing.assert_array_equal(median_filter(x, 7), x)


@pytest.mark.parametrize("width", [0, -3, 4])
def test_median_filter_names_a_width_that_is_not_odd(width):
    with pytest.raises(ValueError, match=f"odd and at least 1, got {width}"):
        median_filter(jnp.zeros((1, 9)), width)
