import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from jaxaudio import sharding
from jaxaudio.ops import codebook_ema
from jaxaudio.ops.codebook_ema import (
    MIMI,
    CodebookConfig,
    CodebookState,
    codebook_vectors,
    draw_vectors,
    init_codebooks,
    kmeans,
    update_codebooks,
)

Q, C, E, B, T = 3, 8, 4, 16, 12
# Nothing is ever dead, nothing is smoothed: only the averages.
PLAIN = CodebookConfig(decay=0.9, smoothing=0.0, kmeans_iterations=5, dead_usage=0.0)
NO_ROWS = np.zeros((B, Q), bool)


@functools.partial(jax.jit, static_argnames="config")
def update(state, residuals, codes, mask, key, config):
    return update_codebooks(state, residuals, codes, mask, key, config)


def random_batch(seed=0):
    """Residuals, codes, and rows that use 1 to Q levels."""
    rng = np.random.default_rng(seed)
    residuals = rng.normal(size=(Q, B, T, E)).astype(np.float32)
    mask = np.arange(Q)[None] < rng.integers(1, Q + 1, (B, 1))
    return residuals, rng.integers(0, C, (B, Q, T)).astype(np.int32), mask


def started_state(seed=1):
    """A state in the middle of training: random averages, every level started."""
    rng = np.random.default_rng(seed)
    state = init_codebooks(jnp.asarray(rng.normal(size=(Q, C, E)), jnp.float32))
    return state._replace(usage=jnp.asarray(rng.uniform(1, 20, (Q, C)), jnp.float32), is_started=jnp.ones(Q, bool))


def slow_update(sums, usage, residuals, codes, mask, decay):
    """The moving averages, one vector at a time."""
    new_sums, new_usage = decay * sums, decay * usage
    for row in range(B):
        for level in range(Q):
            for frame in range(T):
                if mask[row, level]:
                    code = codes[row, level, frame]
                    new_usage[level, code] += 1 - decay
                    new_sums[level, code] += (1 - decay) * residuals[level, row, frame]
    return new_sums, new_usage


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_averages_equal_a_slow_loop(smoothing, monkeypatch):
    config = CodebookConfig(decay=0.9, smoothing=smoothing, dead_usage=0.0)
    if smoothing:  # blocks of 5 frames, the last of 2
        monkeypatch.setattr(codebook_ema, "_BLOCK_ELEMENTS", 5 * B * C)
    state = started_state()
    sums, usage = np.float64(state.sums), np.float64(state.usage)
    step = jax.jit(lambda *args: update_codebooks(*args, config))
    for seed in range(3):
        residuals, codes, mask = random_batch(seed)
        state, codebooks, metrics = step(state, residuals, codes, mask, jax.random.key(seed))
        sums, usage = slow_update(sums, usage, residuals, codes, mask, 0.9)
    np.testing.assert_allclose(state.sums, sums, atol=1e-5)
    np.testing.assert_allclose(state.usage, usage, rtol=1e-5)
    total = usage.sum(-1, keepdims=True)
    smoothed = (usage + smoothing) / (total + C * smoothing) * total
    np.testing.assert_allclose(codebooks, sums / smoothed[..., None], atol=1e-5)
    probability = usage / total
    np.testing.assert_allclose(metrics["perplexity"], np.exp(-(probability * np.log(probability)).sum(-1)), rtol=1e-5)
    assert int(state.step) == 3


def test_a_level_that_no_row_used_stays():
    state, (residuals, codes, _) = started_state(), random_batch()
    mask = NO_ROWS.copy()
    mask[:, 0] = True
    config = CodebookConfig(dead_usage=19.0)
    new, _, _ = update(state, residuals, codes, mask, jax.random.key(0), config)
    np.testing.assert_array_equal(new.sums[1:], state.sums[1:])
    np.testing.assert_array_equal(new.usage[1:], state.usage[1:])
    assert not np.array_equal(new.sums[0], state.sums[0])


