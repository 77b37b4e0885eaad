import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudio.models.soundstream import PRESETS, SoundStream
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.nn.streaming import Stream

PAPER = PRESETS["soundstream_24khz"]


def with_filters(config, encoder, decoder):
    seanet = dataclasses.replace(config.seanet, num_filters=encoder, decoder_filters=decoder)
    return dataclasses.replace(config, seanet=seanet)


@pytest.mark.parametrize(
    ("encoder", "decoder", "millions"), [(32, 32, 8.4), (16, 16, 2.4), (16, 32, 5.5), (8, 32, 4.8), (32, 16, 5.3)]
)
def test_sizes_of_the_paper(encoder, decoder, millions):
    """Table I of the paper, without codebooks."""
    model = SoundStream(with_filters(PAPER, encoder, decoder))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 640, 1)), jnp.array([24]))["params"]
    halves = {name: params[name] for name in ("encoder", "decoder")}
    assert round(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(halves)) / 1e6, 1) == millions


def test_rates_of_the_paper():
    assert (PAPER.frame_rate, PAPER.num_codebooks * 10 * PAPER.frame_rate) == (75, 18_000)
    audiolm = PRESETS["soundstream_16khz"]
    assert (audiolm.frame_rate, audiolm.num_codebooks * 10 * audiolm.frame_rate) == (50, 6000)


@pytest.fixture(scope="module")
def denoiser():
    config = with_filters(PAPER, 2, 2)
    seanet = dataclasses.replace(config.seanet, embed_dim=4, strides=(2, 2))
    config = dataclasses.replace(config, seanet=seanet, rvq=RVQConfig(3, 16, 4, 4), denoising=True)
    model = SoundStream(config)
    waveform = jax.random.normal(jax.random.key(1), (2, 40, 1))
    params = jax.jit(model.init)(jax.random.key(0), waveform, jnp.array([3, 3]))["params"]
    params["film_gamma"] = params["film_gamma"].at[1].set(0.5)
    params["film_beta"] = params["film_beta"].at[1].set(jnp.arange(4.0))
    return model, params, waveform


def test_film_acts_on_the_rows_that_are_to_be_denoised(denoiser):
    model, params, waveform = denoiser
    variables = {"params": params}
    encode = jax.jit(lambda denoise: model.apply(variables, waveform, denoise=denoise, method="encode")[0])
    kept = model.apply(variables, waveform, method="encode")[0]
    mixed = encode(jnp.array([False, True]))
    np.testing.assert_array_equal(mixed[0], kept[0])
    assert (mixed[1] != kept[1]).any()
    latents = model.apply(variables, waveform, method=lambda m, x: m.encoder(x, Stream()))
    expected = model.apply(
        variables, 0.5 * latents + jnp.arange(4.0)[None, None], method=lambda m, x: m.quantizer.encode(x, 3)
    )
    np.testing.assert_array_equal(mixed[1], expected[1])
    trained, quantized = model.apply(variables, waveform, jnp.array([3, 3]), jnp.array([False, True]))
    np.testing.assert_array_equal(quantized.codes, mixed)
    assert trained.shape == waveform.shape


def test_denoise_without_film_is_an_error(denoiser):
    model, params, waveform = denoiser
    plain = SoundStream(dataclasses.replace(model.config, denoising=False))
    with pytest.raises(ValueError, match="denoising=False"):
        plain.apply({"params": params}, waveform, denoise=jnp.array([True, True]), method="encode")
