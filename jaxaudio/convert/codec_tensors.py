"""What the checkpoints of all codecs have in common: arrays in PyTorch's shapes and ours, weight norm, the comparison.

A table of names gives each of our parameters, by its path, the name upstream, or of a stack its names, and the form in
which upstream keeps such an array.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxaudio.convert.tensors import FLOATS, ConvertError, StoredTensor

Tensors = Mapping[str, StoredTensor]
Names = Mapping[str, tuple[str | tuple[str, ...], str]]

# Upstream's array of ours: reshaped to the first's result, then its axes in the second's order.
_FORMS: dict[str, tuple[Callable[[tuple[int, ...]], tuple[int, ...]], tuple[int, ...] | None]] = {
    "same": (lambda shape: shape, None),
    "conv": (lambda shape: shape, (2, 1, 0)),  # (K, I, O) is (O, I, K)
    "conv_transpose": (lambda shape: shape, (1, 2, 0)),  # (K, I, O) is (I, O, K)
    "pointwise": (lambda shape: (1, *shape), (2, 1, 0)),  # (I, O) is a convolution's (O, I, 1)
    "linear": (lambda shape: shape, (1, 0)),
    "to_heads": (lambda shape: (shape[0], shape[1] * shape[2]), (1, 0)),  # (D, N, H) is (N H, D)
    "from_heads": (lambda shape: (shape[0] * shape[1], shape[2]), (1, 0)),
    "channels": (lambda shape: (1, shape[0], 1), None),
}

_WEIGHT_NORM = (
    (re.compile(r"(.+)\.parametrizations\.weight\.original([01])"), "01"),
    (re.compile(r"(.+)\.weight_([gv])"), "gv"),
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its path and shape here, and upstream its name, or its names if there it is several arrays that
    are stacked here, and its form.
    """

    path: str
    names: str | tuple[str, ...]
    form: str
    shape: tuple[int, ...]

    @property
    def pieces(self) -> tuple[str, ...]:
        """Its names upstream."""
        return (self.names,) if isinstance(self.names, str) else self.names

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """The shape here of one piece."""
        return self.shape if isinstance(self.names, str) else self.shape[1:]

    @property
    def upstream_shape(self) -> tuple[int, ...]:
        """The shape upstream of one piece."""
        reshaped, axes = _FORMS[self.form][0](self.piece_shape), _FORMS[self.form][1]
        return reshaped if axes is None else tuple(reshaped[axis] for axis in axes)

    def from_upstream(self, tensors: Tensors) -> StoredTensor:
        """The same numbers in our shape, as float32."""
        axes = _FORMS[self.form][1]
        inverse = None if axes is None else np.argsort(axes)

        def read() -> np.ndarray:
            pieces = (tensors[name].read().astype(np.float32) for name in self.pieces)
            pieces = [(x if inverse is None else x.transpose(inverse)).reshape(self.piece_shape) for x in pieces]
            return np.ascontiguousarray(pieces[0]) if isinstance(self.names, str) else np.stack(pieces)

        return StoredTensor(self.shape, np.dtype(np.float32), read)

    def to_upstream(self, array: np.ndarray) -> dict[str, StoredTensor]:
        """The same numbers under upstream's names, in its shape."""
        reshape, axes = _FORMS[self.form]
        arrays = array[None] if isinstance(self.names, str) else array
        pieces = (x.reshape(reshape(self.piece_shape)) for x in arrays)
        pieces = (x if axes is None else x.transpose(axes) for x in pieces)
        return {name: in_memory(x) for name, x in zip(self.pieces, pieces, strict=True)}


def in_memory(array: np.ndarray) -> StoredTensor:
    """An array as a stored tensor."""
    return StoredTensor(array.shape, array.dtype, lambda: array)


