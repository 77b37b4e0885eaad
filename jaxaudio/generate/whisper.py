"""Decoding one window of audio with Whisper: options in, text with its probabilities out.

Radford et al. 2022, section 4.5; the options, their rules and the results are those of the released decoder. A batch's
rows are independent: each has options of its own, and its result does not depend on the others.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.generate import beam
from jaxaudio.generate.autoregressive import decode_loop
from jaxaudio.generate.whisper_rules import Rules, SpecialIds, apply_rules
from jaxaudio.models.whisper import TOKENS_PER_SECOND, Whisper, init_cache
from jaxaudio.nn.transformer import cross_caches, unstack_layers
from jaxaudio.ops.attention import KVCache
from jaxaudio.ops.quantization import dequantize, quantize

_CHUNK = 16  # prompt tokens that go through the decoder at once

Memory = tuple[KVCache, ...]


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """How one window is decoded.

    Attributes:
      task: "transcribe", or "translate" into English.
      language: code of the language spoken; for multilingual models it must be given, see `detect_language`.
      temperature: 0 takes the most likely tokens, else samples.
      sample_len: tokens to sample at most; half the decoder's context if None.
      best_of: how many samples to draw, the best of which is the result; needs temperature > 0.
      beam_size: beams of a beam search, which does not look at the temperature.
      patience: how many times `beam_size` finished beams to wait for (Kasai et al. 2022); 1 if None.
      length_penalty: alpha of Wu et al. 2016 (equation 14) for ranking; plain average log-probability if None.
      prompt: tokens of the text before the window; the last 223 (half the context, less one) are used.
      prefix: tokens the window's text begins with. With a `sample_len` below 224, only the last 224 - sample_len count.
      hotwords: words to expect, said in the prompt before the other text. They take at most the room that `prompt`
        leaves, so that a long prompt and hotwords together are an error.
      suppress_tokens: never said; -1 stands for the symbols that no one pronounces.
      suppress_blank: the text does not begin with a space alone and is not empty.
      without_timestamps: text only.
      max_initial_timestamp: seconds; the text begins no later; None (or 0) for no limit.
      repetition_penalty: see `whisper_rules.Rules`.
      no_repeat_ngram_size: see `whisper_rules.Rules`.

    Raises:
      ValueError: a value outside its range, or options that contradict each other; the message carries them.
    """

    task: str = "transcribe"
    language: str | None = None
    temperature: float = 0.0
    sample_len: int | None = None
    best_of: int | None = None
    beam_size: int | None = None
    patience: float | None = None
    length_penalty: float | None = None
    prompt: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    hotwords: str | None = None
    suppress_tokens: tuple[int, ...] = (-1,)
    suppress_blank: bool = True
    without_timestamps: bool = False
    max_initial_timestamp: float | None = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self):
        if self.task not in ("transcribe", "translate"):
            raise ValueError(f"task must be 'transcribe' or 'translate', got {self.task!r}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        for name in ("sample_len", "best_of", "beam_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.beam_size is not None and self.best_of is not None:
            raise ValueError(f"give beam_size or best_of, not both, got {self.beam_size} and {self.best_of}")
        if self.best_of is not None and self.temperature == 0:
            raise ValueError(f"best_of={self.best_of} needs a temperature above 0: at 0 all samples are the same")
        if self.patience is not None and self.beam_size is None:
            raise ValueError(f"patience={self.patience} needs a beam_size")
        if self.patience is not None and round(self.beam_size * self.patience) < 1:
            raise ValueError(f"patience={self.patience} with beam_size={self.beam_size} waits for no beam at all")
        if self.length_penalty is not None and not 0 <= self.length_penalty <= 1:
            raise ValueError(f"length_penalty must be in [0, 1], got {self.length_penalty}")
        if self.max_initial_timestamp is not None and self.max_initial_timestamp < 0:
            raise ValueError(f"max_initial_timestamp must be at least 0 s, got {self.max_initial_timestamp}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size must be at least 0, got {self.no_repeat_ngram_size}")

    @property
    def width(self) -> int:
        """Hypotheses in the search."""
        return self.beam_size or self.best_of or 1

    @property
    def max_finished(self) -> int:
        """Finished beams that end the search."""
        return round(self.width * (self.patience or 1.0))

    @property
    def is_beam(self) -> bool:
        """Whether it is a search at all: one beam that ends the search when it ends is not."""
        return self.beam_size is not None and (self.beam_size, self.max_finished) != (1, 1)


@dataclasses.dataclass(frozen=True)
class DecodingResult:
    """What was heard in one window.

    Attributes:
      tokens: with timestamps, without end-of-text.
      text: without timestamps and outer spaces.
      language: code of the language that was asked for.
      avg_logprob: mean log-probability of the tokens and end-of-text.
      no_speech_prob: probability of "no speech" before anything was said.
      temperature: that led here.
      compression_ratio: bytes of the text by bytes that zlib makes of it; high where text repeats itself.
    """

    tokens: tuple[int, ...]
    text: str
    language: str
    avg_logprob: float
    no_speech_prob: float
    temperature: float
    compression_ratio: float


def compression_ratio(text: str) -> float:
    """Bytes of the text by bytes of its zlib compression."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data))


