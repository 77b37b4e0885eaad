"""Whisper checkpoints in and out: HuggingFace's folders and hub ids, OpenAI's .pt files, and folders of our own."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxaudio.convert import whisper_names, whisper_read, whisper_write
from jaxaudio.convert.folders import SAFETENSORS_FILES, TORCH_FILES
from jaxaudio.convert.hub import fetch_folder
from jaxaudio.convert.tensors import FLOATS, ConvertError, StoredTensor
from jaxaudio.convert.whisper_names import Layout
from jaxaudio.convert.whisper_read import Checkpoint
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.models.whisper import SIZES, WhisperConfig

__all__ = ["ConvertError", "Conversion", "WhisperCheckpoint", "convert_whisper", "load_whisper", "save_whisper"]

# The sizes whose repositories are not named after them.
_REPOSITORIES = {"large-v1": "large", "large": "large-v3", "turbo": "large-v3-turbo"}
_GET_ONE = (
    "take tokenizer.json, or vocab.json and merges.txt, from a HuggingFace repository of the same vocabulary "
    "(openai/whisper-tiny.en of 51864 tokens, openai/whisper-tiny of 51865, openai/whisper-large-v3 of 51866), or "
    "gpt2.tiktoken (51864) or multilingual.tiktoken from openai-whisper's assets"
)


@dataclasses.dataclass(frozen=True)
class WhisperCheckpoint:
    """A loaded checkpoint.

    Attributes:
      config: the model's, for `Whisper(config)`.
      params: float32 NumPy arrays, stacked layers, for `apply({"params": params}, ...)` or `inference_params`.
      tokenizer: its vocabulary.
      dtype: of the parameters as they were stored.
    """

    config: WhisperConfig
    params: dict[str, Any]
    tokenizer: WhisperTokenizer
    dtype: str


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert_whisper` did: read `source` of layout `source_layout`, wrote `destination` of layout `layout`."""

    source: pathlib.Path
    source_layout: Layout
    destination: pathlib.Path
    layout: Layout
    config: WhisperConfig
    dtype: str


def load_whisper(
    source: str | os.PathLike, *, tokenizer: WhisperTokenizer | str | os.PathLike | None = None
) -> WhisperCheckpoint:
    """Loads a Whisper.

    Tensors are read one by one from the mapped file, so that memory holds little more than the model in float32.

    Args:
      source: a folder as HuggingFace publishes it (safetensors, whole or in shards, or pytorch_model.bin), OpenAI's .pt
        file, a folder of ours (also a training run's, whose parameters were exported to parameters.safetensors), an id
        on the HuggingFace Hub such as "openai/whisper-tiny", or a size such as "tiny.en", "large-v3" or "turbo". Only
        .pt and .bin need torch.
      tokenizer: in place of the files in the folder, or beside the .pt file: a tokenizer, its folder or its file.
    Raises:
      ConvertError: there is no such checkpoint; its config and its tensors do not agree (missing, unexpected and
        misshapen tensors are named); it has no tokenizer, or one of another size; or a file is damaged.
    """
    checkpoint = whisper_read.read_checkpoint(_find(source))
    found = _tokenizer(checkpoint, tokenizer)
    params = whisper_names.to_tree(checkpoint.config, checkpoint.tensors)
    return WhisperCheckpoint(checkpoint.config, params, found, checkpoint.dtype)


def save_whisper(
    folder: str | os.PathLike,
    config: WhisperConfig,
    params: Mapping[str, Any],
    tokenizer: WhisperTokenizer,
    dtype: str = "float32",
    *,
    overwrite: bool = False,
) -> None:
    """Writes a folder of ours, which `load_whisper` and `convert_whisper` read.

    Args:
      folder: to write; it appears whole or not at all.
      config: the model's.
      params: its parameters, layers stacked, NumPy or JAX arrays; fetched one by one.
      tokenizer: its vocabulary.
      dtype: "float32", "float16" or "bfloat16", of the stored parameters.
      overwrite: whether a checkpoint in that folder is replaced.
    Raises:
      ConvertError: the folder exists and is not to be overwritten; the parameters or the tokenizer are not those of the
        config; another dtype.
    """
    if dtype not in FLOATS:
        raise ConvertError(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)}")
    if tokenizer.vocab_size != config.vocab_size:
        raise ConvertError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")

    def cast(tensor: StoredTensor) -> StoredTensor:
        return StoredTensor(tensor.shape, np.dtype(dtype), lambda: tensor.read().astype(dtype))

    folder = pathlib.Path(folder).absolute()
    tensors = {path: cast(tensor) for path, tensor in whisper_names.from_tree(config, params).items()}
    whisper_write.write_ours(folder, Checkpoint(folder, "jaxaudio", config, tensors), tokenizer, overwrite=overwrite)


