"""Folders that hold a checkpoint: HuggingFace's tensors read, and a folder written whole or not at all."""

import contextlib
import fnmatch
import json
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxaudio.convert.tensors import ConvertError, StoredTensor, read_safetensors
from jaxaudio.convert.torch_files import read_torch, stored_tensors

SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
PARAMETERS = "parameters.safetensors"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ConvertError: the file is absent or damaged, or holds something else.
    """
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error
    if not isinstance(mapping, dict):
        raise ConvertError(f"{path}: expected a JSON object, got {type(mapping).__name__}")
    return mapping


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes it for people to read."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_hf_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors in a folder of HuggingFace's, from one file or from shards.

    Raises:
      ConvertError: there are none, a shard is missing, or a file is damaged.
    """
    for single, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", _read_bin)):
        if (folder / single).is_file():
            return read(folder / single)
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _read_shards(index, read)
    raise ConvertError(
        f"{folder} has no weights: expected model.safetensors, or model.safetensors.index.json with its shards, or "
        "pytorch_model.bin"
    )


def _read_shards(index: pathlib.Path, read: Callable) -> dict[str, StoredTensor]:
    names = read_json(index).get("weight_map")
    if not (isinstance(names, dict) and all(isinstance(name, str) for name in names.values())):
        raise ConvertError(f"{index}: expected a 'weight_map' of tensors to files, got {names!r}")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(names.values())):
        path = index.parent / shard
        if not path.is_file():
            raise ConvertError(f"{index} names the file {shard}, which is missing")
        tensors |= read(path)
    return tensors


def _read_bin(path: pathlib.Path) -> dict[str, StoredTensor]:
    return stored_tensors(str(path), read_torch(path))


def exists_error(path: pathlib.Path) -> ConvertError:
    """That a destination is there already."""
    return ConvertError(f"{path} exists; choose another destination, or say that it may be overwritten")


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path, overwrite: bool, replaceable: Sequence[str]) -> Iterator[pathlib.Path]:
    """A temporary folder beside `folder` that takes its place when the block ends, and is removed when it fails.

    Args:
      folder: to write.
      overwrite: whether a checkpoint in that folder is replaced.
      replaceable: names and patterns of the files that such a checkpoint consists of.
    Raises:
      ConvertError: the folder exists and is not to be overwritten, or holds other files.
    """
    if folder.exists():
        if not overwrite:
            raise exists_error(folder)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
        foreign = sorted(name for name in names if not any(fnmatch.fnmatch(name, known) for known in replaceable))
        if foreign:
            raise ConvertError(
                f"{folder} is not only a checkpoint, so it is not overwritten; it holds {', '.join(foreign[:5])}"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}") for kind in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