def test_kmeans_equals_scipy():
    rng = np.random.default_rng(0)
    vectors, mask = rng.normal(size=(B, T, E)).astype(np.float32), rng.random(B) < 0.7
    kept = vectors[mask].reshape(-1, E)
    start = kept[:C]
    counts, sums, centroids = jax.jit(kmeans, static_argnums=3)(vectors, mask, start, 4)
    expected, _ = kmeans2(np.float64(kept), np.float64(start), iter=4, minit="matrix")
    np.testing.assert_allclose(centroids, expected, atol=1e-5)
    np.testing.assert_allclose(sums / counts[:, None], expected, atol=1e-5)
    assert counts.sum() == len(kept)


def test_kmeans_leaves_an_empty_cluster_where_it_is():
    vectors = jnp.asarray([[[0.0], [1.0], [4.0], [5.0]]])
    counts, sums, centroids = kmeans(vectors, jnp.ones(1, bool), jnp.asarray([[0.0], [5.0], [99.0]]), 3)
    np.testing.assert_allclose(centroids[:, 0], [0.5, 4.5, 99.0])
    np.testing.assert_array_equal(counts, [2, 2, 0])
    np.testing.assert_allclose(sums[:, 0], [1, 9, 0])


def test_drawn_vectors_are_different_rows_that_count():
    vectors = jnp.arange(20.0).reshape(4, 5, 1)
    mask = jnp.asarray([True, False, True, False])
    allowed = set(vectors[mask].reshape(-1).tolist())
    drawn = [draw_vectors(jax.random.key(seed), vectors, mask, 10)[:, 0].tolist() for seed in range(2)]
    assert set(drawn[0]) == set(drawn[1]) == allowed
    assert drawn[0] != drawn[1]
    more = draw_vectors(jax.random.key(0), vectors, mask, 25)[:, 0].tolist()
    assert more == (drawn[0] * 3)[:25]


def test_levels_start_one_after_the_other():
    state = init_codebooks(jnp.zeros((Q, C, E)))
    rng = np.random.default_rng(0)
    z = rng.normal(size=(B, T, E)).astype(np.float32)
    mask = np.ones((B, Q), bool)
    codebooks, history = np.zeros((Q, C, E)), []
    for step in range(Q + 1):
        codes, residuals = quantize(jnp.asarray(z), jnp.asarray(codebooks))
        before = codebooks
        state, codebooks, metrics = update(state, residuals, codes, mask, jax.random.key(step), PLAIN)
        assert state.is_started.tolist() == [level <= step for level in range(Q)]
        np.testing.assert_array_equal(codebooks[step + 1 :], before[step + 1 :])
        np.testing.assert_array_equal(metrics["dead_codes"][step + 1 :], C)
        np.testing.assert_array_equal(metrics["perplexity"][step + 1 :], 1)
        assert np.all(metrics["perplexity"][: step + 1] > C / 2)
        if step < Q:  # started by k-means of the residuals that the levels before it left
            start = draw_vectors(start_key(step), residuals[step], jnp.ones(B, bool), C)
            expected, _ = kmeans2(np.float64(residuals[step].reshape(-1, E)), np.float64(start), 5, minit="matrix")
            np.testing.assert_allclose(codebooks[step], expected, atol=1e-5)
        history.append(float(np.mean(np.square(residuals[-1]))))
    assert history[0] > history[1] > history[2]  # each level that started leaves less to the last


def start_key(step):
    return jax.random.split(jax.random.key(step))[0]


def test_a_level_waits_for_rows_that_use_it():
    residuals, codes, _ = random_batch()
    state = init_codebooks(jnp.zeros((Q, C, E)))
    mask = NO_ROWS.copy()
    mask[:, 0] = True
    for step in range(3):
        state, _, _ = update(state, residuals, codes, mask, jax.random.key(step), PLAIN)
        assert state.is_started.tolist() == [True, False, False]
    mask[0, 1] = True  # one row is enough, and only its vectors count
    state, codebooks, _ = update(state, residuals, codes, mask, jax.random.key(9), PLAIN)
    assert state.is_started.tolist() == [True, True, False]
    assert float(state.usage[1].sum()) == T


