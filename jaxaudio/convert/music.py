"""Folders of Music Transformers: config.json, with all it takes to write music, and model.safetensors in float32."""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxaudio.config import ConfigError, from_dict, to_dict
from jaxaudio.convert import codec_tensors
from jaxaudio.convert.codec_tensors import Parameter
from jaxaudio.convert.folders import read_json, whole_folder, write_json
from jaxaudio.convert.tensors import ConvertError, read_safetensors, write_safetensors
from jaxaudio.data.events import EventVocabulary
from jaxaudio.models.music_transformer import (
    AccompanimentConfig,
    AccompanimentTransformer,
    MusicTransformer,
    MusicTransformerConfig,
)

_WEIGHTS = "model.safetensors"
_KINDS = {
    "music_transformer": (MusicTransformerConfig, MusicTransformer),
    "accompaniment": (AccompanimentConfig, AccompanimentTransformer),
}


class MusicModel(NamedTuple):
    """A model and what its tokens mean.

    Attributes:
      model: a `MusicTransformer` or an `AccompanimentTransformer`.
      params: its float32 NumPy arrays, layers stacked.
      vocabulary: of its events.
      context: events of a training row, so many as the model can take at once.
    """

    model: nn.Module
    params: dict[str, Any]
    vocabulary: EventVocabulary
    context: int


def write_music_model(
    folder: str | os.PathLike,
    config: MusicTransformerConfig | AccompanimentConfig,
    params: Mapping[str, Any],
    vocabulary: EventVocabulary,
    *,
    context: int,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `read_music_model` reads; it appears whole or not at all.

    Args:
      folder: to write.
      config: the model's.
      params: NumPy or JAX arrays, partitioned or not, layers stacked.
      vocabulary: of its events.
      context: events of a training row.
      overwrite: whether a model in that folder is replaced.
    Raises:
      ConvertError: the folder exists and is not to be overwritten, the parameters are not those of the config (missing,
        unexpected and misshapen ones are named), or the vocabulary is not of the model's size.
    """
    kind = next(name for name, (config_class, _) in _KINDS.items() if isinstance(config, config_class))
    tensors = codec_tensors.from_tree(nn.meta.unbox(dict(params)))
    _check_vocabulary(config, vocabulary, context, "the model to write")
    codec_tensors.check(_parameters(kind, config), tensors, "the tree of parameters", "model")
    values = {"kind": kind, "config": to_dict(config), "vocabulary": to_dict(vocabulary), "context": context}
    with whole_folder(pathlib.Path(folder).absolute(), overwrite, ("config.json", _WEIGHTS)) as temporary:
        write_json(temporary / "config.json", values)
        write_safetensors(temporary / _WEIGHTS, tensors)


def read_music_model(folder: str | os.PathLike) -> MusicModel:
    """Reads what `write_music_model` wrote.

    Raises:
      ConvertError: no folder of a Music Transformer, a damaged file, or a config and tensors that do not agree
        (missing, unexpected and misshapen tensors are named).
    """
    folder = pathlib.Path(folder)
    where = folder / "config.json"
    values = read_json(where)
    kind = values.get("kind")
    if kind not in _KINDS:
        found = values.get("model_type") if kind is None else kind
        raise ConvertError(f"{folder} is no Music Transformer: {where} has kind {found!r}, expected one of {[*_KINDS]}")
    config_class, model_class = _KINDS[kind]
    try:
        config = from_dict(config_class, values["config"])
        vocabulary = from_dict(EventVocabulary, values["vocabulary"])
        context = values["context"]
    except (ConfigError, KeyError) as error:
        raise ConvertError(f"{where}: {error}") from error
    _check_vocabulary(config, vocabulary, context, str(where))
    tensors = read_safetensors(folder / _WEIGHTS)
    codec_tensors.check(_parameters(kind, config), tensors, str(folder / _WEIGHTS), "model")
    return MusicModel(model_class(config), codec_tensors.to_tree(tensors), vocabulary, context)


def _check_vocabulary(config, vocabulary, context, where: str) -> None:
    decoder = config.decoder if isinstance(config, AccompanimentConfig) else config
    if decoder.vocab_size != vocabulary.size:
        raise ConvertError(f"{where} has vocab_size {decoder.vocab_size}, but a vocabulary of {vocabulary.size} events")
    if type(context) is not int or context < 1:
        raise ConvertError(f"{where}: context must be a number of events, got {context!r}")


@functools.cache
def _parameters(kind: str, config: MusicTransformerConfig | AccompanimentConfig) -> tuple[Parameter, ...]:
    """All parameters of a model."""
    model, tokens = _KINDS[kind][1](config), jnp.zeros((1, 1), jnp.int32)
    inputs = (tokens, tokens) if kind == "accompaniment" else (tokens,)
    tree = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    return tuple(Parameter(path, path, "same", leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items())
