"""Groups of hypotheses: independent samples or the beams of a search, chosen by data rather than by program.

Letters: B audios, G hypotheses of an audio, K kept finished ones, V vocabulary, L sampled tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxaudio.ops.sampling import most_likely


class Search(NamedTuple):
    """How each audio is searched.

    Attributes:
      width: how many of the G hypotheses are in use; 0 leaves the audio out.
      is_beam: beam search; otherwise every hypothesis is sampled on its own.
      temperature: of sampling; 0 takes the most likely token.
      max_finished: how many finished beams end the search: the width times the patience (Kasai et al. 2022).
      max_tokens: how many tokens are sampled at most.
    """

    width: Int[Array, " B"]
    is_beam: Bool[Array, " B"]
    temperature: Float[Array, " B"]
    max_finished: Int[Array, " B"]
    max_tokens: Int[Array, " B"]


class Hypotheses(NamedTuple):
    """The state of a search.

    Attributes:
      step: tokens sampled so far.
      tokens: the sampled ones, end-of-text where none was sampled.
      scores: sums of log-probabilities.
      writers: which hypothesis of the group wrote a step's keys and values: beams do not move their caches but remember
        whose they continue.
      done: whether the audio's search has ended; nothing of it changes then.
      finished, finished_scores, finished_lengths, num_finished: beams that have ended, in the order they did; the
        lengths are without end-of-text.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B G L"]
    scores: Float[Array, "B G"]
    writers: Int[Array, "B G L"]
    done: Bool[Array, " B"]
    finished: Int[Array, "B K L"]
    finished_scores: Float[Array, "B K"]
    finished_lengths: Int[Array, "B K"]
    num_finished: Int[Array, " B"]


def start(search: Search, group_size: int, max_tokens: int, max_finished: int, eot: int) -> Hypotheses:
    """Nothing sampled yet. Of a beam search only the first hypothesis counts, since all would begin alike."""
    batch = len(search.width)
    row = jnp.arange(group_size)[None]
    out = (row >= search.width[:, None]) | (search.is_beam[:, None] & (row > 0))
    return Hypotheses(
        step=jnp.int32(0),
        tokens=jnp.full((batch, group_size, max_tokens), eot, jnp.int32),
        scores=jnp.where(out, -jnp.inf, 0.0),
        writers=jnp.zeros((batch, group_size, max_tokens), jnp.int32),
        done=search.width == 0,
        finished=jnp.full((batch, max_finished, max_tokens), eot, jnp.int32),
        finished_scores=jnp.full((batch, max_finished), -jnp.inf, jnp.float32),
        finished_lengths=jnp.zeros((batch, max_finished), jnp.int32),
        num_finished=jnp.zeros(batch, jnp.int32),
    )


def advance(
    state: Hypotheses, logits: Float[Array, "B G V"], search: Search, keys: Key[Array, "B G"], eot: int
) -> Hypotheses:
    """Every hypothesis gets its next token; `logits` are those that the rules have left."""
    group_size = logits.shape[1]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    sampled = _sampled(state, logits, normaliser, search, keys, eot)
    if group_size > 1:
        beams = lax.cond(
            jnp.any(search.is_beam & ~state.done),
            lambda: _beams(state, logits, normaliser, search, eot),
            lambda: sampled,
        )
        sampled = _select(search.is_beam, beams, sampled)
    state = _select(state.done, state, sampled)
    step = state.step + 1
    every_ended = jnp.all(_last(state, state.step) == eot, axis=-1)
    ended = jnp.where(search.is_beam & (group_size > 1), state.num_finished >= search.max_finished, every_ended)
    return state._replace(step=step, done=state.done | ended | (step >= search.max_tokens))


def _select(condition, yes: Hypotheses, no: Hypotheses) -> Hypotheses:
    """Per audio one of two states of the same step."""

    def pick(a, b):
        return a if a.ndim == 0 else jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, yes, no)


def _last(state, step):
    return lax.dynamic_index_in_dim(state.tokens, jnp.maximum(step, 0), axis=2, keepdims=False)


def _append(tokens, step, token):
    return lax.dynamic_update_slice_in_dim(tokens, token[..., None].astype(tokens.dtype), step, axis=2)


