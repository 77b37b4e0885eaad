"""Checkpoints of codecs in and out: HuggingFace's folders and hub ids, the files of the projects that trained them, and
folders of ours.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jaxaudio.convert import codec_tensors
from jaxaudio.convert.codec_read import MODELS, ORIGINAL_FILES, TABLES, CodecFile, Kind, Layout, parameters, read_codec
from jaxaudio.convert.codec_write import write_hf, write_ours
from jaxaudio.convert.folders import PARAMETERS, SAFETENSORS_FILES, TORCH_FILES, read_json
from jaxaudio.convert.hub import fetch_folder
from jaxaudio.convert.tensors import ConvertError
from jaxaudio.nn.codec import CodecConfig
from jaxaudio.nn.seanet import fold_weight_norm

__all__ = [
    "CodecCheckpoint", "CodecConversion", "ConvertError", "convert_codec", "find_codec", "is_codec", "load_codec",
    "read_codec", "save_codec",
]  # fmt: skip

# Of the published models, by the names of their configs.
REPOSITORIES = {
    "encodec_24khz": "facebook/encodec_24khz",
    "encodec_48khz": "facebook/encodec_48khz",
    "encodec_32khz": "facebook/encodec_32khz",
    "encodec_16khz": "facebook/audiogen-medium",
    "dac_44khz": "descript/dac_44khz",
    "dac_24khz": "descript/dac_24khz",
    "dac_16khz": "descript/dac_16khz",
    "mimi": "kyutai/mimi",
}


@dataclasses.dataclass(frozen=True)
class CodecCheckpoint:
    """A loaded checkpoint.

    Attributes:
      kind: "encodec", "dac", "mimi" or "soundstream".
      config: the model's, for `EnCodec(config)` and so on.
      params: float32 NumPy arrays with weight norm folded, for `apply({"params": params}, ...)`.
      name: of the published model, or of the folder it was first written to.
    """

    kind: Kind
    config: CodecConfig
    params: dict[str, Any]
    name: str


@dataclasses.dataclass(frozen=True)
class CodecConversion:
    """What `convert_codec` did: read `source` of layout `source_layout`, wrote `destination` of layout `layout`."""

    source: pathlib.Path
    source_layout: Layout
    destination: pathlib.Path
    layout: Layout
    kind: Kind
    config: CodecConfig


def load_codec(source: str | os.PathLike, *, kind: Kind | None = None) -> CodecCheckpoint:
    """Loads a codec.

    Args:
      source: a folder as HuggingFace publishes it; a file as its authors do, which are Meta's `encodec_*.th` and
        audiocraft's `compression_state_dict.bin`, Descript's `weights*.pth` and Kyutai's `tokenizer-*.safetensors`; a
        folder with one of these; a folder of ours; an id on the HuggingFace Hub such as "facebook/encodec_24khz"; or a
        name of `REPOSITORIES` such as "mimi". Only .th, .bin and .pth need torch.
      kind: what it must be; anything if None.
    Raises:
      ConvertError: there is no such checkpoint; its config and its tensors do not agree (missing, unexpected and
        misshapen tensors are named); it is of another kind; or a file is damaged.
    """
    file = read_codec(find_codec(source), _name(source))
    if kind not in (None, file.kind):
        raise ConvertError(f"{file.path} is of kind {file.kind!r}, expected {kind!r}")
    return CodecCheckpoint(file.kind, file.config, codec_tensors.to_tree(file.tensors), file.name)


def save_codec(checkpoint: CodecCheckpoint, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes a folder of ours, which `load_codec` reads: config.json and parameters.safetensors.

    Args:
      checkpoint: to write; its parameters may be NumPy or JAX arrays, partitioned or not, and still have weight norm,
        which is folded.
      folder: to write; it appears whole or not at all.
      overwrite: whether a checkpoint in that folder is replaced.
    Raises:
      ConvertError: the folder exists and is not to be overwritten, or the parameters are not those of the config.
    """
    folder = pathlib.Path(folder).absolute()
    config = checkpoint.config
    config = dataclasses.replace(config, seanet=dataclasses.replace(config.seanet, weight_norm=False))
    tensors = codec_tensors.from_tree(fold_weight_norm(nn.meta.unbox(_plain(checkpoint.params))))
    expected = parameters(checkpoint.kind, config, "jaxaudio")
    codec_tensors.check(expected, tensors, f"the tree of parameters of {checkpoint.name}")
    file = CodecFile(folder, "jaxaudio", checkpoint.kind, config, tensors, checkpoint.name)
    write_ours(folder, file, overwrite=overwrite)


