"""Mimi's parameters by their names here, in HuggingFace's folders and in Kyutai's files, and its config there.

Kyutai's rotary positions turn neighbouring channels, HuggingFace's and ours the two halves of a head: the rows of its
queries and keys are put in our order.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxaudio.convert.codec_tensors import Names, Tensors, fold_weight_norm, in_memory, put
from jaxaudio.convert.encodec_names import (
    SEANET_ARGUMENTS,
    SEANET_FIELDS,
    seanet_config,
    seanet_fields,
    seanet_names,
)
from jaxaudio.convert.tensors import ConvertError, StoredTensor
from jaxaudio.convert.upstream_config import fields, require
from jaxaudio.models.mimi import PRESETS, MimiConfig
from jaxaudio.nn.rvq import RVQConfig

# HuggingFace's fields with their defaults there.
_FIELDS = SEANET_FIELDS | {
    "hidden_size": 512,
    "num_filters": 64,
    "upsampling_ratios": [8, 6, 5, 4],
    "last_kernel_size": 3,
    "pad_mode": "constant",
    "use_conv_shortcut": False,
    "sampling_rate": 24_000,
    "codebook_size": 2048,
    "codebook_dim": 256,
    "num_quantizers": 32,
    "num_semantic_quantizers": 1,
    "num_hidden_layers": 8,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": None,
    "norm_eps": 1e-5,
    "sliding_window": 250,
    "layer_scale_initial_scale": 0.01,
    "frame_rate": None,
}
# The same fields in Kyutai's config.
_KYUTAI = {
    "seanet": SEANET_ARGUMENTS,
    "quantizer": {"num_quantizers": "n_q", "codebook_size": "bins", "codebook_dim": "dimension"},
    "transformer": {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_heads",
        "intermediate_size": "dim_feedforward",
        "sliding_window": "context",
        "layer_scale_initial_scale": "layer_scale",
        "rope_theta": "max_period",
    },
}

# Ours: (HuggingFace's, Kyutai's), form.
_BLOCK = {
    "attention_norm/layer/scale": ("input_layernorm.weight", "norm1.weight", "same"),
    "attention_norm/layer/bias": ("input_layernorm.bias", "norm1.bias", "same"),
    "attention/query/kernel": ("self_attn.q_proj.weight", "self_attn.q_proj.weight", "to_heads"),
    "attention/key/kernel": ("self_attn.k_proj.weight", "self_attn.k_proj.weight", "to_heads"),
    "attention/value/kernel": ("self_attn.v_proj.weight", "self_attn.v_proj.weight", "to_heads"),
    "attention/out/kernel": ("self_attn.o_proj.weight", "self_attn.out_proj.weight", "from_heads"),
    "attention_scale": ("self_attn_layer_scale.scale", "layer_scale_1.scale", "same"),
    "mlp_norm/layer/scale": ("post_attention_layernorm.weight", "norm2.weight", "same"),
    "mlp_norm/layer/bias": ("post_attention_layernorm.bias", "norm2.bias", "same"),
    "mlp/up/kernel": ("mlp.fc1.weight", "linear1.weight", "linear"),
    "mlp/down/kernel": ("mlp.fc2.weight", "linear2.weight", "linear"),
    "mlp_scale": ("mlp_layer_scale.scale", "layer_scale_2.scale", "same"),
}
_RESAMPLERS = {
    "downsample/kernel": ("downsample.conv.weight", "downsample.conv.conv.conv.weight", "conv"),
    "upsample/kernel": ("upsample.conv.weight", "upsample.convtr.convtr.convtr.weight", "conv"),
}
_QUANTIZERS = {
    "semantic": ("quantizer.semantic_residual_vector_quantizer", "quantizer.rvq_first"),
    "acoustic": ("quantizer.acoustic_residual_vector_quantizer", "quantizer.rvq_rest"),
}
_PROJECTIONS = {"in_kernel": "input_proj.weight", "out_kernel": "output_proj.weight"}

# A codebook's running sums and counts, whose quotient are its codes, and whether it was begun; in the spellings of
# HuggingFace and of Kyutai's newer and older files.
_STATISTIC = re.compile(
    r"(quantizer\..+\._?codebook)\."
    r"(?:(?P<sum>embed_sum|embedding_sum|embed_avg)|(?P<count>cluster_usage|cluster_size)"
    r"|(?P<begun>initialized|_initialized|inited))"
)
_MIN_COUNT = 1e-5


def names(shapes: Mapping[str, tuple[int, ...]], layout: str) -> Names:
    """Upstream's names and forms, when folded, of the parameters with these paths and shapes."""
    which = 0 if layout == "hf" else 1
    found = dict(seanet_names(shapes, layout))
    for path, shape in shapes.items():
        part, _, rest = path.partition("/")
        if path in _RESAMPLERS:
            found[path] = _RESAMPLERS[path][which], _RESAMPLERS[path][2]
        elif part.endswith("_transformer"):
            *upstream, form = _BLOCK[rest.removeprefix("transformer/layers/")]
            stack = f"{part}.layers" if layout == "hf" else f"{part}.transformer.layers"
            found[path] = tuple(f"{stack}.{layer}.{upstream[which]}" for layer in range(shape[0])), form
        elif part == "quantizer":
            quantizer, leaf = rest.split("/")
            upstream = _QUANTIZERS[quantizer][which]
            if leaf in _PROJECTIONS:
                found[path] = f"{upstream}.{_PROJECTIONS[leaf]}", "pointwise"
            else:
                codebook = "layers.{}.codebook" if layout == "hf" else "vq.layers.{}._codebook"
                levels = (codebook.format(level) for level in range(shape[0]))
                found[path] = tuple(f"{upstream}.{level}.embed" for level in levels), "same"
    return found