def _sampled(state, logits, normaliser, search, keys, eot):
    """Each hypothesis continued on its own; one that has ended repeats end-of-text at no cost."""
    group_size = logits.shape[1]
    ended = (state.step > 0) & (_last(state, state.step - 1) == eot)
    likely = most_likely(logits)
    warm = search.temperature > 0

    def draw():
        scaled = logits / jnp.where(warm, search.temperature, 1.0)[:, None, None]
        step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, state.step)))(keys)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[-1:])))(step_keys)
        return most_likely(scaled + noise)

    drawn = lax.cond(jnp.any(warm & ~search.is_beam & ~state.done), draw, lambda: likely)
    in_use = jnp.arange(group_size)[None] < search.width[:, None]
    token = jnp.where(ended | ~in_use, eot, jnp.where(warm[:, None], drawn, likely))
    score = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - normaliser
    own = jnp.broadcast_to(jnp.arange(group_size)[None], token.shape)
    return state._replace(
        tokens=_append(state.tokens, state.step, token),
        scores=state.scores + jnp.where(ended, 0.0, score),
        writers=_append(state.writers, state.step, own),
    )


def _beams(state, logits, normaliser, search, eot):
    """Of the best width + 1 continuations of every beam those that end are put aside; of the others the best `width` go
    on.
    """
    batch, group_size, _ = logits.shape
    top, ids = lax.top_k(logits, group_size + 1)
    scores = state.scores[..., None] + (top - normaliser[..., None])
    place = jnp.arange(group_size + 1)[None, None]
    width = search.width[:, None, None]
    valid = (place <= width) & (jnp.arange(group_size)[None, :, None] < width)
    scores = jnp.where(valid, scores, -jnp.inf).reshape(batch, -1)
    order = jnp.argsort(-scores, axis=-1, stable=True)
    scores, ids, valid = (jnp.take_along_axis(x.reshape(batch, -1), order, axis=-1) for x in (scores, ids, valid))
    source = order // (group_size + 1)
    ends = (ids == eot) & valid
    goes_on = (ids != eot) & valid
    rank = jnp.cumsum(goes_on, axis=-1) - goes_on  # of those that go on, how many are better
    before_last = rank < search.width[:, None]

    # The best `width` that go on, in order; unused hypotheses repeat the first with a score that never wins.
    chosen = jnp.argsort(~(goes_on & before_last), axis=-1, stable=True)[:, :group_size]
    in_use = jnp.arange(group_size)[None] < search.width[:, None]
    chosen = jnp.where(in_use, chosen, chosen[:, :1])
    parents = jnp.take_along_axis(source, chosen, axis=-1)

    def inherit(rows):
        return jnp.take_along_axis(rows, parents[..., None], axis=1)

    own = jnp.broadcast_to(jnp.arange(group_size)[None], parents.shape)
    new_scores = jnp.where(in_use, jnp.take_along_axis(scores, chosen, axis=-1), -jnp.inf)
    token = jnp.take_along_axis(ids, chosen, axis=-1)
    state = _put_aside(state, source, scores, ends & before_last, search)
    return state._replace(
        tokens=_append(inherit(state.tokens), state.step, token),
        scores=new_scores,
        writers=_append(inherit(state.writers), state.step, own),
    )


def _put_aside(state, source, scores, ends, search):
    """Adds beams that have ended, best first, as long as there is room for them."""
    place = state.num_finished[:, None] + jnp.cumsum(ends, axis=-1) - ends
    kept = ends & (place < search.max_finished[:, None])
    place = jnp.where(kept, place, state.finished.shape[1])  # out of range: dropped
    batch = jnp.broadcast_to(jnp.arange(len(place))[:, None], place.shape)
    rows = jnp.take_along_axis(state.tokens, source[..., None], axis=1)
    return state._replace(
        finished=state.finished.at[batch, place].set(rows, mode="drop"),
        finished_scores=state.finished_scores.at[batch, place].set(scores, mode="drop"),
        finished_lengths=state.finished_lengths.at[batch, place].set(state.step, mode="drop"),
        num_finished=state.num_finished + jnp.sum(kept, axis=-1),
    )


def candidates(state: Hypotheses, audio: int, *, width: int, is_beam: bool, eot: int) -> list[tuple[list[int], float]]:
    """What the search of one audio has found, from a state of NumPy arrays: (tokens without end-of-text, score) each.

    A beam search with fewer finished beams than its width adds its best unfinished ones.
    """
    unfinished = []
    for row in range(width):
        tokens = [int(token) for token in state.tokens[audio, row]]
        tokens = tokens[: tokens.index(eot)] if eot in tokens else tokens
        unfinished.append((tokens, float(state.scores[audio, row])))
    if not is_beam:
        return unfinished
    finished = []
    for i in range(int(state.num_finished[audio])):
        length = int(state.finished_lengths[audio, i])
        finished.append((state.finished[audio, i, :length].tolist(), float(state.finished_scores[audio, i])))
    missing = max(width - len(finished), 0)
    return finished + sorted(unfinished, key=lambda candidate: -candidate[1])[:missing]
