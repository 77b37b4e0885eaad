"""EnCodec's language model in exact integers: the same frequency tables on every machine.

An entropy coder needs bit-equal probabilities where it encodes and where it decodes, and floating-point networks do not
give them: the order of a sum, and so its rounding, depends on the BLAS, on threads, on the shape of the batch. Here
every number is an integer, so no order matters:

* Weights are integers of 16 bits, each output channel with a power of two as its scale; `data.lm_quantization` makes
  them once, and both sides read the same file. Activations are integers with FRACTION_BITS behind the binary point,
  clipped to ACTIVATION_LIMIT.
* Matrix products run in float64, whose integers are exact below 2**53; `IntegerLM` refuses weights for which a sum of
  the absolute products could reach that. So every partial sum is exact, in any order, fused or not.
* LayerNorm, softmax and GELU are shifts, floor divisions and tables of integers that come with the weights.

Frames may be given one by one or all at once, rows alone or together: the tables are equal, bit for bit.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

FRACTION_BITS = 12  # of activations and of logits, which are to the base 2
ACTIVATION_LIMIT = 2**20 - 1  # 256 in what it stands for
NORM_EPSILON = round(1e-5 * 2 ** (2 * FRACTION_BITS))
EXP_BITS = 24  # exp_table[i] = 2**EXP_BITS * 2**(-i / 2**FRACTION_BITS)
WEIGHT_BITS = 16  # of attention's weights: those below 2**-16 of the largest are 0
TABLE_BITS = 20  # a frequency table sums to 2**TABLE_BITS; every code has a count of at least 1
EXACT_FLOAT64 = 2**53
_UNIT_BITS = 16  # of a LayerNorm's result before its scale


class EntropyModelError(ValueError):
    """An entropy model is absent, damaged, or does not fit what it is asked to code."""


class _Linear(NamedTuple):
    kernel: np.ndarray  # float64 (I, O), integers
    bias: np.ndarray  # int64 (O,), in the sums' scale, with the half that makes the shift round
    shift: np.ndarray  # int64 (O,)


class _Layer(NamedTuple):
    qkv: _Linear
    out: _Linear
    up: _Linear
    down: _Linear
    attention_norm: tuple[np.ndarray, np.ndarray]
    mlp_norm: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class State:
    """What the model has seen of a batch of streams; `IntegerLM.cumulative` moves it on.

    Attributes:
      keys, values: one array (B, N, 1 + num_frames, H) per layer, integers in float64; first those of the zero vector.
      position: frames seen.
    """

    keys: list[np.ndarray]
    values: list[np.ndarray]
    position: int = 0


class IntegerLM:
    """The language model of `models.encodec_lm`, quantized.

    Args:
      tensors: from `data.lm_quantization.quantize_lm`.
      num_heads: of attention.
      past_frames: frames before its own that a frame sees.
    Raises:
      EntropyModelError: tensors are missing, misshapen or of another dtype, or so large that sums might not be exact.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], *, num_heads: int, past_frames: int):
        check_tensors(tensors, num_heads)
        self.tensors, self.num_heads, self.past_frames = dict(tensors), num_heads, past_frames
        self.num_codebooks, rows, self.embed_dim = tensors["embedding"].shape
        self.codebook_size = rows - 1
        self._heads: tuple[int, _Linear] | None = None
        self._layers = []
        for index in range(count_layers(tensors)):
            prefix = f"layers/{index}/"
            linears = (_linear(tensors, f"{prefix}{name}") for name in ("qkv", "out", "up", "down"))
            norms = (_norm_pair(tensors, f"{prefix}{name}") for name in ("attention_norm", "mlp_norm"))
            self._layers.append(_Layer(*linears, *norms))
        self._norm = _norm_pair(tensors, "norm")
        self._exp_table = tensors["exp_table"].astype(np.int64)
        self._gelu_table = tensors["gelu_table"].astype(np.int64)
        if not 0 < past_frames < EXACT_FLOAT64 >> (WEIGHT_BITS + ACTIVATION_LIMIT.bit_length()):
            raise EntropyModelError(f"past_frames is {past_frames}; expected 1 to 131071")

    @property
    def num_positions(self) -> int:
        """Frames that one stream can have."""
        return len(self.tensors["positions"])

    def start(self, batch_size: int, num_frames: int) -> State:
        """The state before the first of `num_frames` frames.

        Raises:
          EntropyModelError: more frames than there are positions.
        """
        if num_frames > self.num_positions:
            raise EntropyModelError(f"{num_frames} frames in a stream; the model has {self.num_positions} positions")
        dim, heads = self.embed_dim, self.num_heads
        zero = np.zeros((1, dim), np.int64)
        state = State([], [])
        for layer in self._layers:
            _, key, value = (x.reshape(heads, dim // heads) for x in np.split(_apply(zero, layer.qkv)[0], 3))
            for buffers, first in ((state.keys, key), (state.values, value)):
                buffer = np.zeros((batch_size, heads, 1 + num_frames, dim // heads))
                buffer[:, :, 0] = first
                buffers.append(buffer)
        return state

    def cumulative(self, inputs: np.ndarray, state: State) -> np.ndarray:
        """Frequency tables of the next frames' codes, from the codes of the frames before each.

        Args:
          inputs: integers (B, Q, n): 1 + the code of the frame before, 0 where there is none. Q may be less than the
            model's num_codebooks.
          state: from `start`; is moved on by n frames.
        Returns:
          int64 (B, n, Q, C + 1): cumulative counts, from 0 to 2**TABLE_BITS; every code counts at least 1.
        """
        batch, num_codebooks, length = inputs.shape
        first = state.position
        x = sum(self.tensors["embedding"][q][inputs[:, q]].astype(np.int64) for q in range(num_codebooks))
        x = x.reshape(batch * length, self.embed_dim) << int(self.tensors["embedding_shift"])
        x = _normalised(x, self._norm).reshape(batch, length, -1)
        x = _clipped(x + self.tensors["positions"][first : first + length]).reshape(batch * length, -1)
        for layer, keys, values in zip(self._layers, state.keys, state.values, strict=True):
            x = _normalised(x + self._attended(x, layer, keys, values, first), layer.attention_norm)
            x = _normalised(x + _apply(self._gelu(_apply(x, layer.up)), layer.down), layer.mlp_norm)
        state.position += length
        logits = _apply(x, self._head(num_codebooks)).reshape(batch, length, num_codebooks, -1)
        return self._counted(logits)

    def _attended(self, x, layer, keys, values, first):
        """Attention of the rows of x (B * n, D) to the keys up to their own; writes theirs into the buffers."""
        batch, heads, _, head_dim = keys.shape
        length = len(x) // batch
        qkv = _apply(x, layer.qkv).astype(np.float64).reshape(batch, length, 3, heads, head_dim)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)
        end = first + 1 + length  # the zero vector comes before the first frame
        keys[:, :, first + 1 : end], values[:, :, first + 1 : end] = key, value
        begin = max(0, first + 1 - self.past_frames)
        seen = slice(begin, end)
        logits = (query @ keys[:, :, seen].swapaxes(2, 3)).astype(np.int64) >> FRACTION_BITS
        if length > 1:
            distance = np.arange(first + 1, end)[:, None] - np.arange(begin, end)[None]
            logits[:, :, (distance < 0) | (distance > self.past_frames)] = -(2**40)  # whose weight is 0
        weights = self._exp(logits.max(axis=-1, keepdims=True) - logits, WEIGHT_BITS)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = (weights.astype(np.float64) @ values[:, :, seen]).astype(np.int64)
        mixed = (2 * mixed + total) // (2 * total)
        return _apply(mixed.transpose(0, 2, 1, 3).reshape(len(x), -1), layer.out)

    def _exp(self, below: np.ndarray, bits: int) -> np.ndarray:
        """floor(2**bits * 2**-below), `below` with FRACTION_BITS, not negative."""
        whole, fraction = below >> FRACTION_BITS, below & (2**FRACTION_BITS - 1)
        return self._exp_table[fraction] >> (np.minimum(whole, EXP_BITS + 1) + (EXP_BITS - bits))

    def _gelu(self, x: np.ndarray) -> np.ndarray:
        """max(x, 0) - |x| Phi(-|x|); the table holds the second part, which ends with 0."""
        return np.maximum(x, 0) - self._gelu_table[np.minimum(np.abs(x), len(self._gelu_table) - 1)]

    def _head(self, num_codebooks: int) -> _Linear:
        """The layers of the first codebooks as one; kept for the next call."""
        if self._heads is None or self._heads[0] != num_codebooks:
            kernel, bias, shift = (
                self.tensors[f"logits/{name}"][:num_codebooks] for name in ("kernel", "bias", "shift")
            )
            kernel = kernel.transpose(1, 0, 2).reshape(self.embed_dim, -1)
            self._heads = num_codebooks, _make_linear(kernel, bias.reshape(-1), shift.reshape(-1))
        return self._heads[1]

    def _counted(self, logits: np.ndarray) -> np.ndarray:
        """Softmax to the base 2 of (..., C) as cumulative counts (..., C + 1)."""
        powers = self._exp(logits.max(axis=-1, keepdims=True) - logits, EXP_BITS)
        # One count for every code, the rest by the powers: floors, so what is left over goes to the likeliest.
        factor = ((2**TABLE_BITS - logits.shape[-1]) << 30) // powers.sum(axis=-1, keepdims=True)
        counts = 1 + ((powers * factor) >> 30)
        cumulative = np.zeros((*logits.shape[:-1], logits.shape[-1] + 1), np.int64)
        np.cumsum(counts, axis=-1, out=cumulative[..., 1:])
        left = 2**TABLE_BITS - cumulative[..., -1:]
        after_likeliest = np.arange(1, logits.shape[-1] + 1) > logits.argmax(axis=-1)[..., None]
        cumulative[..., 1:] += left * after_likeliest
        return cumulative


def count_layers(tensors: Mapping[str, np.ndarray]) -> int:
    """How many layers the names tell of."""
    return len({name.split("/")[1] for name in tensors if name.startswith("layers/")})


def check_tensors(tensors: Mapping[str, np.ndarray], num_heads: int) -> None:
    """Checks names, shapes and dtypes, and that no sum of products can leave the integers that float64 holds.

    Raises:
      EntropyModelError: the message has the tensor, what it is and what was expected.
    """
    for name in ("embedding", "positions", "exp_table", "gelu_table", "layers/0/up/kernel"):
        if name not in tensors:
            raise EntropyModelError(f"{name} is missing; found {', '.join(sorted(tensors)) or 'nothing'}")
    expected = _expected(tensors)
    for name, (shape, dtype) in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            what = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise EntropyModelError(f"{name} is {what}; expected {np.dtype(dtype)} {shape}")
    if surplus := sorted(tensors.keys() - expected.keys()):
        raise EntropyModelError(f"{', '.join(surplus)}: not tensors of an entropy model")
    num_codebooks, rows, dim = tensors["embedding"].shape
    if num_heads < 1 or dim % num_heads:
        raise EntropyModelError(f"num_heads is {num_heads}; expected a divisor of the width {dim}")
    if not 2 <= rows - 1 <= 2 ** (TABLE_BITS - 4):
        raise EntropyModelError(f"a codebook of {rows - 1} codes; expected 2 to {2 ** (TABLE_BITS - 4)}")
    _check_bounds(tensors, dim, num_heads)


def _expected(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and dtype of every tensor."""
    codebooks, rows, dim = tensors["embedding"].shape
    hidden = tensors["layers/0/up/kernel"].shape[-1]
    size = rows - 1
    expected = {
        "embedding": ((codebooks, rows, dim), np.int16),
        "embedding_shift": ((), np.int64),
        "positions": ((len(tensors["positions"]), dim), np.int16),
        "exp_table": ((2**FRACTION_BITS,), np.int32),
        "gelu_table": (tensors["gelu_table"].shape[:1], np.int32),
        "norm/scale": ((dim,), np.int32),
        "norm/bias": ((dim,), np.int32),
        "logits/kernel": ((codebooks, dim, size), np.int16),
        "logits/bias": ((codebooks, size), np.int64),
        "logits/shift": ((codebooks, size), np.uint8),
    }
    shapes = {"qkv": (dim, 3 * dim), "out": (dim, dim), "up": (dim, hidden), "down": (hidden, dim)}
    for index in range(count_layers(tensors)):
        for name, shape in shapes.items():
            prefix = f"layers/{index}/{name}"
            expected[f"{prefix}/kernel"] = (shape, np.int16)
            expected |= {f"{prefix}/bias": (shape[1:], np.int64), f"{prefix}/shift": (shape[1:], np.uint8)}
        for name in ("attention_norm", "mlp_norm"):
            expected |= {f"layers/{index}/{name}/{part}": ((dim,), np.int32) for part in ("scale", "bias")}
    return expected


def _check_bounds(tensors: Mapping[str, np.ndarray], dim: int, num_heads: int) -> None:
    """What must hold for every sum to be an exact integer, whatever the inputs are."""

    def require(name: str, value: int, limit: int) -> None:
        if not 0 <= value < limit:
            raise EntropyModelError(f"{name}: sums may reach {value}; only below {limit} are they exact")

    for name in tensors:
        if name.endswith("/kernel"):
            products = np.abs(tensors[name].astype(np.int64)).sum(axis=-2).max() * ACTIVATION_LIMIT
            bias = np.abs(tensors[name.replace("/kernel", "/bias")]).max()
            require(name, int(products), EXACT_FLOAT64)
            require(name.replace("/kernel", "/bias"), int(bias), EXACT_FLOAT64)
            shift = tensors[name.replace("/kernel", "/shift")]
            require(name.replace("/kernel", "/shift"), int(shift.max()), 32)
            require(name.replace("/kernel", "/shift"), int(shift.min()) - 1, 32)
        elif name.endswith("norm/scale") or name.endswith("norm/bias"):
            require(name, int(np.abs(tensors[name].astype(np.int64)).max()), 2**24)
    require("attention", dim // num_heads * ACTIVATION_LIMIT**2, EXACT_FLOAT64)
    # A norm's input is at most two activations, its deviation four; the sum of their squares stays below 2**62.
    require("norm", dim * (4 * ACTIVATION_LIMIT) ** 2, 2**62)
    embedding = np.abs(tensors["embedding"].astype(np.int64)).max(axis=(1, 2)).sum()
    shift = int(tensors["embedding_shift"])
    require("embedding_shift", shift, 8)
    require("embedding", int(embedding) << shift, 2 * ACTIVATION_LIMIT)
    exp_table, gelu_table = (tensors[name] for name in ("exp_table", "gelu_table"))
    require("exp_table", int(exp_table.max()) - 1, 2**EXP_BITS)
    require("exp_table", int(exp_table.min()) - 1, 2**EXP_BITS)
    require("exp_table", 2**EXP_BITS - int(exp_table[0]), 1)  # the likeliest code has a power that is not 0
    require("gelu_table", int(gelu_table.max()), ACTIVATION_LIMIT)
    require("gelu_table", int(gelu_table.min()), ACTIVATION_LIMIT)


def _linear(tensors: Mapping[str, np.ndarray], name: str) -> _Linear:
    return _make_linear(*(tensors[f"{name}/{part}"] for part in ("kernel", "bias", "shift")))


def _make_linear(kernel: np.ndarray, bias: np.ndarray, shift: np.ndarray) -> _Linear:
    shift = shift.astype(np.int64)
    return _Linear(kernel.astype(np.float64), bias + (1 << (shift - 1)), shift)


def _norm_pair(tensors: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias, the bias in the scale of their product's sum and with the half that makes the shift round."""
    half = 1 << (_UNIT_BITS - 1)
    scale, bias = (tensors[f"{name}/{part}"].astype(np.int64) for part in ("scale", "bias"))
    return scale, (bias << _UNIT_BITS) + half


def _clipped(x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, -ACTIVATION_LIMIT), ACTIVATION_LIMIT)


def _apply(x: np.ndarray, linear: _Linear) -> np.ndarray:
    """Activations (R, I) -> activations (R, O)."""
    y = (x.astype(np.float64) @ linear.kernel).astype(np.int64)
    y += linear.bias
    y >>= linear.shift
    return _clipped(y)


def _normalised(x: np.ndarray, norm: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """LayerNorm of rows (R, D), at most 2 * ACTIVATION_LIMIT."""
    scale, bias = norm
    dim = x.shape[1]
    centered = x - (2 * x.sum(axis=1, keepdims=True) + dim) // (2 * dim)
    variance = np.square(centered).sum(axis=1, keepdims=True) // dim + NORM_EPSILON
    deviation = isqrt(variance << 16)  # with 8 more bits
    unit = (centered * (2**48 // deviation)) >> 24  # with _UNIT_BITS
    return _clipped((unit * scale + bias) >> _UNIT_BITS)


def isqrt(x: np.ndarray) -> np.ndarray:
    """floor(sqrt(x)) of integers 0 <= x < 2**62, whatever the machine's square root rounds to."""
    root = np.sqrt(x.astype(np.float64)).astype(np.int64)
    root -= root * root > x
    root += (root + 1) * (root + 1) <= x
    return root
