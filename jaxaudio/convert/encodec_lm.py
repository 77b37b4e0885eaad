"""EnCodec's published language models: encodec_lm_24khz-1608e3c0.th and encodec_lm_48khz-7add9fc3.th.

    python -m jaxaudio.convert.encodec_lm encodec_lm_24khz-1608e3c0.th CODEC_FOLDER --frame-rate 75

quantizes one into the entropy model of a codec's folder.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxaudio.convert.tensors import ConvertError, StoredTensor
from jaxaudio.convert.torch_files import read_torch, stored_tensors
from jaxaudio.data.entropy_coder import EntropyModelError, save_entropy_model
from jaxaudio.data.lm_quantization import quantize_lm
from jaxaudio.models.encodec_lm import CONTEXT_S, EncodecLMConfig

# Ours: upstream's, in layer i.
_LAYER = {
    "attention/out": "self_attn.out_proj",
    "mlp/up": "linear1",
    "mlp/down": "linear2",
    "attention_norm/layer": "norm1",
    "mlp_norm/layer": "norm2",
}


def load_encodec_lm(
    path: pathlib.Path, *, frame_rate: float, num_heads: int = 8
) -> tuple[EncodecLMConfig, dict[str, Any]]:
    """Reads a language model that the public package `encodec` has saved.

    Args:
      path: the .th file.
      frame_rate: of the codec, in Hz: 75 for 24 kHz, 150 for 48 kHz; the file does not say it, but how far back a frame
        sees follows from it.
      num_heads: 8 in all published ones; not in the file either.
    Returns:
      (config, parameters as `EncodecLM` takes them).
    Raises:
      ConvertError: the file cannot be read, or does not hold such a model; has the tensors that are missing, not
        expected or misshapen.
    """
    tensors = stored_tensors(str(path), read_torch(path))
    config = _config(str(path), tensors, frame_rate, num_heads)
    _check(str(path), config, tensors)

    def matrix(name: str) -> np.ndarray:
        return tensors[name].read().astype(np.float32).T

    leaves = {
        "embedding": np.stack([matrix(f"emb.{q}.weight").T for q in range(config.num_codebooks)]),
        "logits_kernel": np.stack([matrix(f"linears.{q}.weight") for q in range(config.num_codebooks)]),
        "logits_bias": np.stack([matrix(f"linears.{q}.bias") for q in range(config.num_codebooks)]),
        "norm/layer/scale": matrix("transformer.norm_in.weight"),
        "norm/layer/bias": matrix("transformer.norm_in.bias"),
    }
    layers = [_layer(config, matrix, f"transformer.layers.{index}.") for index in range(config.num_layers)]
    for name in layers[0]:
        leaves[f"transformer/layers/{name}"] = np.stack([layer[name] for layer in layers])
    return config, unflatten_dict(leaves, sep="/")


def _layer(config: EncodecLMConfig, matrix: Any, prefix: str) -> dict[str, np.ndarray]:
    """One layer's parameters by our names."""
    dim = config.embed_dim
    heads = (config.num_heads, dim // config.num_heads)
    leaves = {}
    kernel, bias = matrix(f"{prefix}self_attn.in_proj_weight"), matrix(f"{prefix}self_attn.in_proj_bias")
    for index, role in enumerate(("query", "key", "value")):
        part = slice(index * dim, (index + 1) * dim)
        leaves[f"attention/{role}/kernel"] = kernel[:, part].reshape(dim, *heads)
        leaves[f"attention/{role}/bias"] = bias[part].reshape(heads)
    for ours, theirs in _LAYER.items():
        weight = "scale" if ours.endswith("norm/layer") else "kernel"
        leaves[f"{ours}/{weight}"] = matrix(f"{prefix}{theirs}.weight")
        leaves[f"{ours}/bias"] = matrix(f"{prefix}{theirs}.bias")
    leaves["attention/out/kernel"] = leaves["attention/out/kernel"].reshape(*heads, dim)
    return leaves


def _config(where: str, tensors: Mapping[str, StoredTensor], frame_rate: float, num_heads: int) -> EncodecLMConfig:
    """What the shapes say."""

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    try:
        rows, dim = tensors["emb.0.weight"].shape
        mlp_dim, _ = tensors["transformer.layers.0.linear1.weight"].shape
    except (KeyError, ValueError) as error:
        raise ConvertError(
            f"{where} is not a language model of EnCodec: expected the matrices emb.0.weight and "
            f"transformer.layers.0.linear1.weight, found {', '.join(sorted(tensors)[:5])}, ..."
        ) from error
    if dim % num_heads:
        raise ConvertError(f"{where}: its width {dim} is not a multiple of num_heads={num_heads}")
    return EncodecLMConfig(
        num_codebooks=count(r"emb\.(\d+)\."),
        codebook_size=rows - 1,
        past_frames=int(CONTEXT_S * frame_rate),
        num_layers=count(r"transformer\.layers\.(\d+)\."),
        embed_dim=dim,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
    )


def _check(where: str, config: EncodecLMConfig, tensors: Mapping[str, StoredTensor]) -> None:
    dim, hidden, size = config.embed_dim, config.mlp_dim, config.codebook_size
    expected = {"transformer.norm_in.weight": (dim,), "transformer.norm_in.bias": (dim,)}
    for index in range(config.num_codebooks):
        expected[f"emb.{index}.weight"] = (size + 1, dim)
        expected |= {f"linears.{index}.weight": (size, dim), f"linears.{index}.bias": (size,)}
    for index in range(config.num_layers):
        prefix = f"transformer.layers.{index}."
        expected |= {f"{prefix}self_attn.in_proj_weight": (3 * dim, dim), f"{prefix}self_attn.in_proj_bias": (3 * dim,)}
        for name, shape in (("self_attn.out_proj", (dim, dim)), ("linear1", (hidden, dim)), ("linear2", (dim, hidden))):
            expected |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            expected |= {f"{prefix}{name}.weight": (dim,), f"{prefix}{name}.bias": (dim,)}
    problems = [
        f"{name} is missing, expected with shape {shape}" for name, shape in expected.items() if name not in tensors
    ]
    problems += [
        f"{name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [f"{name} is not one of its tensors" for name in sorted(tensors.keys() - expected.keys())]
    if problems:
        raise ConvertError("\n  ".join([f"{where} is not a language model of EnCodec:", *problems[:12]]))


def main(argv: Sequence[str] | None = None) -> None:
    """The command of this file's docstring."""
    parser = argparse.ArgumentParser(prog="python -m jaxaudio.convert.encodec_lm", description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="the published .th file")
    parser.add_argument("folder", type=pathlib.Path, help="the codec's folder")
    parser.add_argument("--frame-rate", type=float, required=True, help="of the codec, in Hz: 75 or 150")
    arguments = parser.parse_args(argv)
    config, params = load_encodec_lm(arguments.file, frame_rate=arguments.frame_rate)
    tensors = quantize_lm(params)
    path = save_entropy_model(
        arguments.folder, tensors, num_heads=config.num_heads, past_frames=config.past_frames, name=arguments.file.stem
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except (ConvertError, EntropyModelError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
