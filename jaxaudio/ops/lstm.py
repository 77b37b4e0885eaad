"""Stacked long short-term memory (Hochreiter & Schmidhuber 1997), with the state passed in and out."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LSTMState = tuple[tuple[Float[Array, "B D"], Float[Array, "B D"]], ...]  # (h, c) of each layer, float32


def lstm(
    x: Float[Array, "B T D"],
    params: Sequence[Mapping[str, Float[Array, "..."]]],
    state: LSTMState | None = None,
) -> tuple[Float[Array, "B T D"], LSTMState]:
    """Layers one after the other, each as wide as its input; torch's LSTM with its two biases added.

    Args:
      x: input; any float dtype.
      params: of each layer "input_kernel" (D, 4 D), "hidden_kernel" (D, 4 D) and "bias" (4 D), whose columns are the
        input, forget, cell and output gates; torch's weights transposed.
      state: as returned by the call on what came before; zeros if None.
    Returns:
      the last layer's h at each step, in x's dtype, and the state after the last step.
    Raises:
      ValueError: as many states as layers are needed; has both numbers.
    """
    if state is None:
        zeros = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
        state = ((zeros, zeros),) * len(params)
    if len(state) != len(params):
        raise ValueError(f"state has {len(state)} layers, params {len(params)}")
    y, last = x, []
    for layer, begin in zip(params, state, strict=True):
        y, end = _layer(y, layer["input_kernel"], layer["hidden_kernel"], layer["bias"], begin)
        last.append(end)
    return y.astype(x.dtype), tuple(last)


def _layer(x, input_kernel, hidden_kernel, bias, state):
    # The input's share of the gates in one product over all steps: only the recurrent one is left to the loop.
    driven = jnp.einsum("BTI,IO->TBO", x, input_kernel) + bias[None, None]

    def step(carry, driven):
        h, c = carry
        i, f, g, o = jnp.split((driven + h @ hidden_kernel).astype(jnp.float32), 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    state, y = lax.scan(step, state, driven)
    return y.swapaxes(0, 1), state