def test_batches_with_fewer_vectors_than_codes_fill_the_codebook_one_after_the_other():
    config = CodebookConfig(kmeans_iterations=2, dead_usage=0.1, dead_is_relative=True)
    size, codebooks = 2 * T + 3, jnp.zeros((1, 2 * T + 3, E))
    state = init_codebooks(codebooks)
    mask = np.arange(B)[:, None] == 3  # one row of T vectors
    seen, known = [], []
    for step in range(3):
        z = jnp.asarray(np.random.default_rng(step).normal(size=(B, T, E)), jnp.float32)
        codes, residuals = quantize(z, codebooks)
        state, codebooks, metrics = update(state, residuals, codes, mask, jax.random.key(step), config)
        seen += np.asarray(z[3]).tolist()
        known.append(sum(np.abs(np.asarray(codebooks[0]) - vector).max(-1).min() < 0.1 for vector in np.array(seen)))
        assert float(metrics["dead_codes"][0]) == [size - T, size - T, size - 2 * T][step]
    assert known[:2] == [T, 2 * T]
    assert len(np.unique(np.round(codebooks[0], 3), axis=0)) == size


@jax.jit
def quantize(z, codebooks):
    """Codes (B, Q, T) and residuals (Q, B, T, E) of latents (B, T, E)."""
    codes, residuals = [], []
    for codebook in codebooks:
        distances = jnp.sum(jnp.square(z[:, :, None] - codebook[None, None]), axis=-1)
        residuals.append(z)
        codes.append(jnp.argmin(distances, axis=-1))
        z = z - codebook[codes[-1]]
    return jnp.stack(codes, axis=1).astype(jnp.int32), jnp.stack(residuals)


@pytest.mark.parametrize("config", [CodebookConfig(dead_usage=2.0), MIMI])
def test_a_dead_code_moves_and_is_used_afterwards(config):
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(B, T, E)), jnp.float32)
    codebook = np.float32(rng.normal(size=(1, C, E)))
    codebook[0, 5] = 1000.0  # nothing is near it
    usage = np.full((1, C), B * T / C, np.float32)
    usage[0, 5] = 0.01
    state = CodebookState(jnp.asarray(codebook * usage[..., None]), jnp.asarray(usage), jnp.ones(1, bool), jnp.int32(4))
    codes, residuals = quantize(z, jnp.asarray(codebook))
    assert not np.any(codes == 5)
    mask = np.ones((B, 1), bool)
    mask[0] = False
    state, codebooks, metrics = update(state, residuals, codes, mask, jax.random.key(0), config)
    assert metrics["dead_codes"].tolist() == [1]
    moved = np.abs(z[1:].reshape(-1, E) - codebooks[0, 5][None]).max(-1)
    assert moved.min() < 1e-4  # it is a vector of a row that counts
    np.testing.assert_allclose(state.usage[0, 5], (state.usage.sum() - state.usage[0, 5]) / (C - 1), rtol=0.15)
    np.testing.assert_allclose(state.sums[0, 5], state.usage[0, 5] * codebooks[0, 5], rtol=1e-5)
    for step in range(3):  # it stays there, near vectors that choose it
        codes, residuals = quantize(z, codebooks)
        assert np.any(codes == 5)
        state, codebooks, metrics = update(state, residuals, codes, mask, jax.random.key(step), config)
        assert metrics["dead_codes"].tolist() == [0]


def test_dead_codes_are_replaced_every_n_updates():
    config = CodebookConfig(dead_usage=0.5, dead_is_relative=True, replace_every=3)
    residuals, codes, mask = random_batch()
    codes = np.minimum(codes, C - 2)  # the last code is never chosen
    state = started_state()
    state = state._replace(usage=state.usage.at[:, -1].set(1e-3))
    low = []
    for step in range(6):
        state, _, metrics = update(state, residuals, codes, mask, jax.random.key(step), config)
        low.append(bool(np.all(state.usage[:, -1] < 1)))
        assert bool(np.all(metrics["dead_codes"] >= 1)) == (step < 3)
    assert low == [True, True, False, False, False, False]


