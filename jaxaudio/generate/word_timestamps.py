"""When each word was said: the decoder's cross-attention, aligned with the text by dynamic time warping.

Radford et al. 2022, https://arxiv.org/abs/2212.04356, do not describe it; the method and its constants are those of
openai-whisper's timing.py, https://github.com/openai/whisper.
"""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaudio.data.transcripts import Segment, Word
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.generate.whisper import Memory, memory_keys, teacher_forced
from jaxaudio.models.whisper import FRAME_RATE, TOKENS_PER_SECOND, Whisper, WhisperConfig
from jaxaudio.ops.alignment import dtw, first_columns, median_filter

MEDIAN_WIDTH = 7
SHORTEST_INPUT = 64  # tokens; inputs are padded to this times a power of two, at most the decoder's context

SENTENCE_ENDS = ".。!！?？"
LONGEST_MEDIAN_S = 0.7
SEGMENT_TOLERANCE_S = 0.5


@dataclasses.dataclass(frozen=True)
class WordTiming:
    """A word within its window.

    Attributes:
      word: its text, usually with a space before it.
      tokens: its tokens.
      start, end: seconds from the window's start, start <= end.
      probability: mean probability of its tokens, among the tokens of text.
    """

    word: str
    tokens: tuple[int, ...]
    start: float
    end: float
    probability: float


