"""Parameters out of a checkpoint, for analysis: safetensors or npz with a manifest, opened without model code.

Any checkpoint opens in a process with one CPU, also one that was saved sharded over many devices; of a run's processes,
one alone may export. Arrays are read one at a time. Stacked layers ("a/layers/b", leading axis = layer) are written one
by one, as "a/layers/0/b" and so on.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
import safetensors

from jaxaudio.convert.tensors import SAFETENSORS_DTYPES, ConvertError, safetensors_header
from jaxaudio.data.files import atomic_path

LAYERS = "layers"


class ExportError(ConvertError):
    """A checkpoint or an exported file cannot be read or written; the message names the file and what was expected."""


@dataclasses.dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint holds, from its metadata alone.

    path, step: the folder of the checkpoint and its step; steps: all steps in the folder it lies in.
    arrays: path -> (shape, dtype) of the parameters, stacked layers as one array; an average lies under "ema_params/".
    state_size: how many numbers the whole train state has, the optimizer's included.
    """

    path: pathlib.Path
    step: int | None
    steps: tuple[int, ...]
    config: dict[str, Any]
    versions: dict[str, str]
    arrays: dict[str, tuple[tuple[int, ...], str]]
    state_size: int


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One exported array: a whole leaf of the parameters, or one layer of a stacked leaf."""

    name: str
    leaf: str
    layer: int | None
    leaf_shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf_shape if self.layer is None else self.leaf_shape[1:]


def find_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
    """The folder of one step: `path` itself, or the newest step in a run's folder or in its checkpoints folder.

    Raises:
      ExportError: there is no checkpoint; the message names the folder.
    """
    path = pathlib.Path(path).absolute()
    if (path / "state").is_dir():
        return path
    steps = _steps(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if not steps:
        raise ExportError(
            f"no checkpoint in {path}: expected a run's folder, its checkpoints folder, or one step of it"
        )
    return steps[max(steps)]


def _steps(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """The complete steps in a checkpoints folder; a save in progress has a longer name."""
    if not folder.is_dir():
        return {}
    return {int(p.name): p for p in folder.iterdir() if p.name.isdecimal() and (p / "state").is_dir()}


def inspect_checkpoint(path: str | pathlib.Path) -> CheckpointSummary:
    """Reads what a checkpoint holds, without its arrays.

    Raises:
      ExportError: there is no checkpoint, or it is damaged.
    """
    folder = find_checkpoint(path)
    tree, saved = _read_metadata(folder)
    leaves = _flatten(tree["params"])
    leaves |= {f"ema_params/{name}": leaf for name, leaf in _flatten(tree.get("ema_params")).items()}
    return CheckpointSummary(
        path=folder,
        step=_step(folder),
        steps=tuple(sorted(_steps(folder.parent))),
        config=saved.get("config", {}),
        versions=saved.get("versions", {}),
        arrays={name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()},
        state_size=sum(math.prod(leaf.shape) for leaf in _flatten(tree).values()),
    )


def export_checkpoint(
    checkpoint: str | pathlib.Path, out: str | pathlib.Path, select: str | None = None, *, ema: bool = False
) -> dict[str, Any]:
    """Writes a checkpoint's parameters to a .safetensors or .npz file, and beside it a manifest named OUT + ".json".

    The manifest holds, under "arrays", each path's shape, dtype, mean, std and the sha256 of its bytes (little-endian,
    row by row), and the checkpoint's step, config and library versions. npz has no bfloat16: its bits are stored as
    uint16, and `load` gives bfloat16 back.

    Args:
      checkpoint: a run's folder or its checkpoints folder, for the newest step; or the folder of one step.
      out: the file to write; it appears whole or not at all.
      select: regular expression; only paths in which it is found are written.
      ema: the moving average of the parameters instead of the parameters.
    Returns:
      The manifest.
    Raises:
      ExportError: no checkpoint or a damaged one, another suffix, a dtype that the format lacks, no moving average, or
        a `select` that is no expression or that no path matches (the message lists paths).
    """
    out = pathlib.Path(out).absolute()
    if out.suffix not in _WRITERS:
        raise ExportError(f"{out.name}: expected a name ending in {' or '.join(_WRITERS)}")
    folder = find_checkpoint(checkpoint)
    tree, saved = _read_metadata(folder)
    part = "ema_params" if ema else "params"
    if not tree.get(part):
        raise ExportError(f"{folder} has no {part}; its state has {', '.join(k for k, v in tree.items() if v)}")
    pieces = _select(_pieces(_flatten(tree[part])), select)
    manifest = {
        "checkpoint": {"part": part, "step": _step(folder), **saved},
        "arrays": {},
    }
    with atomic_path(out) as temporary, _WRITERS[out.suffix](temporary, pieces) as write:
        for piece, array in _read_arrays(folder, part, pieces):
            write(piece.name, array)
            manifest["arrays"][piece.name] = _describe(array)
    with atomic_path(_manifest_path(out)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads an exported file back, path -> array, bit for bit: each array is checked against the manifest's sha256.

    Raises:
      ExportError: the file or its manifest is absent or damaged, or an array is not the one that was exported.
    """
    path = pathlib.Path(path)
    if path.suffix not in _READERS:
        raise ExportError(f"{path.name}: expected a name ending in {' or '.join(_READERS)}")
    try:
        expected = json.loads(_manifest_path(path).read_text(encoding="utf-8"))["arrays"]
        stored = _READERS[path.suffix](path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ExportError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if stored.keys() != expected.keys():
        raise ExportError(f"{path} and its manifest differ in {sorted(stored.keys() ^ expected.keys())}")
    arrays = {}
    for name, entry in expected.items():
        array = stored.pop(name)
        dtype = np.dtype(entry["dtype"])
        if path.suffix == ".npz" and array.dtype == _npz_dtype(dtype):
            array = array.view(dtype)
        found = {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": _sha256(array)}
        wrong = [f"{key} {found[key]}, expected {entry[key]}" for key in found if found[key] != entry[key]]
        if wrong:
            raise ExportError(f"{path}: {name} is not what was exported: {'; '.join(wrong)}")
        arrays[name] = array
    return arrays


def to_tree(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested parameters from exported paths, layers stacked again: what a model's `apply` takes as {"params": ...}.

    Raises:
      ExportError: a stack lacks a layer; the message names the paths.
    """
    whole, stacks = {}, {}
    for name, array in flat.items():
        match = re.fullmatch(rf"((?:.*/)?{LAYERS})/(\d+)/(.+)", name)
        if match:
            stacks.setdefault(f"{match[1]}/{match[3]}", {})[int(match[2])] = array
        else:
            whole[name] = array
    for name, layers in stacks.items():
        missing = sorted(set(range(max(layers) + 1)) - layers.keys())
        if missing:
            raise ExportError(f"{name}: layers {missing} are missing below layer {max(layers)}")
        whole[name] = np.stack([layers[index] for index in range(len(layers))])
    tree: dict[str, Any] = {}
    for name, array in whole.items():
        *parents, key = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = array
    return tree


def _step(folder: pathlib.Path) -> int | None:
    return int(folder.name) if folder.name.isdecimal() else None


def _manifest_path(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(out.name + ".json")


def _read_metadata(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The train state as a tree of shapes and dtypes, and what the run saved beside it."""
    from orbax.checkpoint import v1 as ocp

    try:
        metadata = ocp.metadata(folder, "state")
    except Exception as error:
        raise _unreadable(folder, error) from error
    if not isinstance(metadata.metadata, dict) or "params" not in metadata.metadata:
        raise ExportError(
            f"{folder} is damaged or no checkpoint of a run: its state has no readable tree with 'params'"
        )
    return metadata.metadata, metadata.custom_metadata or {}


def _unreadable(folder: pathlib.Path, error: BaseException) -> ExportError:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    reason = re.split(r" \[tensorstore_spec=|\n", f"{type(error).__name__}: {error}")[0]
    others = [step for step in sorted(_steps(folder.parent)) if step != _step(folder)]
    return ExportError(f"{folder} is damaged: {reason}; other steps beside it: {others}")


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves by path; None is an absent subtree."""
    if tree is None:
        return {}
    if not isinstance(tree, Mapping | list | tuple):
        return {path: tree}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    leaves = {}
    for key, value in items:
        leaves |= _flatten(value, f"{path}/{key}" if path else str(key))
    return leaves


def _pieces(leaves: Mapping[str, Any]) -> list[_Piece]:
    """What to write: the widest dtypes first, so that every array is aligned in safetensors; then by path and layer."""
    pieces, depths = [], {}
    for leaf, abstract in leaves.items():
        shape, dtype = tuple(abstract.shape), np.dtype(abstract.dtype)
        keys = leaf.split("/")
        if LAYERS not in keys[:-1]:
            pieces.append(_Piece(leaf, leaf, None, shape, dtype))
            continue
        at = keys.index(LAYERS) + 1
        prefix, rest = "/".join(keys[:at]), "/".join(keys[at:])
        depth = depths.setdefault(prefix, shape[0] if shape else 0)
        if depth == 0 or shape[:1] != (depth,) or keys[at].isdecimal() or LAYERS in keys[at:-1]:
            expected = f"arrays under {prefix!r} must be one stack of layers, {depth} of them here"
            raise ExportError(f"{leaf} {shape}: {expected}")
        pieces += [_Piece(f"{prefix}/{i}/{rest}", leaf, i, shape, dtype) for i in range(depth)]
    return sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.leaf, piece.layer or 0))


def _select(pieces: list[_Piece], select: str | None) -> list[_Piece]:
    if select is None:
        return pieces
    try:
        chosen = [piece for piece in pieces if re.search(select, piece.name)]
    except re.error as error:
        raise ExportError(f"{select!r} is not a regular expression: {error}") from error
    if not chosen:
        names = sorted(piece.name for piece in pieces)
        raise ExportError(f"{select!r} is in none of {len(names)} paths, which are {', '.join(names[:10])}, ...")
    return chosen


def _read_arrays(folder: pathlib.Path, part: str, pieces: list[_Piece]) -> Iterator[tuple[_Piece, np.ndarray]]:
    """Each piece with its array; a leaf is read when its first piece comes, and dropped before the next leaf."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # By default every process of a run waits for all others, but only this one may be exporting.
    context.multiprocessing.primary_host = ocp.multihost.process_index()
    context.multiprocessing.active_processes = {ocp.multihost.process_index()}
    context.multiprocessing.barrier_sync_key_prefix = "export"
    for leaf, group in itertools.groupby(pieces, key=lambda piece: piece.leaf):
        group = list(group)
        # An array in place of a shape asks for numpy, whatever devices it was saved from; this one takes no memory.
        target: Any = np.broadcast_to(np.zeros((), group[0].dtype), group[0].leaf_shape)
        for key in reversed([part, *leaf.split("/")]):
            target = {key: target}
        try:
            with context:
                loaded = ocp.load(folder, target, checkpointable_name="state")
        except Exception as error:
            raise _unreadable(folder, error) from error
        (array,) = _flatten(loaded).values()
        del loaded
        for piece in group:
            yield piece, array if piece.layer is None else array[piece.layer, ...]
        del array


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(_bytes(array)).hexdigest()


def _describe(array: np.ndarray) -> dict[str, Any]:
    """An array's entry in the manifest; float64 sums over pieces, so that no second array of its size is made."""
    flat = array.reshape(-1)
    chunks = range(0, flat.size, 1 << 20)
    count = max(flat.size, 1)
    mean = sum(flat[at : at + (1 << 20)].astype(np.float64).sum() for at in chunks) / count
    variance = sum(((flat[at : at + (1 << 20)].astype(np.float64) - mean) ** 2).sum() for at in chunks) / count
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "mean": float(mean),
        "std": math.sqrt(variance),
        "sha256": _sha256(array),
    }


@contextlib.contextmanager
def _safetensors_writer(path: pathlib.Path, pieces: list[_Piece]) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Header first, then the arrays in the header's order, each written as it comes."""
    for piece in pieces:
        if str(piece.dtype) not in SAFETENSORS_DTYPES:
            raise ExportError(f"{piece.name} is {piece.dtype}; safetensors has {', '.join(SAFETENSORS_DTYPES)}")
    with path.open("wb") as file:
        file.write(safetensors_header({piece.name: (piece.shape, piece.dtype) for piece in pieces}))
        yield lambda name, array: file.write(_bytes(array))


@contextlib.contextmanager
def _npz_writer(path: pathlib.Path, pieces: list[_Piece]) -> Iterator[Callable[[str, np.ndarray], None]]:
    def write(name: str, array: np.ndarray) -> None:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, array.view(_npz_dtype(array.dtype)), allow_pickle=False)

    with zipfile.ZipFile(path, "w") as archive:
        yield write


def _npz_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that npz stores: numpy's own, or the bits of one that it does not know, such as bfloat16."""
    return dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


_WRITERS = {".safetensors": _safetensors_writer, ".npz": _npz_writer}
_READERS = {".safetensors": _read_safetensors, ".npz": _read_npz}
