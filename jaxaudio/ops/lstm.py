"""Stacked long short-term memory (Hochreiter & Schmidhuber 1997), with the state passed in and out."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxaudio.ops.matmul import project

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
        # The input's share of the gates in one product over all steps: only the recurrent one is left to the loop.
        driven = project(y, layer["input_kernel"]) + layer["bias"][None, None]
        y, end = _recur(driven.swapaxes(0, 1).astype(jnp.float32), layer["hidden_kernel"].astype(jnp.float32), begin)
        y = y.swapaxes(0, 1).astype(x.dtype)
        last.append(end)
    return y, tuple(last)


@jax.custom_vjp
def _recur(driven, kernel, state):
    """(T, B, 4 D), (D, 4 D), (h, c) -> h at all steps (T, B, D), the last (h, c).

    The gradient of the kernel is one product over all steps; automatic differentiation would add an outer product of
    the kernel's size to it at every step.
    """

    def step(state, driven):
        state, _ = _step(state, driven, kernel)
        return state, state[0]

    state, y = lax.scan(step, state, driven)
    return y, state


def _step(state, driven, kernel):
    h, c = state
    i, f, g, o = jnp.split(driven + h @ kernel, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    c = f * c + i * g
    return (o * jnp.tanh(c), c), (i, f, g, o)


def _forward(driven, kernel, state):
    def step(state, driven):
        end, gates = _step(state, driven, kernel)
        return end, (state, end, gates)

    end, kept = lax.scan(step, state, driven)
    return (kept[1][0], end), (kernel, kept)


def _backward(residuals, cotangents):
    kernel, ((h_before, c_before), (_, c), (i, f, g, o)) = residuals
    d_y, d_end = cotangents
    tanh_c = jnp.tanh(c)
    # What each step multiplies its cotangents with, for all steps at once.
    h_to_c = o * (1 - tanh_c**2)
    h_to_o = tanh_c * o * (1 - o)
    c_to_ifg = jnp.stack((g * i * (1 - i), c_before * f * (1 - f), i * (1 - g**2)), axis=2)  # (T, B, 3, D)

    def step(carry, at):
        d_h, d_c = carry
        d_y, f, h_to_c, h_to_o, c_to_ifg = at
        d_h = d_h + d_y
        d_c = d_c + d_h * h_to_c
        d_gates = jnp.concatenate((d_c[:, None] * c_to_ifg, (d_h * h_to_o)[:, None]), axis=1).reshape(len(d_h), -1)
        return (jnp.einsum("BO,IO->BI", d_gates, kernel), d_c * f), d_gates

    d_begin, d_driven = lax.scan(step, d_end, (d_y, f, h_to_c, h_to_o, c_to_ifg), reverse=True)
    return d_driven, jnp.einsum("TBI,TBO->IO", h_before, d_driven), d_begin


_recur.defvjp(_forward, _backward)
