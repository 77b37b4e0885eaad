"""Codebooks learned without gradients: moving averages of the vectors that chose each code.

Van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, appendix A.1, for every level of a residual quantizer, with
the start by k-means and the replacement of dead codes of SoundStream (Zeghidour et al. 2021,
https://arxiv.org/abs/2107.03312, section III-C), EnCodec (https://arxiv.org/abs/2210.13438, section 3.2) and Mimi
(https://arxiv.org/abs/2410.00037, section 3.3).

Everything is a sum over the whole batch: where the batch is split over devices, jit makes the sums, the k-means and the
vectors drawn for dead codes those of all devices together, and all devices hold the same codebooks.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxaudio.ops.vector_quantize import nearest_codes

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK_ELEMENTS = 2**24  # of distances to codes at one time, 64 MiB


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    """How codebooks learn; the defaults are EnCodec's, and but for `smoothing`, of which it is silent, SoundStream's.

    Attributes:
      decay: d in average = d * average + (1 - d) * of this batch.
      smoothing: epsilon of the Laplace smoothing of usages; 0 divides by the usages as they are, as Mimi does.
      kmeans_iterations: of Lloyd's algorithm, at a level's start.
      dead_usage: a code that fewer vectors of a batch choose, on average, is replaced by a vector of the batch.
      dead_is_relative: `dead_usage` is a part of the mean usage of the level's codes, not a number of vectors, of which
        a small batch, or one with few rows that use the level, has too few for all codes.
      replace_every: updates from one replacement of dead codes to the next.

    Raises:
      ValueError: a number out of its range; with the value.
    """

    decay: float = 0.99
    smoothing: float = 1e-5
    kmeans_iterations: int = 50
    dead_usage: float = 2.0
    dead_is_relative: bool = False
    replace_every: int = 1

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        for name in ("smoothing", "dead_usage"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("kmeans_iterations", "replace_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dead_is_relative and self.dead_usage >= 1:
            raise ValueError(f"a relative dead_usage must be below 1, the mean's own part, got {self.dead_usage}")


MIMI = CodebookConfig(smoothing=0.0, dead_usage=0.1, dead_is_relative=True, replace_every=5)


class CodebookState(NamedTuple):
    """The statistics of Q codebooks of C codes; a tree of float32 arrays unless said.

    sums: (Q, C, E), moving average of the sum of the vectors that chose each code.
    usage: (Q, C), moving average of their number.
    is_started: (Q,) bool, whether a level has had its k-means; always the first levels.
    step: () int32, updates done.
    """

    sums: jax.Array
    usage: jax.Array
    is_started: jax.Array
    step: jax.Array


def init_codebooks(codebooks: Float[Array, "Q C E"]) -> CodebookState:
    """The state before the first update, with these codebooks and no level started.

    A level that is not started keeps its codes. Zeros are a good choice: such a level then adds nothing.
    """
    return CodebookState(
        sums=codebooks.astype(jnp.float32),
        usage=jnp.ones(codebooks.shape[:2], jnp.float32),
        is_started=jnp.zeros(codebooks.shape[0], bool),
        step=jnp.zeros((), jnp.int32),
    )


def codebook_vectors(state: CodebookState, config: CodebookConfig) -> Float[Array, "Q C E"]:
    """The codebooks: sums over usages. A code that was never used is the zero vector."""
    usage = state.usage
    if config.smoothing:
        total = jnp.sum(usage, axis=-1, keepdims=True)
        usage = (usage + config.smoothing) * (total / (total + usage.shape[-1] * config.smoothing))
    return state.sums / jnp.maximum(usage, 1e-5)[..., None]


def update_codebooks(
    state: CodebookState,
    residuals: Float[Array, "Q B T E"],
    codes: Int[Array, "B Q T"],
    mask: Bool[Array, "B Q"],
    key: Key[Array, ""],
    config: CodebookConfig,
) -> tuple[CodebookState, Float[Array, "Q C E"], dict[str, Float[Array, " Q"]]]:
    """Learns from a batch. In order:

    1. A started level's averages take in the batch.
    2. The first level that is not started gets its k-means, from this batch alone. The level behind it waits for the
       next update, whose residuals have been through this one.
    3. Every `replace_every` updates, dead codes of started levels become vectors of the batch, as if chosen as often as
       the level's mean. Sum and usage are both set anew: a code that got a new vector but kept its sum would be back at
       the next update. No two get the same vector; where a batch has fewer than dead codes, the others wait.

    A level that no row used stays as it is.

    Args:
      residuals: what each level quantized.
      codes: what each level chose, below C.
      mask: True where row b used level q; others count nowhere.
      key: consumed here.
    Returns:
      (the new state, its codebooks, {"perplexity", "dead_codes"}). The perplexity is that of the averaged usage, at
      most C; dead codes are counted before they are replaced. A level that is not started has 1 and C.
    Raises:
      ValueError: an absolute dead_usage is more than the vectors that a batch has for each code.
    """
    vectors_per_code = codes.shape[0] * codes.shape[2] / state.usage.shape[1]
    if not config.dead_is_relative and config.dead_usage > vectors_per_code:
        raise ValueError(
            f"dead_usage is {config.dead_usage} vectors, but a batch has {vectors_per_code:.3g} for each of"
            f" {state.usage.shape[1]} codes, so that all would be dead; make batches larger or dead_is_relative=True"
        )
    residuals = residuals.astype(jnp.float32)
    kmeans_key, replace_key = jax.random.split(key)
    is_used = jnp.any(mask, axis=0)
    level = jnp.sum(state.is_started)
    is_starting = is_used & (jnp.arange(len(is_used)) == level)
    is_learning = is_used & state.is_started

    counts, sums = _chosen(residuals, codes, mask, state.usage.shape[1])
    usage = jnp.where(is_learning[:, None], config.decay * state.usage + (1 - config.decay) * counts, state.usage)
    sums = jnp.where(is_learning[:, None, None], config.decay * state.sums + (1 - config.decay) * sums, state.sums)
    usage, sums = jax.lax.cond(
        jnp.any(is_starting),
        lambda: _start(level, usage, sums, residuals, mask, kmeans_key, config),
        lambda: (usage, sums),
    )

    is_started = state.is_started | is_starting
    mean = jnp.mean(usage, axis=-1, keepdims=True)
    is_dead = usage < config.dead_usage * (mean if config.dead_is_relative else 1.0)
    metrics = {
        "perplexity": jnp.where(is_started, _perplexity(usage), 1.0),
        "dead_codes": jnp.sum(is_dead | ~is_started[:, None], axis=-1, dtype=jnp.float32),
    }
    is_due = is_learning & ((state.step + 1) % config.replace_every == 0)
    is_replaced = is_dead & is_due[:, None]
    usage, sums = jax.lax.cond(
        jnp.any(is_replaced),
        lambda: _replace(is_replaced, usage, sums, residuals, mask, replace_key),
        lambda: (usage, sums),
    )
    state = CodebookState(sums, usage, is_started, state.step + 1)
    return state, codebook_vectors(state, config), metrics


def kmeans(
    vectors: Float[Array, "B T E"], mask: Bool[Array, " B"], centroids: Float[Array, "C E"], iterations: int
) -> tuple[Float[Array, " C"], Float[Array, "C E"], Float[Array, "C E"]]:
    """Lloyd's algorithm over the vectors of the rows that count.

    Args:
      centroids: to begin with; one to which no vector is nearest stays where it is.
      iterations: at least 1.
    Returns:
      (number of vectors nearest to each code, their sums, the new centroids), of the last iteration.
    """
    size = len(centroids)
    mask = jnp.broadcast_to(mask[:, None], vectors.shape[:2])

    def iteration(_, carry):
        centroids = carry[2]

        def assigned(vectors, mask):
            return _statistics(vectors, jnp.where(mask, nearest_codes(vectors, centroids), size), size)

        counts, sums = _sum_over_blocks(assigned, size, vectors, mask)
        means = sums / jnp.maximum(counts, 1)[:, None]
        return counts, sums, jnp.where(counts[:, None] > 0, means, centroids)

    return jax.lax.fori_loop(0, iterations, iteration, (jnp.zeros(size), jnp.zeros_like(centroids), centroids))


def draw_vectors(
    key: Key[Array, ""], vectors: Float[Array, "B T E"], mask: Bool[Array, " B"], count: int
) -> Float[Array, "N E"]:
    """`count` random vectors of the rows that count, different ones while there are enough, then the same again."""
    scores = jnp.where(mask[:, None], jax.random.uniform(key, vectors.shape[:2]), -1.0).reshape(-1)
    order = jax.lax.top_k(scores, min(count, len(scores)))[1]
    num_vectors = jnp.clip(jnp.sum(mask) * vectors.shape[1], 1, len(order))
    return vectors.reshape(-1, vectors.shape[-1])[order[jnp.arange(count) % num_vectors]]


def _start(level, usage, sums, residuals, mask, key, config):
    """Usage and sums with those of k-means at one level; a code without a vector is zero, and dead."""
    vectors, rows = residuals[level], mask[:, level]
    centroids = draw_vectors(key, vectors, rows, usage.shape[1])
    counts, new_sums, _ = kmeans(vectors, rows, centroids, config.kmeans_iterations)
    return usage.at[level].set(counts), sums.at[level].set(new_sums)


def _replace(is_dead, usage, sums, residuals, mask, key):
    """Usage and sums with those of new vectors for the dead codes."""

    def level(key, is_dead, vectors, rows):
        order = jnp.cumsum(is_dead) - 1
        new = draw_vectors(key, vectors, rows, len(is_dead))[order]
        return is_dead & (order < jnp.sum(rows) * vectors.shape[1]), new

    is_replaced, vectors = jax.vmap(level)(jax.random.split(key, len(usage)), is_dead, residuals, mask.T)
    mean = jnp.mean(usage, axis=-1, keepdims=True)
    usage = jnp.where(is_replaced, mean, usage)
    return usage, jnp.where(is_replaced[..., None], mean[..., None] * vectors, sums)


def _chosen(residuals, codes, mask, size: int):
    """How many vectors chose each code of each level (Q, C), and their sums (Q, C, E)."""
    codes = jnp.where(mask[..., None], codes, size)
    add = lambda vectors, codes: _statistics(vectors, codes, size)  # noqa: E731
    return jax.lax.map(lambda level: _sum_over_blocks(add, size, *level), (residuals, jnp.swapaxes(codes, 0, 1)))


def _statistics(vectors: jax.Array, codes: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Counts (C,) and sums (C, E) of vectors (B, T, E) by code (B, T); code C counts nowhere.

    As a product, because adding up by index is in no fixed order on a GPU.
    """
    chosen = jax.nn.one_hot(codes, size)
    return jnp.sum(chosen, axis=(0, 1)), jnp.einsum("btc,bte->ce", chosen, vectors, precision=_HIGHEST)


def _sum_over_blocks(function: Callable, size: int, *arrays: jax.Array):
    """`function` of arrays (B, T, ...), which adds up over B and T, with bounded memory.

    Blocks are of frames, since rows may be split over devices.
    """
    rows, frames = arrays[0].shape[:2]
    per_block = max(1, _BLOCK_ELEMENTS // (rows * size))
    if per_block >= frames:
        return function(*arrays)
    whole = frames - frames % per_block

    def add(total, start):
        blocks = (jax.lax.dynamic_slice_in_dim(array, start, per_block, axis=1) for array in arrays)
        return jax.tree.map(jnp.add, total, function(*blocks)), None

    rest = function(*(array[:, whole:] for array in arrays))
    return jax.lax.scan(add, rest, jnp.arange(0, whole, per_block))[0]


def _perplexity(usage: jax.Array) -> jax.Array:
    """exp of the entropy in nats of (Q, C) usages."""
    probability = usage / jnp.maximum(jnp.sum(usage, axis=-1, keepdims=True), 1e-5)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(probability), axis=-1))