def inference_params(params: Any, *, int8: bool = False) -> Any:
    """Parameters laid out for decoding: the decoder's layers apart, once, instead of at every token.

    Args:
      params: as trained or loaded.
      int8: keeps the decoder's matrices in 8 bits, a quarter of the bytes, each entry to within half a step of its
        output's largest / 127. An accelerator reads them so at every token; a CPU, which has no such product, expands
        them at each call.
    """
    decoder = unstack_layers(params["decoder"])
    int8 = int8 and "token_embedding_scale" not in decoder  # they are already
    return {"encoder": params["encoder"], "decoder": _quantized(decoder) if int8 else decoder}


def _quantized(tree: Any, name: str = "") -> Any:
    out = {}
    for child, value in tree.items():
        if isinstance(value, dict):
            out[child] = _quantized(value, child)
        elif child == "kernel":
            out[child], out["kernel_scale"] = quantize(value, num_input_axes=2 if name == "out" else 1)
        elif child == "token_embedding":
            table, out["token_embedding_scale"] = quantize(value.T, num_input_axes=1)
            out[child] = table.T
        else:
            out[child] = value
    return out


def _expanded(tree: Any) -> Any:
    """On a CPU, the float matrices of 8-bit ones; a product of mixed types is fifty times slower there."""
    if not isinstance(tree, dict) or jax.default_backend() != "cpu":
        return tree
    out = {name: _expanded(value) for name, value in tree.items() if not name.endswith("_scale")}
    if "kernel_scale" in tree:
        out["kernel"] = dequantize(tree["kernel"], tree["kernel_scale"])
    if "token_embedding_scale" in tree:
        out["token_embedding"] = dequantize(tree["token_embedding"].T, tree["token_embedding_scale"]).T
    return out


@functools.partial(jax.jit, static_argnums=0)
def encode(model: Whisper, params: Any, mel: jax.Array) -> Memory:
    """Log-mel windows (B, T, M) -> keys and values of the decoder's cross-attention to them; `inference_params`."""
    params = _expanded(params)

    def remember(mel):
        hidden = model.apply({"params": params}, mel, method="encode")
        return cross_caches(model.config.decoder, params["decoder"]["transformer"], hidden)

    if jax.default_backend() != "cpu":
        return remember(mel)
    # One window after the other: the activations of a batch do not fit into a CPU's cache.
    memory = lax.map(lambda window: remember(window[None]), mel)
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), memory)


def detect_language(model: Whisper, params: Any, tokenizer: WhisperTokenizer, memory: Memory) -> list[dict[str, float]]:
    """Probability of every language for each window, by code.

    Raises:
      ValueError: the model speaks only English.
    """
    if not tokenizer.is_multilingual:
        raise ValueError("this model knows one language and cannot detect others")
    codes, ids = zip(*tokenizer.language_ids.items(), strict=True)
    probabilities = _language_probabilities(model, params, memory, tokenizer.sot, np.asarray(ids, np.int32))
    return [dict(zip(codes, map(float, row), strict=True)) for row in np.asarray(probabilities)]


@functools.partial(jax.jit, static_argnums=0)
def _language_probabilities(model, params, memory, sot, ids):
    batch = _batch_size(model, memory)
    tokens, cache = jnp.full((batch, 1), sot, jnp.int32), init_cache(model.config, batch, 1)
    variables = {"params": _expanded(params)}
    hidden, _ = model.apply(variables, tokens, memory, cache=cache, slot=jnp.int32(0), method="decode")
    logits = model.apply(variables, hidden, method="logits")[:, 0]
    return jax.nn.softmax(logits[:, ids], axis=-1)


