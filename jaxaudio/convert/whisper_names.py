"""Whisper's parameters by their names here, in OpenAI's checkpoints and in HuggingFace's.

Here a kernel has its inputs first and attention's is split into heads; upstream all of that is transposed and flat. So
one rule moves every tensor: transpose and reshape kernels, reshape the rest. Layers are named one by one, as
"encoder/transformer/layers/0/mlp/up/kernel"; a model's tree stacks them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxaudio.convert.tensors import FLOATS, ConvertError, StoredTensor
from jaxaudio.models.whisper import WhisperConfig

# Ours: (OpenAI's, HuggingFace's without its prefix "model.").
_TABLES = {
    "encoder/position_embedding": ("encoder.positional_embedding", "encoder.embed_positions.weight"),
    "decoder/position_embedding": ("decoder.positional_embedding", "decoder.embed_positions.weight"),
    "decoder/token_embedding": ("decoder.token_embedding.weight", "decoder.embed_tokens.weight"),
}
_MODULES = {
    "encoder/conv1": ("encoder.conv1", "encoder.conv1"),
    "encoder/conv2": ("encoder.conv2", "encoder.conv2"),
    "encoder/transformer/norm/layer": ("encoder.ln_post", "encoder.layer_norm"),
    "decoder/transformer/norm/layer": ("decoder.ln", "decoder.layer_norm"),
}
_ENCODER_BLOCK = {
    "attention_norm/layer": ("attn_ln", "self_attn_layer_norm"),
    "attention/query": ("attn.query", "self_attn.q_proj"),
    "attention/key": ("attn.key", "self_attn.k_proj"),
    "attention/value": ("attn.value", "self_attn.v_proj"),
    "attention/out": ("attn.out", "self_attn.out_proj"),
    "mlp_norm/layer": ("mlp_ln", "final_layer_norm"),
    "mlp/up": ("mlp.0", "fc1"),
    "mlp/down": ("mlp.2", "fc2"),
}
_DECODER_BLOCK = _ENCODER_BLOCK | {
    "cross_attention_norm/layer": ("cross_attn_ln", "encoder_attn_layer_norm"),
    "cross_attention/query": ("cross_attn.query", "encoder_attn.q_proj"),
    "cross_attention/key": ("cross_attn.key", "encoder_attn.k_proj"),
    "cross_attention/value": ("cross_attn.value", "encoder_attn.v_proj"),
    "cross_attention/out": ("cross_attn.out", "encoder_attn.out_proj"),
}

_LAYER = re.compile(r"(encoder|decoder)/transformer/layers/(\d+)/(.+)")

# The field of the config that a tensor's shape shows, beside embed_dim.
_SHOWN_BY = {
    "decoder/token_embedding": "vocab_size",
    "decoder/position_embedding": "text_length",
    "encoder/position_embedding": "num_positions",
    "encoder/conv1/kernel": "num_mels",
    "encoder/conv2/kernel": "embed_dim",
}

Layout = Literal["hf", "openai", "jaxaudio"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its path here and its names upstream, its shape here and its shape upstream."""

    path: str
    openai: str
    hf: str
    shape: tuple[int, ...]
    upstream_shape: tuple[int, ...]

    def name(self, layout: Layout) -> str:
        """Its name in that layout."""
        return {"hf": self.hf, "openai": self.openai, "jaxaudio": self.path}[layout]

    def from_upstream(self, tensor: StoredTensor) -> StoredTensor:
        """The same numbers in our shape."""
        return StoredTensor(self.shape, tensor.dtype, lambda: self._transposed(tensor.read()).reshape(self.shape))

    def to_upstream(self, tensor: StoredTensor) -> StoredTensor:
        """The same numbers in upstream's shape."""
        shape = self.upstream_shape[::-1] if self._is_kernel else self.upstream_shape
        return StoredTensor(self.upstream_shape, tensor.dtype, lambda: self._transposed(tensor.read().reshape(shape)))

    @property
    def _is_kernel(self) -> bool:
        return self.path.endswith("/kernel")

    def _transposed(self, array: np.ndarray) -> np.ndarray:
        return array.T if self._is_kernel else array


def parameters(config: WhisperConfig) -> tuple[Parameter, ...]:
    """All parameters of a config."""
    names = {path: (openai, f"model.{hf}") for path, (openai, hf) in _TABLES.items()}
    modules = dict(_MODULES)
    for part, block in (("encoder", _ENCODER_BLOCK), ("decoder", _DECODER_BLOCK)):
        for index in range(getattr(config, f"num_{part}_layers")):
            for module, (openai, hf) in block.items():
                path = f"{part}/transformer/layers/{index}/{module}"
                modules[path] = (f"{part}.blocks.{index}.{openai}", f"{part}.layers.{index}.{hf}")
    for module, (openai, hf) in modules.items():
        weight = "scale" if module.endswith("norm/layer") else "kernel"
        names[f"{module}/{weight}"] = (f"{openai}.weight", f"model.{hf}.weight")
        if not module.endswith("/key"):
            names[f"{module}/bias"] = (f"{openai}.bias", f"model.{hf}.bias")
    return tuple(Parameter(path, *upstream, *_shapes(path, config)) for path, upstream in names.items())


