"""Folders of Music Transformers: what is written is read, and what does not fit is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from jaxaudio.convert.music import read_music_model, write_music_model
from jaxaudio.convert.tensors import ConvertError
from jaxaudio.data.events import MAGENTA, PAPER
from jaxaudio.models.music_transformer import (
    AccompanimentConfig,
    AccompanimentTransformer,
    MusicTransformer,
    MusicTransformerConfig,
)
from jaxaudio.nn.transformer_config import TransformerConfig

SIZES = {"num_layers": 2, "embed_dim": 8, "num_heads": 2, "mlp_dim": 12}
MUSIC = MusicTransformerConfig(MAGENTA.size, TransformerConfig(**SIZES, positions="relative", max_distance=5))
ACCOMPANIMENT = AccompanimentConfig(
    92,
    TransformerConfig(**SIZES, attention="full"),
    MusicTransformerConfig(MAGENTA.size, TransformerConfig(**SIZES, cross_attention=True)),
)
TOKENS = jnp.zeros((1, 2), jnp.int32)
MODELS = {
    "music_transformer": (MUSIC, MusicTransformer, 1),
    "accompaniment": (ACCOMPANIMENT, AccompanimentTransformer, 2),
}
UP = "transformer/layers/mlp/up/kernel"


def boxed_params(name):
    """As training has them: partitioned, on the device."""
    config, model, num_inputs = MODELS[name]
    abstract = jax.eval_shape(model(config).init, jax.random.key(0), *[TOKENS] * num_inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), abstract)


@pytest.fixture
def folder(tmp_path):
    write_music_model(tmp_path / "model", MUSIC, boxed_params("music_transformer"), MAGENTA, context=64)
    return tmp_path / "model"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read(name, tmp_path):
    config, model, _ = MODELS[name]
    params = boxed_params(name)
    write_music_model(tmp_path / "model", config, params, MAGENTA, context=64)
    found = read_music_model(tmp_path / "model")
    assert (found.model, found.vocabulary, found.context) == (model(config), MAGENTA, 64)
    jax.tree.map(np.testing.assert_array_equal, found.params, nn.meta.unbox(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype("float32")}
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_is_replaced_only_where_that_is_said(folder):
    params = jax.tree.map(jnp.zeros_like, boxed_params("music_transformer"))
    with pytest.raises(ConvertError, match="model exists"):
        write_music_model(folder, MUSIC, params, MAGENTA, context=64)
    write_music_model(folder, MUSIC, params, MAGENTA, context=32, overwrite=True)
    assert read_music_model(folder).context == 32


def test_tensors_that_do_not_fit_are_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    up, out = tensors.pop(UP), tensors.pop("transformer/layers/attention/out/kernel")
    save_file(tensors | {UP: up[:, :-1], "extra": out}, file)
    with pytest.raises(ConvertError, match="does not hold the model") as error:
        read_music_model(folder)
    for part in (
        "model.safetensors does not hold the model that its config describes",
        f"{UP} has shape (2, 7, 12), expected (2, 8, 12)",
        "transformer/layers/attention/out/kernel is missing, expected with shape (2, 2, 4, 8)",
        "extra of shape (2, 2, 4, 8) is not one of the model's tensors",
    ):
        assert part in str(error.value)
    file.write_bytes(b"no tensors")
    with pytest.raises(ConvertError, match=r"model\.safetensors cannot be read"):
        read_music_model(folder)
    with pytest.raises(ConvertError, match="the tree of parameters does not hold the model"):
        write_music_model(folder.with_name("new"), MUSIC, {}, MAGENTA, context=64)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "mimi"}, r"is no Music Transformer: .*config\.json has kind 'mimi', expected one of"),
        ({"kind": None, "model_type": "whisper"}, "has kind 'whisper'"),
        ({"context": 0}, "context must be a number of events, got 0"),
        ({"vocabulary": {"min_pitch": 0}}, r"config\.json: missing max_pitch"),
        ({"vocabulary": PAPER.__dict__}, "vocab_size 310, but a vocabulary of 388 events"),
    ],
)
def test_a_config_that_makes_no_model_is_an_error(folder, change, match):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConvertError, match=match):
        read_music_model(folder)


def test_a_folder_without_a_config_is_an_error(tmp_path):
    with pytest.raises(ConvertError, match=r"config\.json cannot be read"):
        read_music_model(tmp_path)