def fold(tensors: Tensors, where: str, num_heads: int) -> dict[str, StoredTensor]:
    """A file's tensors with codebooks as such, weight norm folded if there is any, and Kyutai's attention taken apart.

    Raises:
      ConvertError: a part is missing, or a codebook was never begun.
    """
    folded, codebooks = {}, {}
    for name, tensor in fold_weight_norm(tensors, where).items():
        attention = re.fullmatch(r"(.+\.self_attn\.)(in_proj|out_proj)(?:_weight|\.weight|s\.0\.weight)", name)
        if match := _STATISTIC.fullmatch(name):
            put(codebooks.setdefault(match[1], {}), match.lastgroup, tensor, f"{where}: {match[1]}")
        elif attention and attention[2] == "in_proj":
            for part, rows in _split_attention(attention[1], tensor, num_heads, f"{where}: {name}").items():
                put(folded, part, rows, where)
        else:
            put(folded, f"{attention[1]}out_proj.weight" if attention else name, tensor, where)
    for codebook, parts in codebooks.items():
        missing = {"sum", "count"} - parts.keys()
        if missing or parts["count"].shape != parts["sum"].shape[:1]:
            found = {part: tensor.shape for part, tensor in parts.items()}
            raise ConvertError(f"{where}: {codebook} has {found}, expected the sums of its vectors and their counts")
        if "begun" in parts and not parts["begun"].read().all():
            raise ConvertError(f"{where}: {codebook} was never trained, it says")
        put(folded, f"{codebook}.embed", _quotient(parts["sum"], parts["count"]), where)
    return folded


def _quotient(total: StoredTensor, count: StoredTensor) -> StoredTensor:
    def read() -> np.ndarray:
        counts = np.maximum(count.read().astype(np.float32), np.float32(_MIN_COUNT))
        return total.read().astype(np.float32) / counts[:, None]

    return StoredTensor(total.shape, total.dtype, read)


