"""Reads Whisper checkpoints: HuggingFace's folders, OpenAI's .pt files, and folders of our own.

A folder of ours holds config.json, whose "model" is the `WhisperConfig`, parameters.safetensors with our paths, and the
tokenizer's files. The folder of a training run is read the same way.
"""

import dataclasses
import operator
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxaudio.config import ConfigError, from_dict
from jaxaudio.convert import whisper_names
from jaxaudio.convert.folders import PARAMETERS, read_hf_tensors, read_json
from jaxaudio.convert.tensors import ConvertError, StoredTensor, read_safetensors
from jaxaudio.convert.torch_files import read_torch, stored_tensors
from jaxaudio.convert.whisper_names import Layout
from jaxaudio.models.whisper import SIZES, WhisperConfig

TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "*.tiktoken",
    "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "normalizer.json",
)  # fmt: skip
CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
HEAD = "proj_out.weight"

# Our fields: OpenAI's and HuggingFace's; the encoder's where upstream has two that must be equal.
_FIELDS = {
    "vocab_size": ("n_vocab", "vocab_size"),
    "num_mels": ("n_mels", "num_mel_bins"),
    "embed_dim": ("n_audio_state", "d_model"),
    "num_heads": ("n_audio_head", "encoder_attention_heads"),
    "num_encoder_layers": ("n_audio_layer", "encoder_layers"),
    "num_decoder_layers": ("n_text_layer", "decoder_layers"),
    "num_positions": ("n_audio_ctx", "max_source_positions"),
    "text_length": ("n_text_ctx", "max_target_positions"),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its tensors unread.

    Attributes:
      path: the file or folder.
      layout: whose it is.
      config: the model's.
      tensors: by our paths, in our shapes and in the dtypes of the file.
      hf_config: HuggingFace's config.json, where the checkpoint is or came from such a folder.
      has_head: whether that one stores the output head beside the embedding, to which it is tied.
    """

    path: pathlib.Path
    layout: Layout
    config: WhisperConfig
    tensors: Mapping[str, StoredTensor]
    hf_config: Mapping[str, Any] | None = None
    has_head: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of the token embedding, the largest tensor."""
        return str(self.tensors["decoder/token_embedding"].dtype)


def read_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Finds out what kind of checkpoint `path` is, and compares its tensors with its config; reads no large tensor.

    Raises:
      ConvertError: no checkpoint, or one whose config and tensors are not those of one Whisper.
    """
    if path.is_file():
        return _read_openai(path)
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ConvertError(f"{path} has no config.json, so it is no checkpoint of Whisper; it holds {found}")
    config = read_json(path / "config.json")
    if config.get("model_type") == "whisper":
        return _read_hf(path, config)
    if isinstance(config.get("model"), dict):
        return _read_ours(path, config)
    raise ConvertError(
        f"{path}: expected config.json to have model_type 'whisper' (HuggingFace) or a 'model' with fields (jaxaudio); "
        f"it has model_type {config.get('model_type')!r} and {', '.join(list(config)[:8])}"
    )


def companions(checkpoint: Checkpoint, *, with_tokenizer: bool) -> list[pathlib.Path]:
    """The files of a checkpoint's folder that are worth keeping beside its weights."""
    if checkpoint.layout == "openai":
        return []
    patterns = [*CONFIG_FILES[1:], *(TOKENIZER_FILES if with_tokenizer else ())]
    return [file for pattern in patterns for file in sorted(checkpoint.path.glob(pattern))]


def _config(
    values: Mapping[str, Any], which: int, where: str, heads: tuple[tuple[int, int], ...] | None
) -> tuple[WhisperConfig, dict[str, str]]:
    """Our config from upstream's values, and its fields in upstream's words."""
    names = {ours: upstream[which] for ours, upstream in _FIELDS.items()}
    for name in names.values():
        if type(values.get(name)) is not int:
            raise ConvertError(f"{where}: expected a whole number as {name}, got {values.get(name)!r}")
    fields = {ours: values[name] for ours, name in names.items()}
    said = {ours: f"{name} is {fields[ours]}" for ours, name in names.items()}
    num_frames = 2 * fields.pop("num_positions")
    try:
        config = WhisperConfig(**fields, num_frames=num_frames, alignment_heads=heads)
        _ = config.encoder  # which checks the heads
    except ValueError as error:
        raise ConvertError(f"{where}: {error}; it says {', '.join(said.values())}") from error
    return config, said


def _require(where: str, values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise ConvertError(f"{where}: {name} is {values[name]!r}, but our Whisper has {value!r}")


def _to_ours(config: WhisperConfig, layout: Layout, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {p.path: p.from_upstream(tensors[p.name(layout)]) for p in whisper_names.parameters(config)}


def _read_hf(folder: pathlib.Path, values: dict[str, Any]) -> Checkpoint:
    where = str(folder / "config.json")
    config, said = _config(values, 1, where, heads=None)
    width, hidden = config.num_heads, 4 * config.embed_dim
    _require(where, values, {"decoder_attention_heads": width, "activation_function": "gelu", "scale_embedding": False})
    _require(where, values, {"encoder_ffn_dim": hidden, "decoder_ffn_dim": hidden})
    config = dataclasses.replace(config, alignment_heads=_hf_alignment_heads(folder, config))
    tensors = read_hf_tensors(folder)
    head = tensors.pop(HEAD, None)
    whisper_names.check(config, "hf", tensors, str(folder), said)
    if head is not None:
        _require_tied(folder, head, tensors["model.decoder.embed_tokens.weight"])
    ours = _to_ours(config, "hf", tensors)
    return Checkpoint(folder, "hf", config, ours, hf_config=values, has_head=head is not None)


def _require_tied(folder: pathlib.Path, head: StoredTensor, embedding: StoredTensor) -> None:
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if not (same and np.array_equal(head.read().view(np.uint8), embedding.read().view(np.uint8))):
        raise ConvertError(
            f"{folder}: {HEAD} {head.shape} {head.dtype} is not model.decoder.embed_tokens.weight {embedding.shape} "
            f"{embedding.dtype}; Whisper's output head is its token embedding, so a model that trained them apart "
            "cannot be had here"
        )


def _hf_alignment_heads(folder: pathlib.Path, config: WhisperConfig) -> tuple[tuple[int, int], ...] | None:
    path = folder / "generation_config.json"
    heads = read_json(path).get("alignment_heads") if path.is_file() else None
    if not heads:
        return None
    try:
        heads = tuple((operator.index(layer), operator.index(head)) for layer, head in heads)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{path}: expected alignment_heads as pairs of a layer and a head, got {heads}") from error
    if all(0 <= layer < config.num_decoder_layers and 0 <= head < config.num_heads for layer, head in heads):
        return heads
    # Distilled checkpoints were published with their teacher's heads.
    warnings.warn(
        f"{path}: alignment_heads {heads} are not all within the decoder's {config.num_decoder_layers} layers of "
        f"{config.num_heads} heads; word timestamps take all heads of the last half of the layers instead",
        stacklevel=2,
    )
    return None


def _read_openai(path: pathlib.Path) -> Checkpoint:
    content = read_torch(path)
    if not (isinstance(content, dict) and {"dims", "model_state_dict"} <= content.keys()):
        keys = list(content)[:8] if isinstance(content, dict) else type(content).__name__
        raise ConvertError(f"{path}: expected OpenAI's 'dims' and 'model_state_dict', got {keys}")
    dims = content["dims"]
    if not isinstance(dims, dict):
        raise ConvertError(f"{path}: expected a dictionary as dims, got {type(dims).__name__}")
    config, said = _config(dims, 0, f"{path}: dims", heads=None)
    _require(f"{path}: dims", dims, {"n_text_state": config.embed_dim, "n_text_head": config.num_heads})
    tensors = stored_tensors(f"{path}: model_state_dict", content["model_state_dict"])
    whisper_names.check(config, "openai", tensors, str(path), said)
    config = dataclasses.replace(config, alignment_heads=_published_heads(path, config))
    return Checkpoint(path, "openai", config, _to_ours(config, "openai", tensors))


def _published_heads(path: pathlib.Path, config: WhisperConfig) -> tuple[tuple[int, int], ...] | None:
    """The alignment heads of the public size with these dims, None where there is no such size.

    Large-v1 and large-v2 have the same dims, so there the file's name decides.
    """
    sizes = {name: size for name, size in SIZES.items() if dataclasses.replace(size, alignment_heads=None) == config}
    if path.stem in sizes:
        return sizes[path.stem].alignment_heads
    heads = {size.alignment_heads for size in sizes.values()}
    if len(heads) > 1:
        warnings.warn(
            f"{path} has the dims of {' and '.join(sizes)}, whose alignment heads differ; word timestamps take all "
            "heads of the last half of the layers, unless the file is named after its size, such as "
            f"{next(iter(sizes))}.pt",
            stacklevel=2,
        )
    return heads.pop() if len(heads) == 1 else None


def _read_ours(folder: pathlib.Path, values: dict[str, Any]) -> Checkpoint:
    try:
        config = from_dict(WhisperConfig, values["model"])
    except ConfigError as error:
        raise ConvertError(f"{folder / 'config.json'}: model: {error}") from error
    path = folder / PARAMETERS
    if not path.is_file():
        advice = f"; write it with `jaxaudio export {folder} {path}`" if (folder / "checkpoints").is_dir() else ""
        raise ConvertError(f"{folder} has no {PARAMETERS}{advice}")
    tensors = read_safetensors(path)
    whisper_names.check(config, "jaxaudio", tensors, str(folder), whisper_names.said(config))
    source = values.get("huggingface") or {}
    return Checkpoint(folder, "jaxaudio", config, tensors, source.get("config"), source.get("has_head", False))
