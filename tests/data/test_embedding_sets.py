import dataclasses

import numpy as np
import pytest
import scipy.linalg

from jaxaudio.data.embedding_sets import Provenance, embedding_set, frechet_distance

RNG = np.random.default_rng(0)
PROVENANCE = Provenance("vggish", "ab12", 16000, 1, "none")


def slow_distance(a, b):
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sum(covariances) - 2 * root.real)


def test_distance_against_scipy_whatever_the_blocks():
    a, b = RNG.standard_normal((200, 8)), 3 + RNG.standard_normal((150, 8)) @ RNG.standard_normal((8, 8))
    sets = embedding_set([a], PROVENANCE), embedding_set(iter([b[:1], b[1:7], b[7:7], b[7:]]), PROVENANCE)
    assert [x.count for x in sets] == [200, 150]
    np.testing.assert_allclose(sets[1].mean, b.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sets[1].covariance, np.cov(b, rowvar=False), rtol=1e-10)
    np.testing.assert_allclose(frechet_distance(*sets), slow_distance(a, b), rtol=1e-8)
    np.testing.assert_allclose(frechet_distance(*sets[::-1]), slow_distance(a, b), rtol=1e-8)
    np.testing.assert_allclose(frechet_distance(sets[0], sets[0]), 0, atol=1e-10)


def test_distance_of_lines_by_hand():
    # In one dimension it is the squared distance of the means and of the standard deviations: 3^2 + (2 - 1)^2.
    a, b = np.array([[-1.0], [0], [1]]), np.array([[1.0], [3], [5]])
    np.testing.assert_allclose(frechet_distance(*(embedding_set([x], PROVENANCE) for x in (a, b))), 10)


def test_distance_of_singular_covariances():
    a, b = np.zeros((5, 6)), np.zeros((4, 6))
    a[:, 0], b[:, 1] = [-2, -1, 0, 1, 2], [-1.5, -0.5, 0.5, 1.5]  # variances 2.5 and 5/3, perpendicular
    sets = embedding_set([a], PROVENANCE), embedding_set([b], PROVENANCE)
    np.testing.assert_allclose(frechet_distance(*sets), 2.5 + 5 / 3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone", "clap", "backbone: 'vggish' and 'clap'"),
        ("weights_sha256", "cd34", "weights_sha256: 'ab12' and 'cd34'"),
        ("sample_rate", 48000, "sample_rate: 16000 and 48000"),
        ("num_channels", 2, "num_channels: 1 and 2"),
        ("loudness", "-14 LUFS per file", "loudness: 'none' and '-14 LUFS per file'"),
    ],
)
def test_unlike_provenance_is_refused(field, value, message):
    ours = embedding_set([RNG.standard_normal((4, 2))], PROVENANCE)
    theirs = dataclasses.replace(ours, provenance=dataclasses.replace(PROVENANCE, **{field: value}))
    with pytest.raises(ValueError, match=message):
        frechet_distance(ours, theirs)


def test_unusable_embeddings_are_refused():
    with pytest.raises(ValueError, match="1 embeddings have no covariance"):
        embedding_set([np.zeros((1, 3))], PROVENANCE)
    with pytest.raises(ValueError, match=r"array 1 .* shape \(2, 4\); expected \(N, 3\)"):
        embedding_set([np.zeros((2, 3)), np.zeros((2, 4))], PROVENANCE)
    with pytest.raises(ValueError, match=r"array 0 .* shape \(3,\); expected \(N, D\)"):
        embedding_set([np.zeros(3)], PROVENANCE)
    with pytest.raises(ValueError, match="array 1 .* not finite"):
        embedding_set([np.zeros((2, 3)), np.full((1, 3), np.nan)], PROVENANCE)
    sets = [embedding_set([np.eye(width)], PROVENANCE) for width in (3, 4)]
    with pytest.raises(ValueError, match="lengths are 3 and 4"):
        frechet_distance(*sets)
