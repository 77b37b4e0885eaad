"""Piano music from performance events: from nothing, from a prime, or for a melody.

Music Transformer (Huang et al. 2018, https://arxiv.org/abs/1809.04281, sections 4.2.1 to 4.2.3) samples at temperature
1. Here music may be of any length: beyond the training length the model sees the last positions only.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxaudio.data.events import END_OF_SEQUENCE, STEPS_PER_SECOND, EventVocabulary
from jaxaudio.generate.autoregressive import stream
from jaxaudio.models.music_transformer import (
    AccompanimentTransformer,
    MusicTransformer,
    init_accompaniment_cache,
    init_cache,
)
from jaxaudio.ops.sampling import Sampling

MAX_EVENTS_PER_SECOND = 200  # a model that lets no time pass is stopped; played performances have about 43
_CHUNK = 64  # tokens between two looks at how far the music is
_MELODY_PAD = 64  # melodies are padded to multiples, so that few lengths are compiled


class Music(NamedTuple):
    """What was written.

    Attributes:
      tokens: event ids (N,) int32, the prime's first; every note is closed.
      num_new: how many are the model's; the NOTE_OFF events of `close_notes` come after them.
      seconds: how long the model's part is.
      ended: "seconds" or "tokens" if as much as was asked for is there, "end" if the model ended it before.
    """

    tokens: np.ndarray
    num_new: int
    seconds: float
    ended: Literal["seconds", "tokens", "end"]


def continue_performance(
    model: MusicTransformer,
    params: Any,
    vocabulary: EventVocabulary,
    primes: Sequence[np.ndarray],
    key: jax.Array,
    *,
    context: int,
    seconds: float | None = None,
    num_tokens: int | None = None,
    requests: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> list[Music]:
    """Continues performances; an empty prime is unconditioned music.

    What is written for a prime depends on `key` and its request number, not on its place or its neighbours.

    Args:
      model, params: of next events.
      vocabulary: of its tokens.
      primes: event ids of each row, without start and end tokens.
      key: of all draws.
      context: positions that a token sees, its own included: the length of the rows in training.
      seconds: how much music to add to each prime; it is cut there, to 10 ms. Or
      num_tokens: how many events to add.
      requests: the request number of each row; 0, 1, ... if None.
      sampling: options per row; plain sampling if None.
      on_progress: called with the seconds, or events, that the shortest row has so far.
    Raises:
      ValueError: both or none of seconds and num_tokens, or not above 0; or a prime that is longer than the context,
        with how many seconds of it would fit.
    """
    for row, prime in enumerate(primes):
        if len(prime) > context:
            raise ValueError(
                f"prime {row} has {len(prime)} events, more than the {context} that the model sees; its first "
                f"{seconds_that_fit(prime, vocabulary, context):.2f} s would fit"
            )
    cache = init_cache(model.config, len(primes), context)
    return _write(model, params, cache, vocabulary, primes, key, seconds, num_tokens, requests, sampling, on_progress)


def accompany(
    model: AccompanimentTransformer,
    params: Any,
    vocabulary: EventVocabulary,
    melodies: Sequence[np.ndarray],
    key: jax.Array,
    *,
    context: int,
    seconds: float | None = None,
    num_tokens: int | None = None,
    requests: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> list[Music]:
    """Performances, melody and accompaniment, for melodies (section 4.2.2).

    Args:
      model, params: of next events, given a melody.
      melodies: ids of `data.melody`, one row each.
      vocabulary, key, context, seconds, num_tokens, requests, sampling, on_progress: as for `continue_performance`.
    Raises:
      ValueError: as `continue_performance`, or a melody without tokens.
    """
    for row, melody in enumerate(melodies):
        if not len(melody):
            raise ValueError(f"melody {row} has no tokens")
    longest = max(map(len, melodies))
    padded = np.zeros((len(melodies), -(-longest // _MELODY_PAD) * _MELODY_PAD), np.int32)
    for row, melody in enumerate(melodies):
        padded[row, : len(melody)] = melody
    cache = _accompaniment_cache(model.config, params, padded, context)
    decoder, params = MusicTransformer(model.config.decoder), params["decoder"]
    primes = [np.zeros(0, np.int32)] * len(melodies)
    return _write(decoder, params, cache, vocabulary, primes, key, seconds, num_tokens, requests, sampling, on_progress)


_accompaniment_cache = jax.jit(init_accompaniment_cache, static_argnums=(0, 3))


def _write(
    model, params, cache, vocabulary, primes, key, seconds, num_tokens, requests, sampling, on_progress
) -> list[Music]:
    if (seconds is None) == (num_tokens is None):
        raise ValueError(f"give either seconds or num_tokens, got {seconds} and {num_tokens}")
    asked = num_tokens if seconds is None else seconds
    if not 0 < asked < math.inf:
        raise ValueError(f"expected more than 0 {'events' if seconds is None else 'seconds'}, got {asked}")
    limit = math.ceil(seconds * MAX_EVENTS_PER_SECOND) if num_tokens is None else num_tokens
    chunks = stream(
        model,
        params,
        key,
        cache=cache,
        prompts=primes,
        chunk_length=_CHUNK,
        num_tokens=max(map(len, primes)) + limit,
        requests=requests,
        sampling=sampling,
        allowed=np.arange(vocabulary.size) >= min(END_OF_SEQUENCE, vocabulary.num_reserved),  # never padding
    )
    tokens = np.zeros((len(primes), 0), np.int32)
    for chunk in chunks:
        tokens = np.concatenate([tokens, chunk], axis=1)
        rows = zip(tokens, primes, strict=True)
        new = [_up_to_end(row[len(prime) :], vocabulary, seconds, limit) for row, prime in rows]
        if on_progress is not None:
            on_progress(min(len(part) if seconds is None else _seconds(part, vocabulary) for part, _ in new))
        if all(ended for _, ended in new):
            break
    return [
        Music(
            close_notes(np.concatenate([np.asarray(prime, np.int32), part]), vocabulary),
            len(part),
            _seconds(part, vocabulary),
            ended,
        )
        for prime, (part, ended) in zip(primes, new, strict=True)
    ]


def _up_to_end(tokens, vocabulary, seconds, limit) -> tuple[np.ndarray, Literal["seconds", "tokens", "end"] | None]:
    """A row's new tokens as far as they count, and why they end there, None where they do not yet."""
    ends = np.flatnonzero(tokens == END_OF_SEQUENCE) if vocabulary.num_reserved else []
    ended = "end" if len(ends) and ends[0] < limit else "tokens" if len(tokens) >= limit else None
    tokens = tokens[: min([*ends[:1], limit])]
    if seconds is not None and _seconds(tokens, vocabulary) >= round(seconds * STEPS_PER_SECOND) / STEPS_PER_SECOND:
        return first_seconds(tokens, vocabulary, seconds), "seconds"
    return tokens, ended


