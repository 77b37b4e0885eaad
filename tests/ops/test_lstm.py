"""The stacked LSTM equals torch's, whole, in pieces and in its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxaudio.ops.lstm import lstm

WIDTH, LAYERS = 6, 2
jitted = jax.jit(lstm)


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    return torch.nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True)


def as_params(weights):
    """Ours from torch's names; also of gradients, but for the bias, whose two summands each have the whole gradient."""
    layers = [
        {
            "input_kernel": weights[f"weight_ih_l{layer}"].numpy().T,
            "hidden_kernel": weights[f"weight_hh_l{layer}"].numpy().T,
            "bias": (weights[f"bias_ih_l{layer}"] + weights[f"bias_hh_l{layer}"]).numpy(),
        }
        for layer in range(LAYERS)
    ]
    return jax.tree.map(jnp.asarray, layers)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 17)])
def test_output_and_state_equal_torchs(peer, batch, length):
    x = draw(batch, length, WIDTH)
    state = [(draw(batch, WIDTH, seed=1 + layer), draw(batch, WIDTH, seed=9 + layer)) for layer in range(LAYERS)]
    begin = tuple(torch.tensor(np.stack(arrays)) for arrays in zip(*state, strict=True))
    params = as_params(peer.state_dict())
    for ours, theirs in ((None, None), (tuple(tuple(map(jnp.asarray, pair)) for pair in state), begin)):
        y, last = jitted(jnp.asarray(x), params, ours)
        expected, (h, c) = peer(torch.tensor(x), theirs)
        np.testing.assert_allclose(y, expected.detach(), rtol=1e-5, atol=1e-5)
        for layer in range(LAYERS):
            np.testing.assert_allclose(last[layer][0], h[layer].detach(), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(last[layer][1], c[layer].detach(), rtol=1e-5, atol=1e-5)


def test_pieces_with_the_state_passed_on_equal_the_whole(peer):
    x, params = jnp.asarray(draw(2, 12, WIDTH)), as_params(peer.state_dict())
    whole, end = jitted(x, params)
    state, pieces = None, []
    for piece in jnp.split(x, 3, axis=1):
        y, state = jitted(piece, params, state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), state, end)


def test_gradients_equal_torchs(peer):
    x, direction = draw(2, 9, WIDTH), draw(2, 9, WIDTH, seed=1)
    begin = draw(2 * LAYERS, 2, WIDTH, seed=2)

    def loss(x, params, state):
        y, last = lstm(x, params, state)
        return jnp.sum(y * direction) + sum(jnp.sum(h * h + 3 * c) for h, c in last)

    state = tuple((jnp.asarray(begin[layer]), jnp.asarray(begin[LAYERS + layer])) for layer in range(LAYERS))
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(jnp.asarray(x), as_params(peer.state_dict()), state)

    peer.zero_grad()
    torch_x = torch.tensor(x, requires_grad=True)
    h0, c0 = (torch.tensor(part, requires_grad=True) for part in (begin[:LAYERS], begin[LAYERS:]))
    y, (h, c) = peer(torch_x, (h0, c0))
    (torch.sum(y * torch.tensor(direction)) + torch.sum(h * h + 3 * c)).backward()
    expected = as_params({name: weight.grad for name, weight in peer.named_parameters()})
    for layer in expected:
        layer["bias"] = layer["bias"] / 2
    states = tuple((h0.grad[layer].numpy(), c0.grad[layer].numpy()) for layer in range(LAYERS))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        gradients,
        (torch_x.grad.numpy(), expected, states),
    )


def test_sixteen_bit_input_keeps_a_state_of_float32(peer):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), as_params(peer.state_dict()))
    y, state = jitted(jnp.asarray(draw(1, 3, WIDTH), jnp.bfloat16), params)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}


def test_a_state_of_another_number_of_layers_is_refused(peer):
    zeros = jnp.zeros((1, WIDTH))
    with pytest.raises(ValueError, match="state has 1 layers, params 2"):
        lstm(jnp.ones((1, 2, WIDTH)), as_params(peer.state_dict()), ((zeros, zeros),))
