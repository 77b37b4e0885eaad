"""Our codecs beside transformers' on the same random weights, of one recording and of a batch of unequal ones."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxaudio.convert.codec import CodecCheckpoint, load_codec
from jaxaudio.convert.codec_read import MODELS

HFEncode = Callable[[torch.Tensor, int], torch.Tensor]  # waveform (1, channels, A), number of codebooks -> (1, Q, T)
HFDecode = Callable[[torch.Tensor], torch.Tensor]  # (1, Q, T) -> (1, channels, A)
LENGTHS = (301, 2, 158)  # odd, shorter than a frame, between


def load(peer, folder) -> CodecCheckpoint:
    """The peer's weights through its folder."""
    peer.save_pretrained(folder)
    return load_codec(folder)


def model_of(checkpoint: CodecCheckpoint) -> nn.Module:
    """The checkpoint's model."""
    return MODELS[checkpoint.kind][1](checkpoint.config)


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode(model, params, waveform, num_codebooks, lengths=None):
    return model.apply({"params": params}, waveform, num_codebooks, lengths=lengths, method="encode")[0]


@functools.partial(jax.jit, static_argnums=0)
def decode(model, params, codes, lengths=None):
    return model.apply({"params": params}, codes, lengths=lengths, method="decode")[0]


def noise(channels: int, length: int = LENGTHS[0]) -> np.ndarray:
    """(3, length, channels), louder and softer."""
    rng = np.random.default_rng(8)
    return (rng.normal(size=(3, length, channels)) * [[[0.3]], [[0.1]], [[0.5]]]).astype(np.float32)


def assert_parity(checkpoint: CodecCheckpoint, hf_encode: HFEncode, hf_decode: HFDecode, levels: Sequence[int]) -> None:
    """Codes equal and audio to 1e-4, alone with any number of codebooks and in a batch of unequal lengths."""
    model, params = model_of(checkpoint), checkpoint.params
    waveform = noise(checkpoint.config.channels)

    def expected_codes(row, length, count):
        return hf_encode(torch.tensor(waveform[row, None, :length].swapaxes(1, 2)), count).numpy()

    codes = np.asarray(encode(model, params, waveform[:1], levels[-1]))
    assert len(np.unique(codes)) > 8
    for count in levels:
        np.testing.assert_array_equal(codes[:, :count], expected_codes(0, LENGTHS[0], count))

    lengths, least = np.asarray(LENGTHS), levels[0]
    batch = np.asarray(encode(model, params, waveform, least, lengths))
    frames = -(-lengths // checkpoint.config.hop_length)
    for row, (length, count) in enumerate(zip(lengths, frames, strict=True)):
        np.testing.assert_array_equal(batch[row, None, :, :count], expected_codes(row, length, least))

    def assert_audio(audio, codes):
        expected = hf_decode(torch.tensor(codes).long()).numpy().swapaxes(1, 2)
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(audio[:, : expected.shape[1]], expected, atol=1e-4, rtol=0)

    assert_audio(np.asarray(decode(model, params, codes)), codes)
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    for count in levels[1:-1]:  # not compiled as a whole, as only the quantizer's part differs
        audio = model.apply(variables, jnp.asarray(codes[:, :count]), method="decode")[0]
        assert_audio(np.asarray(audio), codes[:, :count])
    audio = np.asarray(decode(model, params, jnp.asarray(batch), frames))
    for row, count in enumerate(frames):
        assert_audio(audio[row, None], batch[row, None, :, :count])