def align_words(
    model: Whisper,
    params: Any,
    tokenizer: WhisperTokenizer,
    memory: Memory,
    text_tokens: Sequence[Sequence[int]],
    num_frames: Sequence[int],
    languages: Sequence[str],
    *,
    task: str = "transcribe",
) -> list[list[WordTiming]]:
    """Start, end and probability of each word of each window, from one pass over the whole batch.

    A row's result does not depend on the others. Inputs are padded to 64, 128, 256, ... tokens, so a batch size
    compiles at most a handful of programs, usually one.

    Args:
      model, params: the latter from `generate.whisper.inference_params`.
      tokenizer: of the model.
      memory: of B windows, from `generate.whisper.encode`.
      text_tokens: what was said in each window, without timestamps; a row without tokens has no words.
      num_frames: mel frames of each window that are audio, not padding.
      languages: code of each window's language; it decides how text is split into words.
      task: what the tokens were decoded as.
    Returns:
      for each row its words in order, with every token in one of them. A position that all tokens attend to alike,
      where openai-whisper divides by zero (so in windows of fewer than 4 frames), counts as nothing.
    Raises:
      ValueError: not one row of each argument per window, a token that is not text, more tokens than the decoder has
        positions, or a number of frames that the window does not have; the message has the row and the value.
    """
    prompts = [(*tokenizer.sot_sequence(language, task), tokenizer.no_timestamps) for language in languages]
    num_windows = jax.eval_shape(functools.partial(memory_keys, model, layer=0), memory).shape[0]
    _check_rows(model.config, tokenizer, num_windows, text_tokens, num_frames, prompts)
    if not any(text_tokens):
        return [[] for _ in text_tokens]
    inputs = [(*prompt, *text, tokenizer.eot) for prompt, text in zip(prompts, text_tokens, strict=True)]
    length = SHORTEST_INPUT
    while length < max(map(len, inputs)):
        length *= 2
    tokens = np.full((len(inputs), min(length, model.config.text_length)), tokenizer.eot, np.int32)
    for row, ids in zip(tokens, inputs, strict=True):
        row[: len(ids)] = ids
    starts, probabilities = _align(
        model,
        params,
        memory,
        tokens,
        np.array([len(ids) for ids in inputs], np.int32),
        np.maximum(np.asarray(num_frames, np.int32) // 2, 1),
        first_row=len(prompts[0]) - 1,
        eot=tokenizer.eot,
    )
    times = np.asarray(starts) / TOKENS_PER_SECOND
    rows = zip(text_tokens, languages, times.tolist(), np.asarray(probabilities, np.float64), strict=True)
    return [_words(tokenizer, *row) for row in rows]


def _check_rows(config, tokenizer, num_windows, text_tokens, num_frames, prompts):
    given = len(text_tokens), len(num_frames), len(prompts)
    if set(given) != {num_windows}:
        raise ValueError(
            f"text_tokens, num_frames and languages must have one row for each of {num_windows} windows, got "
            "{}, {} and {}".format(*given)
        )
    for row, (text, frames, prompt) in enumerate(zip(text_tokens, num_frames, prompts, strict=True)):
        wrong = [token for token in text if not 0 <= token < tokenizer.eot]
        if wrong:
            raise ValueError(f"row {row}: token {wrong[0]} is not text, whose ids are below {tokenizer.eot}")
        if len(prompt) + len(text) + 1 > config.text_length:
            raise ValueError(
                f"row {row}: {len(text)} tokens of text and {len(prompt) + 1} others do not fit into the decoder's "
                f"{config.text_length} positions; decode with a smaller sample_len"
            )
        if text and not 1 <= frames <= config.num_frames:
            raise ValueError(f"row {row}: num_frames must be in 1..{config.num_frames}, got {frames}")


@functools.partial(jax.jit, static_argnames=("model", "first_row", "eot"))
def _align(model, params, memory, tokens, num_tokens, num_positions, *, first_row, eot):
    """For row n of the text (the first is the token before it): first encoder position (B, N), and probability of the
    token that follows (B, N - 1)."""
    logits, queries = teacher_forced(model, params, memory, tokens)
    logits, following = logits[:, first_row:-1, :eot], tokens[:, first_row + 1 :]
    picked = jnp.take_along_axis(logits, jnp.minimum(following, eot - 1)[..., None], axis=-1)[..., 0]
    probabilities = jnp.exp(picked - jax.nn.logsumexp(logits, axis=-1))
    heads = alignment_heads(model.config)
    queries = jnp.stack([queries[layer][:, :, head] for layer, head in heads])
    keys = jnp.stack([memory_keys(model, memory, layer)[:, head] for layer, head in heads])
    weights = _attention(queries, keys, num_tokens, num_positions)[:, first_row:]
    # The last input, the end of text, is no row.
    path = dtw(-weights, num_tokens - first_row - 1, num_positions)
    return first_columns(path, num_rows=weights.shape[1]), probabilities


def alignment_heads(config: WhisperConfig) -> tuple[tuple[int, int], ...]:
    """The config's (layer, head) pairs, or all of the last half of the decoder's layers."""
    if config.alignment_heads is not None:
        return config.alignment_heads
    layers = range(config.num_decoder_layers // 2, config.num_decoder_layers)
    return tuple((layer, head) for layer in layers for head in range(config.num_heads))


def _attention(queries, keys, num_tokens, num_positions):
    """(B, T, S): attention of each token, standardised over the tokens, smoothed over time, averaged over the heads.

    One head at a time: (B, T, S) of all alignment heads of a large model would take gigabytes.
    """
    scale = queries.shape[-1] ** -0.5
    is_token = (jnp.arange(queries.shape[2])[None] < num_tokens[:, None])[:, :, None]
    is_audio = (jnp.arange(keys.shape[2])[None] < num_positions[:, None])[:, None]
    count = num_tokens[:, None, None].astype(jnp.float32)

    def add(total, head):
        query, key = (x.astype(jnp.float32) for x in head)
        scores = jnp.einsum("BTH,BSH->BTS", query, key, precision=lax.Precision.HIGHEST) * scale
        weights = jax.nn.softmax(jnp.where(is_audio, scores, -jnp.inf), axis=-1)
        mean = jnp.sum(jnp.where(is_token, weights, 0.0), axis=1, keepdims=True) / count
        centred = jnp.where(is_token, weights - mean, 0.0)
        deviation = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / count)
        standardised = centred / jnp.where(deviation > 0, deviation, 1.0)
        return total + median_filter(standardised, MEDIAN_WIDTH, num_positions), None

    B, T, S = queries.shape[1], queries.shape[2], keys.shape[2]
    total, _ = lax.scan(add, jnp.zeros((B, T, S)), (queries, keys))
    return total / len(queries)


def _words(tokenizer, tokens, language, times, probabilities):
    """The words of one row. Row n of the alignment is when token n begins, and the last row when the last one ends."""
    words, word_tokens = tokenizer.split_to_word_tokens([*tokens, tokenizer.eot], language)
    boundaries = [0, *accumulate(len(ids) for ids in word_tokens[:-1])]
    return [
        WordTiming(word, tuple(ids), times[start], times[end], float(np.mean(probabilities[start:end])))
        for word, ids, (start, end) in zip(words[:-1], word_tokens[:-1], pairwise(boundaries), strict=True)
    ]


def add_word_timestamps(
    segments: Sequence[Segment],
    alignment: Sequence[WordTiming],
    *,
    tokenizer: Any,
    prepend_punctuations: str,
    append_punctuations: str,
    last_speech_s: float,
) -> list[Segment]:
    """A window's segments with their words, and with starts and ends moved to those of the words where they agree.

    Words that last longer than twice the median are cut at the ends of sentences and after pauses.

    Args:
      segments: of one window, so with the same `seek`.
      alignment: from `align_words`, of all tokens of text in the segments.
      tokenizer: of the model; ids below its `eot` are text.
      prepend_punctuations: marks that become part of the next word.
      append_punctuations: marks that become part of the word before.
      last_speech_s: when the speech before the window ended, in seconds from the start of the audio, at least 0.
    """
    durations = [timing.end - timing.start for timing in alignment if timing.end > timing.start]
    median = min(LONGEST_MEDIAN_S, float(np.median(durations))) if durations else 0.0
    alignment = _cut_at_sentence_ends(alignment, 2 * median)
    timings = iter(merge_punctuations(alignment, prepend_punctuations, append_punctuations))
    placed = []
    for segment in segments:
        offset, words = segment.seek / FRAME_RATE, []
        missing = sum(token < tokenizer.eot for token in segment.tokens)
        # A word across two segments belongs to the first.
        while missing > 0 and (timing := next(timings, None)):
            missing -= len(timing.tokens)
            times = round(offset + timing.start, 2), round(offset + timing.end, 2)
            words.append(Word(timing.word, *times, timing.probability))
        if words:
            segment, words = _fit(segment, words, median, last_speech_s)
            last_speech_s = segment.end
        placed.append(dataclasses.replace(segment, words=tuple(words)))
    return placed


def _cut_at_sentence_ends(alignment, longest):
    """Cuts a mark's end, or the start of the word after a mark, to the longest duration."""
    cut = list(alignment[:1])
    for previous, timing in pairwise(alignment):
        if timing.end - timing.start > longest:
            if timing.word in SENTENCE_ENDS:
                timing = dataclasses.replace(timing, end=timing.start + longest)
            elif previous.word in SENTENCE_ENDS:
                timing = dataclasses.replace(timing, start=timing.end - longest)
        cut.append(timing)
    return cut


def merge_punctuations(alignment: Sequence[WordTiming], prepended: str, appended: str) -> list[WordTiming]:
    """Joins marks with the word they belong to, which keeps its times and its probability."""
    from_the_end = list(alignment[-1:])
    for timing in reversed(alignment[:-1]):
        if timing.word.startswith(" ") and timing.word.strip() in prepended:
            from_the_end[-1] = _join(timing, from_the_end[-1], keep=from_the_end[-1])
        else:
            from_the_end.append(timing)
    merged = []
    for timing in reversed(from_the_end):
        if merged and not merged[-1].word.endswith(" ") and timing.word in appended:
            merged[-1] = _join(merged[-1], timing, keep=merged[-1])
        else:
            merged.append(timing)
    return merged


def _join(left, right, *, keep):
    return dataclasses.replace(keep, word=left.word + right.word, tokens=left.tokens + right.tokens)


def _fit(segment, words, median, last_speech_s):
    """Shortens words that are too long next to a pause, and moves the segment's ends to its words' where it may."""
    starts, ends, longest = [word.start for word in words], [word.end for word in words], 2 * median
    has_two = len(words) > 1
    is_long = ends[0] - starts[0] > longest or (has_two and ends[1] - starts[0] > 2 * longest)
    if is_long and ends[0] - last_speech_s > 2 * longest:
        if has_two and ends[1] - starts[1] > longest:
            ends[0] = starts[1] = ends[1] - longest
        starts[0] = ends[0] - longest
    start, end = segment.start, segment.end
    if start < ends[0] and start - SEGMENT_TOLERANCE_S > starts[0]:
        starts[0] = max(0.0, min(ends[0] - median, start))
    else:
        start = starts[0]
    if end > starts[-1] and end + SEGMENT_TOLERANCE_S < ends[-1]:
        ends[-1] = max(starts[-1] + median, end)
    else:
        end = ends[-1]
    words = [dataclasses.replace(word, start=s, end=e) for word, s, e in zip(words, starts, ends, strict=True)]
    return dataclasses.replace(segment, start=start, end=end), words