def test_a_mixture_with_as_many_clusters_as_codes_keeps_all_codes_alive():
    rng = np.random.default_rng(3)
    centers = 10 * rng.normal(size=(C, E))
    # High enough for one of two codes that share a cluster, where k-means alone would leave them.
    config = CodebookConfig(decay=0.8, kmeans_iterations=3, dead_usage=0.7, dead_is_relative=True)
    state, codebooks = init_codebooks(jnp.zeros((1, C, E))), jnp.zeros((1, C, E))
    for step in range(60):
        z = centers[rng.integers(0, C, (B, T))] + 0.1 * rng.normal(size=(B, T, E))
        codes, residuals = quantize(jnp.asarray(z, jnp.float32), codebooks)
        mask = np.ones((B, 1), bool)
        state, codebooks, metrics = update(state, residuals, codes, mask, jax.random.key(step), config)
    assert metrics["dead_codes"].tolist() == [0]
    assert metrics["perplexity"][0] > 0.95 * C
    distances = np.linalg.norm(np.asarray(codebooks)[0][None] - centers[:, None], axis=-1)
    assert distances.min(axis=1).max() < 0.5  # a code for each cluster


def run(num_devices):
    """Six updates from the start, with three k-means, dead codes and rows of fewer levels."""
    config = CodebookConfig(decay=0.7, kmeans_iterations=4, dead_usage=0.6, dead_is_relative=True)
    mesh = sharding.make_mesh("data:-1", jax.devices()[:num_devices])
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh, sharding.DATA)

    def step(state, z, mask, key):
        codes, residuals = quantize(z, codebook_vectors(state, config))
        state, _, metrics = update_codebooks(state, residuals, codes, mask, key, config)
        return state, codes, metrics

    state = init_codebooks(jnp.zeros((Q, C, E)))
    shardings = {"in_shardings": (whole, rows, rows, whole), "out_shardings": (whole, rows, whole)}
    step = jax.jit(step, **shardings)
    state = jax.device_put(state, whole)
    rng = np.random.default_rng(0)
    history, num_dead = [], 0
    for index in range(6):
        z = rng.normal(size=(B, T, E)).astype(np.float32)
        mask = np.arange(Q)[None] < rng.integers(1, Q + 1, (B, 1))
        args = state, jax.device_put(z, rows), jax.device_put(mask, rows), jax.random.key(index)
        if index == 0:
            program = step.lower(*args).compile().as_text()
        state, codes, metrics = step(*args)
        history.append(np.asarray(codes))
        num_dead += float(metrics["dead_codes"].sum())
    return jax.device_get(state), history, num_dead, program


def test_statistics_are_those_of_all_devices():
    state, codes, num_dead, _ = run(1)
    sharded, sharded_codes, sharded_dead, program = run(8)
    for one, eight in zip(codes, sharded_codes, strict=True):
        np.testing.assert_array_equal(eight, one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), sharded, state)
    assert sharded_dead == num_dead > 3 * C  # more than those of the levels that had not started
    # No device gets to see all vectors, of one level or of all.
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", program)
    assert not [shape for shape in gathered if np.prod([int(n) for n in shape.split(",")]) >= B * T * E]


def test_errors():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1.0"):
        CodebookConfig(decay=1.0)
    with pytest.raises(ValueError, match="smoothing must be at least 0, got -0.1"):
        CodebookConfig(smoothing=-0.1)
    with pytest.raises(ValueError, match="dead_usage must be at least 0, got -1"):
        CodebookConfig(dead_usage=-1.0)
    with pytest.raises(ValueError, match="kmeans_iterations must be at least 1, got 0"):
        CodebookConfig(kmeans_iterations=0)
    with pytest.raises(ValueError, match="replace_every must be at least 1, got 0"):
        CodebookConfig(replace_every=0)
    with pytest.raises(ValueError, match="relative dead_usage must be below 1, the mean's own part, got 2.0"):
        CodebookConfig(dead_is_relative=True)
    residuals, codes, mask = random_batch()
    state = init_codebooks(jnp.zeros((Q, 100, E)))
    with pytest.raises(ValueError, match="dead_usage is 2.0 vectors, but a batch has 1.92 for each of 100 codes"):
        update(state, residuals, codes, mask, jax.random.key(0), CodebookConfig())