def convert_whisper(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    layout: Layout | None = None,
    tokenizer: WhisperTokenizer | str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Rewrites a checkpoint in another layout, bit for bit: every tensor keeps its numbers in the dtype of the source.

    There and back again gives the same tensors. A folder of ours also remembers what HuggingFace's config said and
    whether an output head was stored beside the embedding; a .pt file has no place for these, for alignment heads (the
    public sizes' are known) and for a tokenizer.

    Args:
      source: as for `load_whisper`.
      destination: a .pt file, or a folder; it appears whole or not at all.
      layout: "openai" for a .pt file; for a folder "hf" or "jaxaudio": by default ours if the source is HuggingFace's,
        else HuggingFace's.
      tokenizer: as for `load_whisper`; a .pt file is written without.
      overwrite: whether a checkpoint at the destination is replaced.
    Raises:
      ConvertError: as `load_whisper`; the destination exists; or its name and the layout do not go together.
    """
    destination = pathlib.Path(destination).absolute()
    is_file = destination.suffix == ".pt"
    if layout is not None and (layout == "openai") != is_file:
        raise ConvertError(
            f"{destination}: layout 'openai' is a file ending in .pt, the others are folders, got {layout!r}"
        )
    checkpoint = whisper_read.read_checkpoint(_find(source))
    layout = layout or ("openai" if is_file else "jaxaudio" if checkpoint.layout == "hf" else "hf")
    if layout == "openai":
        whisper_write.write_openai(destination, checkpoint, overwrite=overwrite)
    else:
        write = {"hf": whisper_write.write_hf, "jaxaudio": whisper_write.write_ours}[layout]
        found = _tokenizer(checkpoint, tokenizer)
        kept = whisper_read.companions(checkpoint, with_tokenizer=tokenizer is None)
        write(destination, checkpoint, found, kept=kept, overwrite=overwrite)
    return Conversion(checkpoint.path, checkpoint.layout, destination, layout, checkpoint.config, checkpoint.dtype)


def _find(source: str | os.PathLike) -> pathlib.Path:
    """The local path of a path, a size or a hub id."""
    path = pathlib.Path(source)
    if path.exists():
        return path.absolute()
    name = os.fspath(source)
    if name in SIZES:
        name = f"openai/whisper-{_REPOSITORIES.get(name, name)}"
    elif not (isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name)) or name.startswith("."):
        raise ConvertError(
            f"{name!r} is no file or folder, no id on the HuggingFace Hub (organisation/name), and no size; the sizes "
            f"are {', '.join(SIZES)}"
        )
    wanted = (*whisper_read.CONFIG_FILES, *whisper_read.TOKENIZER_FILES, *SAFETENSORS_FILES)
    return fetch_folder(name, wanted, fallback=TORCH_FILES)


def _tokenizer(checkpoint: Checkpoint, given: WhisperTokenizer | str | os.PathLike | None) -> WhisperTokenizer:
    """The tokenizer of a checkpoint: the one given, else its files in the folder, or beside the .pt file."""
    size = checkpoint.config.vocab_size
    if isinstance(given, WhisperTokenizer):
        if given.vocab_size != size:
            raise ConvertError(f"the tokenizer has {given.vocab_size} tokens, {checkpoint.path} has {size}")
        return given
    beside = checkpoint.path.parent if checkpoint.layout == "openai" else checkpoint.path
    path = beside if given is None else pathlib.Path(given)
    # openai-whisper keeps the ranks of both vocabularies in one folder.
    ranks = path / ("gpt2.tiktoken" if size == SIZES["tiny.en"].vocab_size else "multilingual.tiktoken")
    path = ranks if ranks.is_file() and not (path / "tokenizer.json").is_file() else path
    try:
        return (WhisperTokenizer.from_folder if path.is_dir() else WhisperTokenizer.from_file)(path, size)
    except FileNotFoundError as error:
        raise ConvertError(
            f"{checkpoint.path} comes without a tokenizer ({error}); {_GET_ONE}, and put it into {beside}, or give its "
            "path as the tokenizer"
        ) from error
    except ValueError as error:
        raise ConvertError(str(error)) from error
