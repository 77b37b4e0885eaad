"""What Whisper may say next: suppressed tokens, timestamp rules and penalties on repetition, as arrays.

Radford et al. 2022, section 4.5, and the released decoder. Every option is data, so that one compiled program serves
all of them. Letters: B audios, G hypotheses of an audio, V vocabulary, L sampled tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class SpecialIds(NamedTuple):
    """The ids that rules speak of; timestamps are all ids from `timestamp_begin` on."""

    eot: int
    no_speech: int
    no_timestamps: int
    timestamp_begin: int


class Rules(NamedTuple):
    """The options of each audio.

    Attributes:
      suppressed: never said.
      suppressed_first: not said first.
      timestamps: whether timestamps are wanted and their rules apply.
      last_initial: the last timestamp id with which the text may begin.
      repetition_penalty: logits of tokens said before in the window are divided by it if positive, else multiplied
        (Keskar et al. 2019, CTRL); 1 does nothing.
      no_repeat_ngram: no n-gram of this size is said twice in a window; 0 does nothing.
    """

    suppressed: Bool[Array, "B V"]
    suppressed_first: Bool[Array, "B V"]
    timestamps: Bool[Array, " B"]
    last_initial: Int[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    no_repeat_ngram: Int[Array, " B"]


def apply_rules(
    logits: Float[Array, "B G V"],
    tokens: Int[Array, "B G L"],
    step: Int[Array, ""],
    rules: Rules,
    ids: SpecialIds,
) -> Float[Array, "B G V"]:
    """Logits with everything at -inf that may not come next, after `step` sampled tokens."""
    logits = _penalise_repetition(logits, tokens, step, rules)
    suppressed = rules.suppressed | (rules.suppressed_first & (step == 0))
    forbidden = suppressed[:, None] | (_out_of_order(tokens, step, rules, ids, logits.shape[-1]))
    logits = jnp.where(forbidden, -jnp.inf, logits)
    # All timestamps together more likely than any single other token: a timestamp it is.
    begin = ids.timestamp_begin
    mass = jax.nn.logsumexp(logits[..., begin:], axis=-1)
    prefer = rules.timestamps[:, None] & (mass > jnp.max(logits[..., :begin], axis=-1))
    is_other = lax.broadcasted_iota(jnp.int32, logits.shape, 2) < begin
    return jnp.where(prefer[..., None] & is_other, -jnp.inf, logits)


def _out_of_order(tokens, step, rules, ids, vocab_size):
    """(B, G, V) where the timestamp rules forbid: timestamps come in pairs, do not decrease, and come first."""
    begin = ids.timestamp_begin
    vocabulary = lax.broadcasted_iota(jnp.int32, (1, 1, vocab_size), 2)
    is_timestamp = vocabulary >= begin

    def said(back):  # the token `back` steps ago
        return lax.dynamic_index_in_dim(tokens, jnp.maximum(step - back, 0), axis=2)  # (B, G, 1)

    after_timestamp = (step >= 1) & (said(1) >= begin)
    after_two = (step < 2) | (said(2) >= begin)
    sampled = lax.broadcasted_iota(jnp.int32, tokens.shape, 2) < step
    newest = jnp.max(jnp.where(sampled & (tokens >= begin), tokens, -1), axis=2, keepdims=True)
    # The next segment may start where the last one ended; no segment may end where it started.
    lowest = jnp.where(after_timestamp & ~after_two, newest, newest + 1)
    opened = after_timestamp & after_two & is_timestamp
    closed = after_timestamp & ~after_two & (vocabulary < ids.eot)
    too_early = is_timestamp & (vocabulary < lowest)
    first = (step == 0) & (~is_timestamp | (vocabulary > rules.last_initial[:, None, None]))
    forbidden = opened | closed | too_early | first | (vocabulary == ids.no_timestamps)
    return forbidden & rules.timestamps[:, None, None]


def _penalise_repetition(logits, tokens, step, rules):
    rows = lax.broadcasted_iota(jnp.int32, tokens.shape, 0), lax.broadcasted_iota(jnp.int32, tokens.shape, 1), tokens
    sampled = lax.broadcasted_iota(jnp.int32, tokens.shape, 2) < step

    def penalise(logits):
        old = logits[rows]
        penalty = rules.repetition_penalty[:, None, None]
        new = jnp.where(old > 0, old / penalty, old * penalty)
        # A token said twice is penalised once: min and max, unlike a product, do not mind.
        return (
            logits.at[rows]
            .min(jnp.where(sampled & (penalty >= 1), new, jnp.inf))
            .at[rows]
            .max(jnp.where(sampled & (penalty < 1), new, -jnp.inf))
        )

    def forbid_ngrams(logits):
        size = rules.no_repeat_ngram[:, None, None]
        place = lax.broadcasted_iota(jnp.int32, tokens.shape, 2)

        def compare(back, same):  # whether the token `back` before each place is also the one `back` from the end
            earlier = jnp.roll(tokens, back, axis=2)
            last = lax.dynamic_index_in_dim(tokens, jnp.maximum(step - back, 0), axis=2)
            return same & ((back >= size) | ((place >= back) & (earlier == last)))

        longest = jnp.max(rules.no_repeat_ngram)
        repeats = lax.fori_loop(1, longest, compare, sampled & (size > 0))
        return logits.at[rows].min(jnp.where(repeats, -jnp.inf, jnp.inf))

    wanted = jnp.any(rules.repetition_penalty != 1) | jnp.any(rules.no_repeat_ngram > 0)
    return lax.cond(wanted, lambda x: forbid_ngrams(penalise(x)), lambda x: x, logits)