def _split_attention(prefix: str, joined: StoredTensor, num_heads: int, where: str) -> dict[str, StoredTensor]:
    rows, dim = joined.shape
    if rows % (6 * num_heads):
        raise ConvertError(f"{where} has {rows} rows, expected queries, keys and values of {num_heads} heads")

    def read(index: int) -> np.ndarray:
        part = joined.read()[index * rows // 3 : (index + 1) * rows // 3]
        if index == 2:
            return part
        return part.reshape(num_heads, -1, 2, dim).swapaxes(1, 2).reshape(rows // 3, dim)

    return {
        f"{prefix}{letter}_proj.weight": StoredTensor((rows // 3, dim), joined.dtype, lambda index=index: read(index))
        for index, letter in enumerate("qkv")
    }


def unfold(tensors: Tensors, values: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors that transformers' model has, of which `fold` makes these again; from HuggingFace's names, folded."""
    unfolded = {}
    for name, tensor in tensors.items():
        codebook, _, leaf = name.rpartition(".")
        if leaf == "embed":
            ones = np.ones(tensor.shape[0], np.float32)
            unfolded[f"{codebook}.embed_sum"] = tensor
            unfolded[f"{codebook}.cluster_usage"] = in_memory(ones)
            unfolded[f"{codebook}.initialized"] = in_memory(ones[:1])
        else:
            unfolded[name] = tensor
    return unfolded


def read_config(values: Mapping[str, Any], where: str) -> MimiConfig:
    """Our config from HuggingFace's.

    Raises:
      ConvertError: it describes a net that ours cannot be.
    """
    found = fields(values, _FIELDS, where)
    dim, heads, frame_rate = found["hidden_size"], found["num_attention_heads"], values.get("_frame_rate")
    frame_rate = frame_rate if found["frame_rate"] is None else found["frame_rate"]
    expected = {
        "trim_right_ratio": 1.0,
        "hidden_act": "gelu",
        "attention_bias": False,
        "vector_quantization_hidden_dimension": found["codebook_dim"],
        "upsample_groups": dim,
    }
    require(values, expected, where)
    rope = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta", 1e4)}
    require(rope, {"rope_type": "default"}, where)
    seanet = seanet_config(found, where, num_lstm_layers=0)
    downsampling = 2
    if frame_rate is not None:
        downsampling, rest = divmod(found["sampling_rate"], frame_rate * seanet.hop_length)
        if rest:
            raise ConvertError(
                f"{where}: {frame_rate} frames a second are no whole number of {seanet.hop_length} samples at "
                f"{found['sampling_rate']} Hz"
            )
    transformer = dataclasses.replace(
        PRESETS["mimi"].transformer,
        num_layers=found["num_hidden_layers"],
        embed_dim=dim,
        num_heads=heads,
        num_kv_heads=None if found["num_key_value_heads"] == heads else found["num_key_value_heads"],
        head_dim=None if found["head_dim"] in (None, dim // heads) else found["head_dim"],
        mlp_dim=found["intermediate_size"],
        norm_epsilon=found["norm_eps"],
        window=found["sliding_window"],
        layer_scale=found["layer_scale_initial_scale"],
        rotary_base=float(rope.get("rope_theta", 1e4)),
    )
    projection = "none" if found["codebook_dim"] == dim else "shared"
    rvq = RVQConfig(found["num_quantizers"], found["codebook_size"], found["codebook_dim"], dim, projection)
    return MimiConfig(
        found["sampling_rate"],
        seanet,
        rvq,
        transformer=transformer,
        downsampling=int(downsampling),
        num_semantic=found["num_semantic_quantizers"],
    )


def hf_config(config: MimiConfig) -> dict[str, Any]:
    """HuggingFace's config."""
    transformer, rvq = config.transformer, config.rvq
    return {
        "architectures": ["MimiModel"],
        "model_type": "mimi",
        **seanet_fields(config.seanet),
        "sampling_rate": config.sample_rate,
        "frame_rate": config.frame_rate,
        "codebook_size": rvq.codebook_size,
        "codebook_dim": rvq.codebook_dim,
        "vector_quantization_hidden_dimension": rvq.codebook_dim,
        "num_quantizers": rvq.num_codebooks,
        "num_semantic_quantizers": config.num_semantic,
        "upsample_groups": config.seanet.embed_dim,
        "num_hidden_layers": transformer.num_layers,
        "intermediate_size": transformer.mlp_dim,
        "num_attention_heads": transformer.num_heads,
        "num_key_value_heads": transformer.kv_heads,
        "head_dim": transformer.query_head_dim,
        "hidden_act": "gelu",
        "norm_eps": transformer.norm_epsilon,
        "rope_parameters": {"rope_theta": transformer.rotary_base, "rope_type": "default"},
        "sliding_window": transformer.window,
        "layer_scale_initial_scale": transformer.layer_scale,
        "attention_bias": False,
    }


def read_kyutai(values: Mapping[str, Any], where: str) -> MimiConfig:
    """Our config from a `mimi_config.json` of Kyutai's.

    Raises:
      ConvertError: it describes a net that ours cannot be.
    """
    missing = {"sample_rate", "frame_rate", "seanet", "quantizer", "transformer"} - values.keys()
    if missing:
        raise ConvertError(f"{where}: expected a config of Mimi, but it has no {', '.join(sorted(missing))}")
    one = {"causal": True, "gating": "none", "norm": "layer_norm", "positional_embedding": "rope"}
    require(values["transformer"], one, where)
    require(values["seanet"], {"activation": "ELU", "true_skip": True, "lstm": 0}, where)
    found = {"sampling_rate": values["sample_rate"], "frame_rate": values["frame_rate"]}
    for part, names in _KYUTAI.items():
        found |= {hf: values[part][name] for hf, name in names.items() if name in values[part]}
    return read_config(found, where)
