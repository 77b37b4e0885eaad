"""The one decode loop of the house: a token at a time, with a cache, inside one compiled `lax.while_loop`."""

import functools
from collections.abc import Callable, Sequence
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
    prompt_lengths = [len(prompt) for prompt in prompts]
    for row, prompt_length in enumerate(prompt_lengths):
        if prompt_length > num_tokens:
            raise ValueError(
                f"prompt {row} has {prompt_length} tokens, more than the {num_tokens} to fill (context {length}); "
                "shorten it"
            )
    requests = np.arange(len(prompts)) if requests is None else np.asarray(requests)
    sampling = make_sampling(len(prompts)) if sampling is None else sampling
    for name, rows in (("requests", len(requests)), ("sampling", len(sampling.temperature))):
        if rows != len(prompts):
            raise ValueError(f"{name} must have a row for each of {len(prompts)} prompts, got {rows}")
    forced = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        forced[row, : len(prompt)] = prompt
    tokens = _decode(
        model,
        params,
        init_cache(len(prompts), length),
        key,
        forced,
        np.asarray(prompt_lengths, np.int32),
        np.int32(num_tokens),
        requests.astype(np.uint32),
        sampling,
        allowed,
    )
    return np.asarray(tokens)[:, :num_tokens]


@functools.partial(jax.jit, static_argnums=0)
def _decode(model, params, cache, key, forced, prompt_lengths, num_tokens, requests, sampling, allowed):
    # Sliced once here, a layer's weights are read in place by every pass of the loop.
    variables = {"params": unstack_layers(params)}
    row_keys = jax.vmap(lambda request: jax.random.fold_in(key, request))(requests)

    def next_logits(state, cache):
        position, tokens = state
        previous = lax.dynamic_slice_in_dim(tokens, jnp.maximum(position - 1, 0), 1, axis=1)
        logits, cache = model.apply(variables, jnp.where(position == 0, 0, previous), cache=cache, position=position)
        return logits[:, 0], cache

    def choose(state, logits):
        position, tokens = state
        logits = logits if allowed is None else jnp.where(allowed[None], logits, -jnp.inf)
        keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, position))(row_keys)
        own = lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)[:, 0]
        token = jnp.where(position < prompt_lengths, own, sample(keys, logits, sampling))
        return position + 1, lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1)

    state = decode_loop(next_logits, choose, lambda state: state[0] >= num_tokens, (jnp.int32(0), forced), cache)
    return state[1]


def decode_loop(
    next_logits: Callable[[Any, Any], tuple[jax.Array, Any]],
    choose: Callable[[Any, jax.Array], Any],
    is_finished: Callable[[Any], jax.Array],
    state: Any,
    cache: Any,
) -> Any:
    """A model's pass and a choice, in turns, until finished: the loop of every decoder of the house, for use under jit.

    Args:
      next_logits: (state, cache) -> (logits after the tokens in `state`, cache).
      choose: (state, logits) -> the state with the next tokens.
      is_finished: state -> whether to stop; asked before each turn.
      state: tokens so far and whatever choosing needs.
      cache: of the model; it never leaves the loop, so its buffers are updated in place.
    Returns:
      The last state.
    """

    def turn(carry):
        state, cache = carry
        logits, cache = next_logits(state, cache)
        return choose(state, logits), cache

    return lax.while_loop(lambda carry: ~is_finished(carry[0]), turn, (state, cache))[0]