def to_tree(config: WhisperConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What `Whisper.apply` takes as {"params": ...}: float32, layers stacked; read one tensor at a time.

    Args:
      config: the model's.
      tensors: by our paths, in our shapes.
    """
    leaves: dict[str, np.ndarray] = {}
    for path, tensor in tensors.items():
        match = _LAYER.fullmatch(path)
        if match is None:
            leaves[path] = np.ascontiguousarray(tensor.read(), dtype=np.float32)
            continue
        part, index, rest = match.groups()
        stack = f"{part}/transformer/layers/{rest}"
        if stack not in leaves:
            leaves[stack] = np.empty((getattr(config, f"num_{part}_layers"), *tensor.shape), np.float32)
        leaves[stack][int(index)] = tensor.read()
    return unflatten_dict(leaves, sep="/")


def from_tree(config: WhisperConfig, params: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors of a tree by our paths, layers one by one, in its dtypes; JAX arrays are fetched one at a time.

    Raises:
      ConvertError: the tree is not that of the config; the message names paths and shapes.
    """
    leaves = flatten_dict(params, sep="/")
    tensors = {}
    for path, leaf in leaves.items():
        match = re.fullmatch(r"(encoder|decoder)/transformer/layers/([^\d].*)", path)
        if match is None:
            tensors[path] = StoredTensor(leaf.shape, np.dtype(leaf.dtype), lambda leaf=leaf: np.asarray(leaf))
            continue
        for index in range(leaf.shape[0]):
            read = lambda leaf=leaf, index=index: np.asarray(leaf[index])  # noqa: E731
            name = f"{match[1]}/transformer/layers/{index}/{match[2]}"
            tensors[name] = StoredTensor(leaf.shape[1:], np.dtype(leaf.dtype), read)
    check(config, "jaxaudio", tensors, "the tree of parameters", said(config))
    return tensors


def said(config: WhisperConfig) -> dict[str, str]:
    """A config's fields in our own words, as `check` takes them."""
    fields = ("vocab_size", "text_length", "num_mels", "embed_dim", "num_encoder_layers", "num_decoder_layers")
    words = {name: f"{name} is {getattr(config, name)}" for name in fields}
    return words | {"num_positions": f"num_frames is {config.num_frames}"}


def _shapes(path: str, config: WhisperConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A parameter's shape here and upstream."""
    dim = config.embed_dim
    rows = {
        "encoder/position_embedding": config.num_positions,
        "decoder/position_embedding": config.text_length,
        "decoder/token_embedding": config.vocab_size,
    }
    if path in rows:
        return (rows[path], dim), (rows[path], dim)
    module, name = path.split("/")[-2:]
    heads = (config.num_heads, dim // config.num_heads)
    # Axes before and behind, each here and upstream.
    plain, split = ((dim,), (dim,)), (heads, (dim,))
    wide, window, hidden = ((4 * dim,),) * 2, ((3, config.num_mels),) * 2, ((3, dim),) * 2
    inputs = {"conv1": window, "conv2": hidden, "out": split, "down": wide}.get(module, plain)
    outputs = {"query": split, "key": split, "value": split, "up": wide}.get(module, plain)
    if name != "kernel":
        return outputs
    return inputs[0] + outputs[0], (inputs[1] + outputs[1])[::-1]


def check(
    config: WhisperConfig, layout: Layout, tensors: Mapping[str, StoredTensor], where: str, said: Mapping[str, str]
) -> None:
    """Compares the tensors of a file with those of its config.

    Args:
      config: what the file says of itself.
      layout: whose names and shapes the tensors have.
      tensors: by name.
      where: the file or folder, for the message.
      said: what the config says of a field of ours in its own words, such as "num_mel_bins is 80", for the message.
    Raises:
      ConvertError: missing, unexpected, misshapen or non-float tensors, each with its name and what was expected, and
        the fields of the config that they contradict.
    """
    problems = []
    for part in ("encoder", "decoder"):
        pattern = re.compile(rf"(?:model\.)?{part}[./].*?(?:blocks|layers)[./](\d+)[./]")
        found = len({match[1] for name in tensors if (match := pattern.match(name))})
        if found != getattr(config, f"num_{part}_layers"):
            problems.append(f"{said[f'num_{part}_layers']}, but there are tensors of {found} layers")
    expected = {parameter.name(layout): parameter for parameter in parameters(config)}
    for name, parameter in expected.items():
        shape = parameter.shape if layout == "jaxaudio" else parameter.upstream_shape
        because = f", as {said[_SHOWN_BY[parameter.path]]}" if parameter.path in _SHOWN_BY else ""
        if name not in tensors:
            problems.append(f"{name} is missing, expected with shape {shape}")
        elif tensors[name].shape != shape:
            problems.append(f"{name} has shape {tensors[name].shape}, expected {shape}{because}")
        elif str(tensors[name].dtype) not in FLOATS:
            problems.append(f"{name} is {tensors[name].dtype}, expected one of {', '.join(FLOATS)}")
    for name in sorted(tensors.keys() - expected.keys()):
        problems.append(f"{name} of shape {tensors[name].shape} is not one of Whisper's tensors")
    if problems:
        more = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise ConvertError(
            "\n  ".join([f"{where} does not hold the model that its config describes:", *problems[:12], *more])
        )
