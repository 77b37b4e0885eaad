"""Tensors of checkpoint files, known by shape and dtype and read one at a time: a model is never in memory twice."""

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
import safetensors

SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
FLOATS = ("float32", "float16", "bfloat16")  # of parameters


class ConvertError(Exception):
    """A checkpoint cannot be read or written; the message names the file, what was found and what was expected."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, or made from one: `read()` gives the array that `shape` and `dtype` announce."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def read_safetensors(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, which stays mapped while they are in use.

    Raises:
      ConvertError: the file is absent or damaged, or has a dtype that numpy lacks.
    """
    dtypes = {short: np.dtype(name) for name, short in SAFETENSORS_DTYPES.items()}
    try:
        file = safetensors.safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error
    tensors = {}
    for name, entry in slices.items():
        if entry.get_dtype() not in dtypes:
            raise ConvertError(f"{path}: {name} is {entry.get_dtype()}, expected one of {', '.join(dtypes)}")
        dtype = dtypes[entry.get_dtype()]
        tensors[name] = StoredTensor(tuple(entry.get_shape()), dtype, lambda name=name: file.get_tensor(name))
    return tensors


def safetensors_header(
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What comes before the data of a safetensors file that holds tensors of these shapes and dtypes, in this order.

    Raises:
      KeyError: a dtype that is not one of `SAFETENSORS_DTYPES`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[str(dtype)], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: pathlib.Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the tensors one by one, the widest dtypes first, so that every array is aligned."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    with path.open("wb") as file:
        file.write(safetensors_header({name: (t.shape, t.dtype) for name, t in ordered.items()}, metadata))
        for tensor in ordered.values():
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8))