def _batch_size(model, memory):
    keys = memory[0].keys
    return keys.shape[0] if keys.ndim == 4 else keys.shape[0] // model.config.num_heads


def memory_keys(model: Whisper, memory: Memory, layer: int) -> jax.Array:
    """Keys of one decoder layer's cross-attention, (B, N, S, H)."""
    keys = memory[layer].keys
    return keys.reshape(-1, model.config.num_heads, *keys.shape[-2:])


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(
    model: Whisper, params: Any, memory: Memory, tokens: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Logits (B, L, V) of given texts (B, L), and the unscaled queries (B, L, N, H) of each layer's cross-attention."""
    cache = init_cache(model.config, *tokens.shape)
    variables = {"params": _expanded(params)}
    (hidden, _), sown = model.apply(
        variables, tokens, memory, cache=cache, slot=jnp.int32(0), method="decode", mutable=["queries"]
    )
    queries = sown["queries"]["decoder"]["transformer"]
    logits = model.apply(variables, hidden, method="logits")
    return logits, tuple(queries[str(layer)] for layer in range(model.config.num_decoder_layers))


class _Prompts(NamedTuple):
    """What is said before sampling: (B, R) tokens, flush right, and their numbers; where "start" stands in them."""

    tokens: np.ndarray
    lengths: np.ndarray
    sot: np.ndarray


def decode(
    model: Whisper,
    params: Any,
    tokenizer: WhisperTokenizer,
    memory: Memory,
    key: jax.Array,
    options: Sequence[DecodingOptions | None],
    *,
    requests: Sequence[tuple[int, ...]] | None = None,
    group_size: int | None = None,
) -> list[DecodingResult | None]:
    """Decodes each window by its options.

    All options are data of one program: another is compiled only for another batch or group size, for a prompt and
    prefix beyond half the decoder's context, for a longer `sample_len` than that, or for more finished beams than twice
    the group size (a patience above 2).

    Args:
      model, params: with `inference_params`.
      tokenizer: of the model.
      memory: from `encode`.
      key: of all draws.
      options: one per window; None leaves a window out (rows that fill a batch).
      requests: numbers that name each window's draws, such as (file, position, attempt); its place if None. A result
        depends on its own numbers and never on the batch.
      group_size: hypotheses per window that the program is made for; the largest width in `options` if None.
    Returns:
      One result per window, None where the options are.
    Raises:
      ValueError: options and memory differ in number, an unknown or missing language, a group size below a width, or a
        prompt that leaves no room in the context; with the value.
    """
    batch = _batch_size(model, memory)
    requests = [(row,) for row in range(batch)] if requests is None else requests
    for name, rows in (("options", options), ("requests", requests)):
        if len(rows) != batch:
            raise ValueError(f"{name} must have one entry for each of {batch} windows, got {len(rows)}")
    idle = DecodingOptions(language=next(iter(tokenizer.languages), None))
    rows = [idle if row is None else row for row in options]
    used = [row is not None for row in options]
    needed = max(max(row.width, 1 + row.is_beam) for row in rows)
    group_size = needed if group_size is None else group_size
    if group_size < needed:
        raise ValueError(f"group_size must be at least {needed} for these options, got {group_size}")
    text_length = model.config.text_length
    prompts = _prompts(tokenizer, rows, text_length)
    limits = [row.sample_len or text_length // 2 for row in rows]
    limits = np.minimum(limits, text_length + 1 - prompts.lengths).astype(np.int32)
    max_tokens = text_length // 2 if limits.max() <= text_length // 2 else text_length
    search = beam.Search(
        width=np.asarray([row.width * is_used for row, is_used in zip(rows, used, strict=True)], np.int32),
        is_beam=np.asarray([row.is_beam for row in rows]),
        temperature=np.asarray([row.temperature for row in rows], np.float32),
        max_finished=np.asarray([row.max_finished for row in rows], np.int32),
        max_tokens=limits,
    )
    ids = SpecialIds(tokenizer.eot, tokenizer.no_speech, tokenizer.no_timestamps, tokenizer.timestamp_begin)
    max_finished = max(2 * group_size, *[row.max_finished for row in rows])
    keys = jnp.stack([functools.reduce(jax.random.fold_in, numbers, key) for numbers in requests])
    static = (model, ids, group_size, max_tokens, max_finished)
    state, no_speech = _decode(static, params, memory, prompts, _rules(tokenizer, rows), search, keys)
    state, no_speech = jax.tree.map(np.asarray, (state, no_speech))
    return [
        _result(tokenizer, state, audio, row, float(no_speech[audio]), tokenizer.eot) if used[audio] else None
        for audio, row in enumerate(rows)
    ]


def _prompts(tokenizer, rows, text_length) -> _Prompts:
    half = text_length // 2
    texts, starts = [], []
    for row in rows:
        tokens = list(tokenizer.sot_sequence(row.language, row.task))
        if row.without_timestamps:
            tokens.append(tokenizer.no_timestamps)
        limit = half - (row.sample_len or half)
        if row.prefix and limit < 0:
            raise ValueError(f"sample_len={row.sample_len} leaves no room for a prefix; give at most {half}")
        tokens += row.prefix[-limit:]  # the released decoder's rule: a limit of 0 keeps it all
        hotwords = tokenizer.encode(" " + row.hotwords.strip()) if row.hotwords else []
        if len(hotwords) + min(len(row.prompt), half - 1) > half - 1:
            raise ValueError(
                f"{len(hotwords)} tokens of hotwords do not fit beside a prompt of {len(row.prompt)} in {half - 1}"
            )
        previous = [*hotwords, *row.prompt[-(half - 1) :]]
        starts.append(len(previous) + 1 if previous else 0)
        texts.append([tokenizer.sot_prev, *previous, *tokens] if previous else tokens)
    longest = max(map(len, texts))
    if longest > text_length:
        raise ValueError(f"prompt and prefix have {longest} tokens, more than the decoder's {text_length} positions")
    room = half + 8 if longest <= half + 8 else text_length
    room = -(-room // _CHUNK) * _CHUNK
    tokens = np.full((len(texts), room), tokenizer.eot, np.int32)
    for row, text in enumerate(texts):
        tokens[row, room - len(text) :] = text
    return _Prompts(tokens, np.asarray([len(text) for text in texts], np.int32), np.asarray(starts, np.int32))


def _rules(tokenizer, rows) -> Rules:
    steps = [row.max_initial_timestamp and round(row.max_initial_timestamp * TOKENS_PER_SECOND) for row in rows]
    last = [tokenizer.timestamp_begin + step if step else tokenizer.vocab_size for step in steps]
    blank = np.isin(np.arange(tokenizer.vocab_size), [*tokenizer.blank_tokens, tokenizer.eot])
    return Rules(
        suppressed=np.stack([_suppressed(tokenizer, row.suppress_tokens) for row in rows]),
        suppressed_first=np.stack([blank & row.suppress_blank for row in rows]),
        timestamps=np.asarray([not row.without_timestamps for row in rows]),
        last_initial=np.asarray(last, np.int32),
        repetition_penalty=np.asarray([row.repetition_penalty for row in rows], np.float32),
        no_repeat_ngram=np.asarray([row.no_repeat_ngram_size for row in rows], np.int32),
    )


def _suppressed(tokenizer, suppress_tokens) -> np.ndarray:
    """(V,) True for what is never said; the special tokens of the prompt never are, whatever the option says."""
    if not suppress_tokens:
        return np.zeros(tokenizer.vocab_size, bool)
    ids = {token for token in suppress_tokens if token >= 0}
    ids |= set(tokenizer.non_speech_tokens) if -1 in suppress_tokens else set()
    ids |= {tokenizer.transcribe, tokenizer.translate, tokenizer.sot, tokenizer.sot_prev, tokenizer.sot_lm}
    ids.add(tokenizer.no_speech)
    if max(ids) >= tokenizer.vocab_size:
        raise ValueError(f"suppress_tokens has {max(ids)}, but the vocabulary ends at {tokenizer.vocab_size - 1}")
    return np.isin(np.arange(tokenizer.vocab_size), list(ids))


@functools.partial(jax.jit, static_argnums=0)
def _decode(static, params, memory, prompts, rules, search, keys):
    """One program with two loops, so that no step attends to the empty slots of a long prompt where all are short."""
    params = _expanded(params)

    def run(room):
        cut = prompts._replace(tokens=prompts.tokens[:, -room:])
        return _decode_in(static, params, memory, cut, rules, search, keys)

    most = prompts.tokens.shape[1]
    is_short = jnp.max(prompts.lengths) <= _CHUNK
    return run(most) if most == _CHUNK else lax.cond(is_short, lambda: run(_CHUNK), lambda: run(most))


def _decode_in(static, params, memory, prompts, rules, search, keys):
    """Prompt through the decoder, then the loop. A window's hypotheses share one cache: the prompt's R slots, then G
    slots for each step; a mask shows each of them its own past.
    """
    model, ids, group_size, max_tokens, max_finished = static
    config, variables = model.config, {"params": params}
    batch, room = prompts.tokens.shape
    size = room + group_size * max_tokens
    first = (room - prompts.lengths)[:, None]  # slot of the prompt's first token
    slots = jnp.arange(size)[None, None]
    in_prompt = (slots >= first[:, None]) & (slots < room)
    group = jnp.arange(group_size)
    keys = jax.vmap(lambda key: jax.vmap(lambda row: jax.random.fold_in(key, row))(group))(keys)

    def prefill(chunk, carry):
        cache, _, at_sot = carry
        start = chunk * _CHUNK
        tokens = lax.dynamic_slice_in_dim(prompts.tokens, start, _CHUNK, axis=1)
        query = start + jnp.arange(_CHUNK)[None, :, None]
        mask = in_prompt & (slots <= query)
        positions = jnp.maximum(query[..., 0] - first, 0)
        hidden, cache = model.apply(
            variables, tokens, memory, positions=positions, mask=mask[:, None], cache=cache, slot=start, method="decode"
        )
        is_sot = (query == (first + prompts.sot[:, None])[:, :, None]).astype(hidden.dtype)
        return cache, hidden[:, -1:], at_sot + jnp.sum(hidden * is_sot, axis=1, keepdims=True)

    def logits_of(hidden):
        return model.apply(variables, hidden, method="logits")

    nothing = jnp.zeros((batch, 1, config.embed_dim), config.dtype)
    carry = init_cache(config, batch, size), nothing, nothing
    num_chunks, skipped = room // _CHUNK, jnp.min(first) // _CHUNK
    cache, hidden, at_sot = lax.fori_loop(skipped, num_chunks, prefill, carry)
    no_speech = jax.nn.softmax(logits_of(at_sot)[:, 0], axis=-1)[:, ids.no_speech]

    def choose(state, logits):
        logits = apply_rules(logits, state.tokens, state.step, rules, ids)
        return beam.advance(state, logits, search, keys, ids.eot)

    def next_logits(state, cache):
        step = state.step - 1
        tokens = lax.dynamic_index_in_dim(state.tokens, step, axis=2, keepdims=False)
        written = jnp.arange(max_tokens)[None, None, :, None] <= step
        own = written & (state.writers[..., None] == group[None, None, None])
        own = own.reshape(batch, group_size, max_tokens * group_size)
        seen = jnp.broadcast_to(in_prompt[..., :room], (batch, group_size, room))
        mask = jnp.concatenate([seen, own], axis=-1)[:, None]
        positions = jnp.minimum(prompts.lengths[:, None] + step, config.text_length - 1)
        positions = jnp.broadcast_to(positions, (batch, group_size))
        slot = room + step * group_size
        hidden, cache = model.apply(
            variables, tokens, memory, positions=positions, mask=mask, cache=cache, slot=slot, method="decode"
        )
        return logits_of(hidden), cache

    state = beam.start(search, group_size, max_tokens, max_finished, ids.eot)
    logits = jnp.broadcast_to(logits_of(hidden), (batch, group_size, config.vocab_size))
    state = choose(state, logits)
    state, _ = decode_loop(next_logits, choose, lambda state: jnp.all(state.done), state, cache)
    return state, no_speech


def _result(tokenizer, state, audio, options, no_speech, eot) -> DecodingResult:
    """The best candidate by average log-probability, or by Wu et al.'s length penalty."""
    found = beam.candidates(state, audio, width=options.width, is_beam=options.is_beam, eot=eot)

    def rank(candidate):
        tokens, score = candidate
        length = max(len(tokens), 1)
        penalty = length if options.length_penalty is None else ((5 + length) / 6) ** options.length_penalty
        return score / penalty

    tokens, score = max(found, key=rank)
    text = tokenizer.decode(tokens).strip()
    return DecodingResult(
        tokens=tuple(tokens),
        text=text,
        language=options.language or "en",
        avg_logprob=score / (len(tokens) + 1),
        no_speech_prob=no_speech,
        temperature=options.temperature,
        compression_ratio=compression_ratio(text),
    )
