"""EnCodec's language model from floats to the integers of `data.integer_lm`: done once, the result is what is stored.

This is the only place where the entropy model meets floating point; what it makes may differ from machine to machine in
a last bit, so it travels in a file and is not made twice.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxaudio.data.integer_lm import EXP_BITS, FRACTION_BITS, EntropyModelError

GELU_LIMIT = 8  # beyond, |x| Phi(-|x|) is 0 at any precision here
_LARGEST = 2**15 - 1


def quantize_lm(params: Mapping[str, Any], *, num_positions: int = 2048) -> dict[str, np.ndarray]:
    """The tensors of `IntegerLM` from the parameters of `models.encodec_lm.EncodecLM`.

    Queries come out multiplied by log2(e) / sqrt(H) and logits by log2(e), because softmax is computed to the base 2.

    Args:
      params: the model's tree, arrays that NumPy reads, layers stacked.
      num_positions: rows of the table of sinusoids: the longest stream in frames.
    Raises:
      EntropyModelError: a weight that is not finite, or too large for 16 bits; has its name.
    """
    embedding = np.asarray(params["embedding"], np.float64)
    _, _, dim = embedding.shape
    layers = params["transformer"]["layers"]
    num_heads = layers["attention"]["query"]["kernel"].shape[2]
    largest = max(_largest("embedding", embedding), 1.0)
    shift = max(0, math.ceil(math.log2(largest * 2**FRACTION_BITS / _LARGEST)))
    tensors = {
        "embedding": np.rint(embedding * 2.0 ** (FRACTION_BITS - shift)).astype(np.int16),
        "embedding_shift": np.array(shift, np.int64),
        "positions": np.rint(_sinusoids(num_positions, dim) * 2**FRACTION_BITS).astype(np.int16),
        "exp_table": np.rint(2.0 ** (EXP_BITS - np.arange(2**FRACTION_BITS) / 2**FRACTION_BITS)).astype(np.int32),
        "gelu_table": _gelu_table(),
    }
    tensors |= _norm("norm", params["norm"]["layer"])
    for index in range(len(layers["mlp"]["up"]["bias"])):
        prefix = f"layers/{index}"
        layer = {name: {part: np.asarray(a, np.float64)[index] for part, a in layers["attention"][name].items()}
                 for name in ("query", "key", "value", "out")}  # fmt: skip
        scale = math.log2(math.e) / math.sqrt(dim // num_heads)
        layer["query"] = {part: scale * array for part, array in layer["query"].items()}
        kernel, bias = (
            np.concatenate([layer[name][part].reshape(*lead, dim) for name in ("query", "key", "value")], axis=-1)
            for part, lead in (("kernel", (dim,)), ("bias", ()))
        )
        tensors |= _linear(f"{prefix}/qkv", kernel, bias)
        tensors |= _linear(f"{prefix}/out", layer["out"]["kernel"].reshape(dim, dim), layer["out"]["bias"])
        for name in ("up", "down"):
            tensors |= _linear(f"{prefix}/{name}", *(layers["mlp"][name][part][index] for part in ("kernel", "bias")))
        for name in ("attention_norm", "mlp_norm"):
            pair = {part: array[index] for part, array in layers[name]["layer"].items()}
            tensors |= _norm(f"{prefix}/{name}", pair)
    logits = (np.asarray(params[f"logits_{part}"], np.float64) * math.log2(math.e) for part in ("kernel", "bias"))
    return tensors | _linear("logits", *logits)


def _linear(name: str, kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    """Kernel (..., I, O) and bias (..., O) as integers, each output with the largest power of two that fits."""
    kernel, bias = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
    _largest(name, bias)
    if _largest(name, kernel) > _LARGEST / 2:
        raise EntropyModelError(f"{name} has a weight of {np.abs(kernel).max():g}; expected at most {_LARGEST / 2}")
    largest = np.maximum(np.abs(kernel).max(axis=-2), 2.0**-9)  # so that no shift is above 23
    shift = np.floor(np.log2(_LARGEST / largest)).astype(np.int64)
    return {
        f"{name}/kernel": np.rint(kernel * 2.0 ** shift[..., None, :]).astype(np.int16),
        f"{name}/bias": np.rint(bias * 2.0 ** (shift + FRACTION_BITS)).astype(np.int64),
        f"{name}/shift": shift.astype(np.uint8),
    }


def _norm(name: str, pair: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {part: np.asarray(array, np.float64) for part, array in pair.items()}
    for part, array in arrays.items():
        if _largest(f"{name}/{part}", array) >= 2 ** (24 - FRACTION_BITS):
            raise EntropyModelError(f"{name}/{part} has a value of {np.abs(array).max():g}; expected below 4096")
    return {f"{name}/{part}": np.rint(array * 2**FRACTION_BITS).astype(np.int32) for part, array in arrays.items()}


def _largest(name: str, array: np.ndarray) -> float:
    """Of the absolute values; raises where one is not finite."""
    largest = float(np.abs(array).max())
    if not math.isfinite(largest):
        raise EntropyModelError(f"{name} has a value that is not finite")
    return largest


def _sinusoids(num_positions: int, dim: int) -> np.ndarray:
    """As `ops.positions.sinusoids` with order="cos_sin"."""
    half = dim // 2
    phase = np.arange(num_positions)[:, None] / 1e4 ** (np.arange(half) / (half - 1))
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=1)


def _gelu_table() -> np.ndarray:
    """|x| Phi(-|x|) = max(x, 0) - GELU(x), for |x| = 0, 2**-FRACTION_BITS, ... until it stays 0."""
    x = np.arange(GELU_LIMIT * 2**FRACTION_BITS) / 2**FRACTION_BITS
    values = np.array([value * math.erfc(value / math.sqrt(2)) / 2 for value in x])
    return np.rint(values * 2**FRACTION_BITS).astype(np.int32)