def fold_weight_norm(tensors: Tensors, where: str) -> dict[str, StoredTensor]:
    """The tensors with each weight that is split into length g and direction v as one: g * v / |v|.

    Both of torch's spellings: X.weight_g and X.weight_v, or X.parametrizations.weight.original0 and original1. The
    norm is over all axes but the first, as g's shape says: outputs of a convolution, inputs of a transposed one.

    Raises:
      ConvertError: a half is missing, or g has not the shape of such norms.
    """
    folded, halves = {}, {}
    for name, tensor in tensors.items():
        for pattern, (g, _) in _WEIGHT_NORM:
            if match := pattern.fullmatch(name):
                halves.setdefault(match[1], {})["g" if match[2] == g else "v"] = (name, tensor)
                break
        else:
            folded[name] = tensor
    for module, pair in halves.items():
        if pair.keys() != {"g", "v"}:
            ((name, _),) = pair.values()
            raise ConvertError(f"{where}: {name} is there without the other half of its weight norm")
        (name, g), (_, v) = pair["g"], pair["v"]
        if g.shape != (*v.shape[:1], *[1] * (len(v.shape) - 1)):
            raise ConvertError(f"{where}: {name} has shape {g.shape}, expected one norm for each of {v.shape[:1]} rows")
        weight = StoredTensor(v.shape, v.dtype, lambda g=g, v=v: weight_of(g.read(), v.read()))
        put(folded, f"{module}.weight", weight, where)
    return folded


def put(tensors: dict[str, StoredTensor], name: str, tensor: StoredTensor, where: str) -> None:
    """Adds what was made from several tensors of a file.

    Raises:
      ConvertError: the file has it, too.
    """
    if name in tensors:
        raise ConvertError(f"{where}: {name} is there twice, as one tensor and as others that make it")
    tensors[name] = tensor


def split_weight_norm(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(g, v) of which `fold_weight_norm` makes this weight again, bit for bit."""
    return norms(weight), weight


def weight_of(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The weight whose norms are g and whose directions are those of v; zero where v is."""
    length = norms(v)
    scale = np.divide(g.astype(np.float32), length, out=np.zeros_like(length), where=length > 0)
    return v.astype(np.float32) * scale


def norms(v: np.ndarray) -> np.ndarray:
    """Euclidean norms over all axes but the first, kept as axes of 1; summed in float64, then float32."""
    axes = tuple(range(1, v.ndim))
    return np.sqrt(np.square(v.astype(np.float64)).sum(axes, keepdims=True)).astype(np.float32)


def check(parameters: Iterable[Parameter], tensors: Tensors, where: str, what: str = "codec") -> None:
    """Compares a file's tensors with the parameters of its config; `what` it should hold is for the message.

    Raises:
      ConvertError: missing, unexpected, misshapen or non-float tensors, each with its name and what was expected.
    """
    problems, rest = [], dict(tensors)
    for parameter in parameters:
        for name in parameter.pieces:
            tensor, shape = rest.pop(name, None), parameter.upstream_shape
            if tensor is None:
                problems.append(f"{name} is missing, expected with shape {shape} as {parameter.path}")
            elif tensor.shape != shape:
                problems.append(f"{name} has shape {tensor.shape}, expected {shape} as {parameter.path}")
            elif str(tensor.dtype) not in (*FLOATS, "float64"):
                problems.append(f"{name} is {tensor.dtype}, expected one of {', '.join(FLOATS)}")
    problems += [f"{name} of shape {rest[name].shape} is not one of the {what}'s tensors" for name in sorted(rest)]
    if problems:
        more = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise ConvertError(
            "\n  ".join([f"{where} does not hold the {what} that its config describes:", *problems[:12], *more])
        )


def to_tree(tensors: Tensors) -> dict[str, Any]:
    """What a model's `apply` takes as {"params": ...}: float32 arrays; from tensors by our paths."""
    leaves = {path: np.ascontiguousarray(tensor.read(), np.float32) for path, tensor in tensors.items()}
    return unflatten_dict(leaves, sep="/")


def from_tree(params: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors of a tree of NumPy or JAX arrays by our paths, as float32, fetched one at a time."""
    return {
        path: StoredTensor(tuple(leaf.shape), np.dtype(np.float32), lambda leaf=leaf: np.asarray(leaf, np.float32))
        for path, leaf in flatten_dict(params, sep="/").items()
    }
