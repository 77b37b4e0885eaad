"""PyTorch's pickle files, read without running code from them; the only place that needs torch, when it is called."""

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxaudio.convert.tensors import ConvertError, StoredTensor


def _torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConvertError(
            f"{path.name} is a file of PyTorch, which is not installed: `pip install torch`, or use a checkpoint in "
            "safetensors, which needs no torch"
        ) from error
    return torch


def read_torch(path: pathlib.Path) -> Any:
    """What a .pt or .bin file holds, with its tensors mapped from the file where its format allows it.

    Raises:
      ConvertError: torch is absent; the file is damaged, or would run code: only tensors and plain values are read.
    """
    torch = _torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConvertError(
            f"{path} is refused: it is damaged, or more than tensors and plain values, which could run code: {reason}"
        ) from error


def stored(tensor: Any) -> StoredTensor:
    """A torch tensor on CPU as a stored tensor; numpy sees the same memory."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy knows its bits only
        array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()
    return StoredTensor(array.shape, array.dtype, lambda: array)


def stored_tensors(where: str, state: Any) -> dict[str, StoredTensor]:
    """A state dict as stored tensors.

    Raises:
      ConvertError: it is something else.
    """
    import torch

    if not isinstance(state, Mapping):
        raise ConvertError(f"{where}: expected tensors by name, got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConvertError(f"{where}: expected a tensor as {name!r}, got {type(tensor).__name__}")
    return {name: stored(tensor) for name, tensor in state.items()}


def write_torch(path: pathlib.Path, plain: Mapping[str, Any], key: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Writes {**plain, key: {name: tensor}}.

    Raises:
      ConvertError: torch is absent.
    """
    torch = _torch(path)

    def to_torch(tensor: StoredTensor) -> Any:
        array = np.ascontiguousarray(tensor.read())
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({**plain, key: {name: to_torch(tensor) for name, tensor in tensors.items()}}, path)
