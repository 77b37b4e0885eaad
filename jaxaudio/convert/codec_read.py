"""Reads checkpoints of codecs: HuggingFace's folders, the files of the projects that trained them, folders of ours.

A folder of ours holds config.json, {"kind": ..., "config": ...}, and parameters.safetensors with our paths.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxaudio.config import ConfigError, from_dict
from jaxaudio.convert import codec_tensors, dac_names, encodec_names, mimi_names
from jaxaudio.convert.codec_tensors import Parameter, Tensors
from jaxaudio.convert.folders import PARAMETERS, read_hf_tensors, read_json
from jaxaudio.convert.tensors import ConvertError, StoredTensor, read_safetensors
from jaxaudio.convert.torch_files import read_torch, stored_tensors
from jaxaudio.convert.upstream_config import one_of
from jaxaudio.models import dac, encodec, mimi, soundstream
from jaxaudio.nn.codec import CodecConfig

Kind = Literal["encodec", "dac", "mimi", "soundstream"]
Layout = Literal["hf", "original", "jaxaudio"]

MODELS = {
    "encodec": (encodec.EnCodecConfig, encodec.EnCodec, encodec.PRESETS),
    "dac": (dac.DACConfig, dac.DAC, dac.PRESETS),
    "mimi": (mimi.MimiConfig, mimi.Mimi, mimi.PRESETS),
    "soundstream": (soundstream.SoundStreamConfig, soundstream.SoundStream, soundstream.PRESETS),
}
TABLES = {"encodec": encodec_names, "dac": dac_names, "mimi": mimi_names}

# Files as Meta's two repositories, Descript and Kyutai publish them.
ORIGINAL_FILES = ("*.th", "compression_state_dict.bin", "weights*.pth", "tokenizer-*.safetensors", "mimi*.safetensors")
_TORCH_SUFFIXES = (".th", ".bin", ".pth", ".pt")
_KYUTAI_CONFIG = "mimi_config.json"


@dataclasses.dataclass(frozen=True)
class CodecFile:
    """A checkpoint on disk, its tensors unread.

    Attributes:
      path: the file or folder.
      layout: "hf", "original" or "jaxaudio".
      kind: which model.
      config: the model's.
      tensors: by our paths, in our shapes.
      name: of the published model, or of the folder it was first written to.
    """

    path: pathlib.Path
    layout: Layout
    kind: Kind
    config: CodecConfig
    tensors: Mapping[str, StoredTensor]
    name: str


def read_codec(path: pathlib.Path, name: str | None = None) -> CodecFile:
    """Finds out what kind of checkpoint `path` is, and compares its tensors with its config; reads no large tensor.

    Args:
      path: a folder or file.
      name: what to call it if it has the sizes of no published model and says nothing; the path's own name if None.
    Raises:
      ConvertError: no checkpoint of a codec, or one whose config and tensors are not those of one codec.
    """
    file = _read(path)
    return dataclasses.replace(file, name=file.name or name or (path.stem if path.is_file() else path.name))


def _read(path: pathlib.Path) -> CodecFile:
    if path.is_file():
        return _read_file(path)
    values = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "kind" in values:
        return _read_ours(path, values)
    if values.get("model_type") in TABLES:
        return _read_hf(path, values)
    found = sorted({file for pattern in ORIGINAL_FILES for file in path.glob(pattern)})
    if len(found) == 1:
        return _read_file(found[0])
    names = ", ".join(file.name for file in found or sorted(path.iterdir())[:8]) or "nothing"
    raise ConvertError(
        f"{path}: expected config.json with model_type {', '.join(map(repr, TABLES))} (HuggingFace) or a kind "
        f"(jaxaudio), or one file of the names {', '.join(ORIGINAL_FILES)}; it has model_type "
        f"{values.get('model_type')!r} and holds {names}"
    )


def parameters(kind: Kind, config: CodecConfig, layout: Layout) -> tuple[Parameter, ...]:
    """All parameters of a codec, with their names in that layout."""
    shapes = _shapes(kind, config)
    if layout == "jaxaudio":
        return tuple(Parameter(path, path, "same", shape) for path, shape in shapes.items())
    names = TABLES[kind].names(shapes, layout)
    return tuple(Parameter(path, *names[path], shape) for path, shape in shapes.items())


@functools.cache
def _shapes(kind: Kind, config: CodecConfig) -> dict[str, tuple[int, ...]]:
    model = MODELS[kind][1](config)

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, config.hop_length, config.channels)), jnp.ones(1, jnp.int32))

    tree = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _to_ours(
    path: pathlib.Path, layout: Layout, kind: Kind, config: CodecConfig, tensors: Tensors, name: str = ""
) -> CodecFile:
    expected = parameters(kind, config, layout)
    codec_tensors.check(expected, tensors, str(path))
    ours = {parameter.path: parameter.from_upstream(tensors) for parameter in expected}
    published = [preset for preset, values in MODELS[kind][2].items() if values == config]
    return CodecFile(path, layout, kind, config, ours, name or (published or [""])[0])


def _read_ours(folder: pathlib.Path, values: Mapping[str, Any]) -> CodecFile:
    where = folder / "config.json"
    kind = one_of({name: name for name in MODELS}, "kind", values["kind"], str(where))
    try:
        config = from_dict(MODELS[kind][0], values["config"])
    except (ConfigError, KeyError) as error:
        raise ConvertError(f"{where}: config: {error}") from error
    return _to_ours(folder, "jaxaudio", kind, config, read_safetensors(folder / PARAMETERS), values.get("name", ""))


def _read_hf(folder: pathlib.Path, values: Mapping[str, Any]) -> CodecFile:
    kind, where = values["model_type"], str(folder / "config.json")
    config = _config(TABLES[kind].read_config, values, where)
    tensors = _folded(kind, config, read_hf_tensors(folder), str(folder))
    return _to_ours(folder, "hf", kind, config, tensors)


def _config(read, values: Mapping[str, Any], where: str) -> CodecConfig:
    try:
        return read(values, where)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ConvertError(f"{where} describes no codec of ours: {type(error).__name__}: {error}") from error


def _folded(kind: Kind, config: CodecConfig, tensors: Tensors, where: str) -> dict[str, StoredTensor]:
    heads = {"num_heads": config.transformer.num_heads} if kind == "mimi" else {}
    return TABLES[kind].fold(tensors, where, **heads)


def _read_file(path: pathlib.Path) -> CodecFile:
    kind, config, tensors = _read_safetensors_file(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    return _to_ours(path, "original", kind, config, _folded(kind, config, tensors, str(path)))


def _read_safetensors_file(path: pathlib.Path) -> tuple[Kind, CodecConfig, Tensors]:
    tensors = read_safetensors(path)
    if not any(name.startswith("quantizer.rvq_first.") for name in tensors):
        raise ConvertError(f"{path} is no Mimi of Kyutai's: expected quantizer.rvq_first.*, got {_some(tensors)}")
    beside = path.with_name(_KYUTAI_CONFIG)
    if not beside.is_file():
        return "mimi", mimi.PRESETS["mimi"], tensors
    return "mimi", _config(mimi_names.read_kyutai, read_json(beside), str(beside)), tensors


def _read_torch_file(path: pathlib.Path) -> tuple[Kind, CodecConfig, Tensors]:
    if path.suffix not in _TORCH_SUFFIXES:
        raise ConvertError(f"{path}: expected a name ending in .safetensors or {', '.join(_TORCH_SUFFIXES)}")
    content = read_torch(path)
    if not isinstance(content, Mapping):
        raise ConvertError(f"{path}: expected tensors by name, got {type(content).__name__}")
    where = str(path)
    if {"metadata", "state_dict"} <= content.keys():
        arguments = (content["metadata"] or {}).get("kwargs") or {}
        config = _config(dac_names.read_arguments, arguments, f"{where}: metadata")
        return "dac", config, stored_tensors(where, content["state_dict"])
    if "xp.cfg" in content:
        config = _config(encodec_names.read_run, _yaml(content["xp.cfg"], where), f"{where}: xp.cfg")
        return "encodec", config, stored_tensors(where, content.get("best_state"))
    if "pretrained" in content:
        raise ConvertError(f"{path} only names another model, {content['pretrained']!r}; load that one")
    tensors = stored_tensors(where, content)
    if not any(name.startswith("quantizer.vq.layers.") for name in tensors):
        raise ConvertError(
            f"{path}: expected Descript's 'metadata' and 'state_dict', audiocraft's 'xp.cfg', or EnCodec's "
            f"quantizer.vq.layers.*, got {_some(tensors)}"
        )
    return "encodec", encodec_names.guess_config(tensors), tensors


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:4]) or "none"


def _yaml(text: Any, where: str) -> dict[str, Any]:
    """The config of an audiocraft run, its references "${a.b}" replaced by what they refer to."""
    import yaml

    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, AttributeError) as error:
        raise ConvertError(f"{where}: xp.cfg is no YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConvertError(f"{where}: expected a config as xp.cfg, got {type(tree).__name__}")

    def resolved(node: Any, depth: int = 0) -> Any:
        if isinstance(node, dict):
            return {key: resolved(value, depth) for key, value in node.items()}
        match = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
        if match is None or depth > 8:
            return node
        target: Any = tree
        for key in match[1].split("."):
            target = target.get(key) if isinstance(target, dict) else None
        return resolved(target, depth + 1)

    return {key: resolved(tree[key]) for key in tree}
