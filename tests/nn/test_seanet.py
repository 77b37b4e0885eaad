import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudio.nn.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder, fold_weight_norm
from jaxaudio.nn.streaming import Stream, pad_time

TINY = SEANetConfig(num_filters=4, embed_dim=6, strides=(2, 3), num_lstm_layers=1)
CONFIGS = {
    "EnCodec": TINY,
    "looks ahead": dataclasses.replace(TINY, causal=False),
    "DAC": dataclasses.replace(
        TINY,
        num_lstm_layers=0,
        dilations=(1, 3),
        residual_kernel_size=7,
        compress=1,
        conv_shortcut=False,
        activation="snake",
        final_tanh=True,
        causal=False,
        pad_mode="zeros",
        short_transpose=True,
        decoder_filters=2,
        encoder_last_kernel_size=3,
    ),
}


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(module, params, x, state=None, last=True, lengths=None):
    """The module's output, what it keeps, and the lengths of the output."""

    def call(module, x):
        stream = Stream(state, last, lengths)
        return module(x, stream), stream.kept, stream.lengths

    return module.apply({"params": params}, x, method=call)


def random_params(module, channels):
    """Without zeros and ones, which would hide mistakes."""
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 60, channels)), Stream()))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        middle = 1 if path[-1].key == "alpha" else 0
        # By fan-in, so that outputs are of order one and the tolerance, which is absolute, means the same for all nets.
        width = 0.5 if leaf.ndim == 1 else 1.5 * np.prod(leaf.shape[:-1]) ** -0.5
        return rng.uniform(middle - width, middle + width, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, params)


@pytest.fixture(scope="module", params=CONFIGS)
def nets(request):
    config = CONFIGS[request.param]
    pair = (SEANetEncoder(config), 1), (SEANetDecoder(config), config.embed_dim)
    return config, [(module, random_params(module, channels)) for module, channels in pair]


def pieces_of(x, sizes):
    ends = np.cumsum(sizes)
    assert ends[-1] == x.shape[1]
    return [x[:, end - size : end] for end, size in zip(ends, sizes, strict=True)]


def test_encoder_in_pieces_equals_whole(nets):
    config, ((module, params), _) = nets
    sizes = (60, 6, 6, 6, 41)
    x = jax.random.normal(jax.random.key(2), (2, 119, 1))
    expected = apply(module, params, x)[0]
    assert expected.shape == (2, 20, config.embed_dim)
    state, out = None, []
    pieces = pieces_of(x, sizes)
    for index, piece in enumerate(pieces):
        y, state, _ = apply(module, params, piece, state, index == len(pieces) - 1)
        out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, 1), expected, atol=1e-5)
    if config.causal:
        assert out[0].shape[1] == sizes[0] // config.hop_length  # no delay


def test_decoder_in_pieces_equals_whole(nets):
    config, (_, (module, params)) = nets
    sizes = (29, 1, 1, 1, 41)
    x = jax.random.normal(jax.random.key(3), (2, 73, config.embed_dim))
    expected = apply(module, params, x)[0]
    lost = 1 if config.short_transpose else 0  # the odd stride's step, at its own rate
    assert expected.shape == (2, (73 * 3 - lost) * 2, 1)
    state, out = None, []
    pieces = pieces_of(x, sizes)
    for index, piece in enumerate(pieces):
        y, state, _ = apply(module, params, piece, state, index == len(pieces) - 1)
        out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, 1), expected, atol=1e-5)


def test_rows_of_unequal_length_equal_one_by_one(nets):
    config, pair = nets
    for module, params in pair:
        channels = 1 if isinstance(module, SEANetEncoder) else config.embed_dim
        x = jax.random.normal(jax.random.key(4), (3, 31, channels))
        lengths = jnp.array([31, 7, 1])
        if config.short_transpose and isinstance(module, SEANetEncoder):
            lengths = jnp.array([30, 24, 6])
        y, _, new_lengths = apply(module, params, x, lengths=lengths)
        for row in range(3):
            alone = apply(module, params, x[row : row + 1, : int(lengths[row])])[0]
            assert alone.shape[1] == new_lengths[row]
            np.testing.assert_allclose(y[row, : alone.shape[1]], alone[0], atol=1e-5)


def test_group_norm_in_batches_and_never_in_pieces():
    config = dataclasses.replace(TINY, norm="group", causal=False, channels=2)
    module = SEANetEncoder(config)
    x = jax.random.normal(jax.random.key(4), (2, 31, 2))
    params = random_params(module, 2)
    y, _, lengths = apply(module, params, x, lengths=jnp.array([31, 20]))
    for row, length in enumerate((31, 20)):
        alone = apply(module, params, x[row : row + 1, :length])[0]
        np.testing.assert_allclose(y[row, : lengths[row]], alone[0], atol=1e-5)
    with pytest.raises(ValueError, match="whole signal"):
        apply(module, params, x, last=False)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "edge"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_pad_time_of_short_and_long_signals(mode, length):
    x = np.random.default_rng(0).standard_normal((1, length, 2)).astype(np.float32)
    left, right = 4, 3
    extended = np.concatenate([x, np.zeros((1, max(0, left - length + 1), 2))], axis=1) if mode == "reflect" else x
    numpy_mode = "constant" if mode == "zeros" else mode
    expected = np.pad(extended, ((0, 0), (left, right), (0, 0)), mode=numpy_mode)[:, : left + length + right]
    np.testing.assert_array_equal(pad_time(jnp.asarray(x), left, right, mode), expected)
    rows = jnp.pad(jnp.asarray(x), ((0, 0), (0, 5), (0, 0)), constant_values=9.0)
    ends = jnp.array([length]), jnp.array([right])
    np.testing.assert_array_equal(pad_time(rows, left, right, mode, ends)[:, : left + length + right], expected)


def test_lengths_only_of_last_pieces():
    with pytest.raises(ValueError, match="last piece"):
        Stream(None, last=False, lengths=jnp.array([1]))


def test_folded_weight_norm_is_the_same_net():
    config = dataclasses.replace(TINY, weight_norm=True)
    for kind, channels in ((SEANetEncoder, 1), (SEANetDecoder, 6)):
        x = jax.random.normal(jax.random.key(4), (1, 31, channels))
        params = random_params(kind(config), channels)
        expected = apply(kind(config), params, x)[0]
        folded = fold_weight_norm(params)
        assert set(folded["conv_in"]) == {"kernel", "bias"}
        np.testing.assert_allclose(apply(kind(TINY), folded, x)[0], expected, atol=1e-5)
