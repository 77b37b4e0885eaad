"""The one decode loop of the house: a token at a time, with a cache, inside one compiled `lax.while_loop`."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaudio.nn.transformer import unstack_layers
from jaxaudio.ops.sampling import Sampling, make_sampling, sample


def generate(
    model: nn.Module,
    params: Any,
    key: jax.Array,
    *,
    init_cache: Callable[[int, int], Any],
    prompts: Sequence[np.ndarray],
    length: int,
    num_tokens: int | None = None,
    requests: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Continues each prompt to `num_tokens` tokens.

    A row's result depends on its prompt, its options, `key` and its request number alone, not on the batch, its place
    in it or the number of calls: token t of request r is drawn with fold_in(fold_in(key, r), t). Every option is an
    array; one program per (batch size, length) serves all prompts, lengths and options.

    Args:
      model: called as model.apply({"params": params}, tokens (B, 1), cache=cache, position=t), gives (logits (B, 1, V),
        cache). Its first input is 0, the start token.
      params: stacked as trained, or from `unstack_layers`. Unstacking is done once per call, before the loop.
      key: of all draws.
      init_cache: (rows, positions) -> an empty cache of the model.
      prompts: B rows of tokens that are forced, each of any length up to num_tokens (empty ones too).
      length: the context, which is the size of the cache.
      num_tokens: tokens a row in the end, prompt included; `length` if None.
      requests: the request number of each row; 0, 1, ... if None.
      sampling: options per row; plain sampling if None.
      allowed: (V,) True where a token may be drawn; all if None.
    Returns:
      (B, num_tokens) int32.
    Raises:
      ValueError: num_tokens is longer than the context, a prompt longer than num_tokens, or requests or sampling are
        not one per prompt; the message has both numbers.
    """
    num_tokens = length if num_tokens is None else num_tokens
    if not 0 < num_tokens <= length:
        raise ValueError(f"num_tokens must be in 1..{length} (the context), got {num_tokens}")
    for row, prompt in enumerate(prompts):
        if len(prompt) > num_tokens:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, more than the {num_tokens} to fill (context {length}); "
                "shorten it"
            )
    chunks = stream(
        model,
        params,
        key,
        cache=init_cache(len(prompts), length),
        prompts=prompts,
        chunk_length=length,
        num_tokens=num_tokens,
        requests=requests,
        sampling=sampling,
        allowed=allowed,
    )
    return next(chunks)


def stream(
    model: nn.Module,
    params: Any,
    key: jax.Array,
    *,
    cache: Any,
    prompts: Sequence[np.ndarray],
    chunk_length: int,
    num_tokens: int | None = None,
    requests: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    allowed: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Continues each prompt chunk by chunk, as `generate` does, but to any length.

    The cache may be shorter than what is decoded: then each token sees as many positions as the cache holds, and time
    and memory a token stay the same. One program per (batch size, cache, chunk_length) serves everything.

    Args:
      model, params, key, requests, sampling, allowed: as for `generate`.
      cache: an empty cache of the model; its buffers are used up.
      prompts: B rows of tokens that are forced, of any lengths.
      chunk_length: tokens between two looks at the result; it changes none.
      num_tokens: where to stop, prompt included; None goes on for as long as it is asked to.
    Yields:
      (B, chunk_length) int32, the next tokens of each row, prompts included; the last chunk may be shorter.
    Raises:
      ValueError: requests or sampling are not one per prompt; the message has both numbers.
    """
    requests = np.arange(len(prompts)) if requests is None else np.asarray(requests)
    sampling = make_sampling(len(prompts)) if sampling is None else sampling
    for name, rows in (("requests", len(requests)), ("sampling", len(sampling.temperature))):
        if rows != len(prompts):
            raise ValueError(f"{name} must have a row for each of {len(prompts)} prompts, got {rows}")
    params = _unstacked(params)
    previous, position = np.zeros((len(prompts), 1), np.int32), 0
    while num_tokens is None or position < num_tokens:
        length = chunk_length if num_tokens is None else min(chunk_length, num_tokens - position)
        forced, is_forced = (np.zeros((len(prompts), chunk_length), dtype) for dtype in (np.int32, bool))
        for row, prompt in enumerate(prompts):
            part = prompt[position : position + chunk_length]
            forced[row, : len(part)] = part
            is_forced[row, : len(part)] = True
        tokens, cache = _decode(
            model,
            params,
            cache,
            key,
            previous,
            forced,
            is_forced,
            np.int32(position),
            np.int32(length),
            requests.astype(np.uint32),
            sampling,
            allowed,
        )
        tokens = np.asarray(tokens)
        yield tokens[:, :length]
        previous, position = tokens[:, -1:], position + length


# Sliced once, a layer's weights are read in place by every pass of the loop.
_unstacked = jax.jit(unstack_layers)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(model, params, cache, key, previous, forced, is_forced, start, length, requests, sampling, allowed):
    """The tokens at positions from `start` on, `previous` (B, 1) being the one before; and the cache after them."""
    row_keys = jax.vmap(lambda request: jax.random.fold_in(key, request))(requests)

    def next_logits(state, cache):
        index, tokens = state
        before = lax.dynamic_slice_in_dim(tokens, jnp.maximum(index - 1, 0), 1, axis=1)
        inputs = jnp.where(index == 0, previous, before)
        logits, cache = model.apply({"params": params}, inputs, cache=cache, position=start + index)
        return logits[:, 0], cache

    def choose(state, logits):
        index, tokens = state
        logits = logits if allowed is None else jnp.where(allowed[None], logits, -jnp.inf)
        keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, start + index))(row_keys)
        own, is_own = (lax.dynamic_slice_in_dim(x, index, 1, axis=1)[:, 0] for x in (tokens, is_forced))
        token = jnp.where(is_own, own, sample(keys, logits, sampling))
        return index + 1, lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)

    state, cache = decode_loop(next_logits, choose, lambda state: state[0] >= length, (jnp.int32(0), forced), cache)
    return state[1], cache


def decode_loop(
    next_logits: Callable[[Any, Any], tuple[jax.Array, Any]],
    choose: Callable[[Any, jax.Array], Any],
    is_finished: Callable[[Any], jax.Array],
    state: Any,
    cache: Any,
) -> tuple[Any, Any]:
    """A model's pass and a choice, in turns, until finished: the loop of every decoder of the house, for use under jit.

    Args:
      next_logits: (state, cache) -> (logits after the tokens in `state`, cache).
      choose: (state, logits) -> the state with the next tokens.
      is_finished: state -> whether to stop; asked before each turn.
      state: tokens so far and whatever choosing needs.
      cache: of the model; its buffers are updated in place.
    Returns:
      The last state, and the cache after it.
    """

    def turn(carry):
        state, cache = carry
        logits, cache = next_logits(state, cache)
        return choose(state, logits), cache

    return lax.while_loop(lambda carry: ~is_finished(carry[0]), turn, (state, cache))