def convert_codec(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> CodecConversion:
    """Rewrites a checkpoint in another layout; between HuggingFace's and ours no weight changes.

    Weight norm and what else is computed from several tensors is folded, into float32.

    Args:
      source: as for `load_codec`.
      destination: a folder; it appears whole or not at all.
      layout: "hf" or "jaxaudio"; by default HuggingFace's if the source is ours, else ours.
      overwrite: whether a checkpoint at the destination is replaced.
    Raises:
      ConvertError: as `load_codec`; the destination exists; or transformers has no such model.
    """
    destination = pathlib.Path(destination).absolute()
    file = read_codec(find_codec(source), _name(source))
    layout = layout or ("hf" if file.layout == "jaxaudio" else "jaxaudio")
    if layout not in ("hf", "jaxaudio"):
        raise ConvertError(f"layout is {layout!r}, expected 'hf' or 'jaxaudio'")
    if destination.suffix in (".pt", ".pth", ".th", ".bin", ".safetensors"):
        raise ConvertError(f"{destination} is the name of a file; a codec is written to a folder")
    {"hf": write_hf, "jaxaudio": write_ours}[layout](destination, file, overwrite=overwrite)
    return CodecConversion(file.path, file.layout, destination, layout, file.kind, file.config)


def is_codec(source: str | os.PathLike) -> bool:
    """Whether a path, hub id or name is one of a codec, as far as its config or its file's name tells."""
    path = pathlib.Path(source)
    if not path.exists() and os.fspath(source) in REPOSITORIES:
        return True
    if path.is_file():
        return path.suffix in (".th", ".pth", ".bin", ".safetensors")
    if not path.exists():
        if not _is_id(os.fspath(source)):
            return False
        path = fetch_folder(os.fspath(source), ["config.json"])
    values = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if values.get("kind") in MODELS or values.get("model_type") in TABLES:
        return True
    return any(file for pattern in ORIGINAL_FILES for file in path.glob(pattern))


def find_codec(source: str | os.PathLike) -> pathlib.Path:
    """The local path of a path, hub id or name, of which only the files of a codec are downloaded.

    Raises:
      ConvertError: it is neither, or cannot be had.
    """
    path = pathlib.Path(source)
    if path.exists():
        return path.absolute()
    name = REPOSITORIES.get(os.fspath(source), os.fspath(source))
    if not _is_id(name):
        raise ConvertError(
            f"{name!r} is no file or folder, no id on the HuggingFace Hub (organisation/name), and no published codec; "
            f"these are {', '.join(REPOSITORIES)}"
        )
    config = fetch_folder(name, ["config.json"]) / "config.json"
    values = read_json(config) if config.is_file() else {}
    # A repository of a language model may hold a codec beside weights that are many times larger.
    if values.get("model_type") in TABLES:
        return fetch_folder(name, ["config.json", *SAFETENSORS_FILES], fallback=TORCH_FILES)
    ours = [PARAMETERS] if "kind" in values else []
    return fetch_folder(name, ["config.json", "mimi_config.json", *(ours or ORIGINAL_FILES)])


def _name(source: str | os.PathLike) -> str | None:
    """What a hub id calls the model; its files lie in a folder that is named after a commit."""
    return None if pathlib.Path(source).exists() else os.fspath(source).rpartition("/")[2]


def _is_id(source: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def _plain(tree: Any) -> Any:
    """Mappings of any kind as dicts."""
    return {name: _plain(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree
