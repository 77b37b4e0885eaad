"""The Fréchet distance of two sets of embeddings that know where they come from. NumPy, float64.

On the host because a matrix square root needs more than float32, and because sets are gathered there file by file.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What embeddings depend on beside the audio; distances are comparable between equal ones alone.

    Attributes:
      backbone: name of the model.
      weights_sha256: hash of its weights, in hex: models of one name differ.
      sample_rate: in Hz, of what the model heard.
      num_channels: of what the model heard.
      loudness: how levels were set before ("none", "peak 1 per file", "-14 LUFS per file").
    """

    backbone: str
    weights_sha256: str
    sample_rate: int
    num_channels: int
    loudness: str


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingSet:
    """A set of embeddings as the Gaussian that the Fréchet distance takes it for.

    Attributes:
      mean: (D,) float64.
      covariance: (D, D) float64, unbiased.
      count: embeddings in the set.
      provenance: where they come from.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    provenance: Provenance


def embedding_set(embeddings: Iterable[np.ndarray], provenance: Provenance) -> EmbeddingSet:
    """Gathers arrays (N, D) of embeddings, such as one array for each file; all are never in memory at once.

    Raises:
      ValueError: fewer than two embeddings, an array of another shape than (N, D), or a value that is not finite; the
        message carries the number, the shapes or the array's position.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for position, block in enumerate(embeddings):
        if block.ndim != 2 or (count and block.shape[1] != len(mean)):
            width = len(mean) if count else "D"
            raise ValueError(f"array {position} of the embeddings has shape {block.shape}; expected (N, {width})")
        if not np.isfinite(block).all():
            raise ValueError(f"array {position} of the embeddings has a value that is not finite; find its file")
        if not len(block):
            continue
        block = block.astype(np.float64)
        if not count:
            mean, scatter = np.zeros(block.shape[1]), np.zeros((block.shape[1],) * 2)
        block_mean = block.mean(axis=0)
        centred, step = block - block_mean, block_mean - mean
        total = count + len(block)
        scatter += centred.T @ centred + np.outer(step, step) * (count * len(block) / total)
        mean = mean + step * (len(block) / total)
        count = total
    if count < 2:
        raise ValueError(f"{count} embeddings have no covariance; expected at least 2, better more than their length")
    return EmbeddingSet(mean, scatter / (count - 1), count, provenance)


def frechet_distance(a: EmbeddingSet, b: EmbeddingSet) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the Fréchet audio distance of two sets.

    Kilgour et al. 2019, https://arxiv.org/abs/1812.08466, equation 1. The trace of the root is that of the symmetric
    (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2), whose eigenvalues are real also where the covariances are singular. Sets that
    are small beside the length of an embedding are farther apart than their sources.

    Raises:
      ValueError: the sets have different provenance or lengths of embeddings; the message names both.
    """
    sides = dataclasses.asdict(a.provenance), dataclasses.asdict(b.provenance)
    pairs = {name: (sides[0][name], sides[1][name]) for name in sides[0]}
    unlike = [f"{name}: {ours!r} and {theirs!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if unlike:
        raise ValueError(
            f"these embeddings cannot be compared, they differ in {'; '.join(unlike)}. Embed one of the sets again"
        )
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"these embeddings cannot be compared, their lengths are {len(a.mean)} and {len(b.mean)}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    overlap = np.linalg.eigvalsh(root @ b.covariance @ root)
    step = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(overlap, 0)).sum()
    return float(step @ step + trace)