def close_notes(tokens: np.ndarray, vocabulary: EventVocabulary) -> np.ndarray:
    """The events (N,) and then a NOTE_OFF for each note that sounds still, the lowest first."""
    note_on, note_off = vocabulary.note_on, vocabulary.note_off
    sounding = np.zeros(len(note_on), np.int64)
    for token in tokens.tolist():
        if token in note_on:
            sounding[token - note_on.start] += 1
        elif token in note_off:  # one for a silent key is nothing, as in `decode_events`
            sounding[token - note_off.start] = max(0, sounding[token - note_off.start] - 1)
    closing = note_off.start + np.repeat(np.arange(len(note_off)), sounding)
    return np.concatenate([tokens, closing.astype(tokens.dtype)])


def first_seconds(tokens: np.ndarray, vocabulary: EventVocabulary, seconds: float) -> np.ndarray:
    """The events (N,) before a time, rounded to 10 ms; a shift of time that passes it becomes one that reaches it."""
    steps, limit = _shifts(tokens, vocabulary), round(seconds * STEPS_PER_SECOND)
    before = np.cumsum(steps) - steps
    kept = tokens[: np.searchsorted(before, limit)].copy()
    if len(kept) and before[len(kept) - 1] + steps[len(kept) - 1] > limit:
        kept[-1] = vocabulary.time_shift[limit - before[len(kept) - 1] - 1]
    return kept


def seconds_that_fit(tokens: np.ndarray, vocabulary: EventVocabulary, num_tokens: int) -> float:
    """The longest time whose `first_seconds` are at most `num_tokens` of these events."""
    return _seconds(tokens[:num_tokens], vocabulary)


def _seconds(tokens: np.ndarray, vocabulary: EventVocabulary) -> float:
    return float(_shifts(tokens, vocabulary).sum()) / STEPS_PER_SECOND


def _shifts(tokens: np.ndarray, vocabulary: EventVocabulary) -> np.ndarray:
    """How many steps of 10 ms each event lets pass (N,)."""
    shift = vocabulary.time_shift
    return np.where((tokens >= shift.start) & (tokens < shift.stop), tokens - shift.start + 1, 0)
