"""EnCodec's parameters by their names here, in HuggingFace's folders and in the files of the two repositories of Meta,
and its config there.

A file of `encodec` is the bare tensors by name; one of `audiocraft` holds them as "best_state" beside the run's config
"xp.cfg". Their names are the same.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxaudio.convert.codec_tensors import Names, Tensors, fold_weight_norm, in_memory, put, split_weight_norm
from jaxaudio.convert.tensors import ConvertError, StoredTensor
from jaxaudio.convert.upstream_config import fields, one_of, require
from jaxaudio.models.encodec import PRESETS, EnCodecConfig
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.nn.seanet import SEANetConfig

# HuggingFace's fields with their defaults there; the first ones are Mimi's too.
SEANET_FIELDS = {
    "audio_channels": 1,
    "num_filters": 32,
    "num_residual_layers": 1,
    "upsampling_ratios": [8, 5, 4, 2],
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "use_causal_conv": True,
    "pad_mode": "reflect",
    "compress": 2,
    "hidden_size": 128,
    "use_conv_shortcut": True,
}
_FIELDS = SEANET_FIELDS | {
    "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0],
    "sampling_rate": 24_000,
    "normalize": False,
    "chunk_length_s": None,
    "overlap": None,
    "norm_type": "weight_norm",
    "num_lstm_layers": 2,
    "codebook_size": 1024,
    "codebook_dim": None,
}
_PAD_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "edge"}
_NORMS = {"weight_norm": "none", "time_group_norm": "group"}
# HuggingFace's fields as the arguments of the SEANets of Meta and of Kyutai.
SEANET_ARGUMENTS = {
    "audio_channels": "channels",
    "num_filters": "n_filters",
    "num_residual_layers": "n_residual_layers",
    "upsampling_ratios": "ratios",
    "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "dilation_growth_rate": "dilation_base",
    "use_causal_conv": "causal",
    "pad_mode": "pad_mode",
    "compress": "compress",
    "hidden_size": "dimension",
}

_INNER = {"conv_1": "block.1.", "conv_2": "block.3.", "shortcut": "shortcut."}
_LSTM = {"input_kernel": ("weight_ih", "linear"), "hidden_kernel": ("weight_hh", "linear"), "bias": ("bias", "same")}
_LEAVES = {"kernel": "weight", "bias": "bias", "norm_scale": "weight", "norm_bias": "bias"}
# What training kept of a codebook, which is not needed: whether it was begun, and its running sums.
_STATISTICS = re.compile(r"(quantizer\..+\._?codebook)\.(inited|cluster_size|embed_avg)")


def names(shapes: Mapping[str, tuple[int, ...]], layout: str) -> Names:
    """Upstream's names and forms, when folded, of the parameters with these paths and shapes."""
    levels = range(shapes["quantizer/codebooks"][0])
    codebook = "quantizer.layers.{}.codebook" if layout == "hf" else "quantizer.vq.layers.{}._codebook"
    codebooks = tuple(f"{codebook.format(level)}.embed" for level in levels), "same"
    return {**seanet_names(shapes, layout), "quantizer/codebooks": codebooks}


def seanet_names(shapes: Mapping[str, tuple[int, ...]], layout: str) -> Names:
    """Of the paths given, upstream's names and forms for those of a SEANet's encoder and decoder.

    Upstream numbers all layers of each, the activations too: conv_in, of each stage the residual units and an
    activation and a convolution (of the decoder these first), and at last an activation and conv_out; the LSTM comes
    next to the widest end.
    """
    found = {}
    for path in shapes:
        if not path.startswith(("encoder/", "decoder/")):
            continue
        part, module, *inner, leaf = path.split("/")
        layer = f"{part}.{'layers' if layout == 'hf' else 'model'}.{_layer_index(part, module, inner, shapes)}"
        if module == "lstm":
            suffix, form = _LSTM[leaf]
            found[path] = f"{layer}.lstm.{suffix}_{inner[0].replace('layer_', 'l')}", form
            continue
        inside = _INNER[inner[-1]] if len(inner) == 2 else ""
        is_up = inner == ["up"]
        conv = "conv_transpose" if is_up else "conv"
        outer = "" if layout == "hf" else "convtr." if is_up else "conv."
        kind = "norm" if leaf.startswith("norm_") else "convtr" if outer == "convtr." else "conv"
        found[path] = f"{layer}.{inside}{outer}{kind}.{_LEAVES[leaf]}", conv if leaf == "kernel" else "same"
    return found


def _layer_index(part: str, module: str, inner: list[str], shapes: Mapping[str, tuple[int, ...]]) -> int:
    paths = [path.split("/") for path in shapes if path.startswith(f"{part}/")]
    num_stages = len({path[1] for path in paths if path[1].startswith("stage_")})
    num_units = len({path[2] for path in paths if path[1] == "stage_0" and path[2].startswith("unit_")})
    has_lstm = any(path[1] == "lstm" for path in paths)
    before = 1 + (has_lstm and part == "decoder")
    if not module.startswith("stage_"):
        last = 1 + has_lstm + num_stages * (num_units + 2) + 1
        return {"conv_in": 0, "lstm": 1 if part == "decoder" else last - 2, "conv_out": last}[module]
    first = before + int(module.removeprefix("stage_")) * (num_units + 2)
    if inner[0].startswith("unit_"):
        return first + (2 if part == "decoder" else 0) + int(inner[0].removeprefix("unit_"))
    return first + (num_units + 1 if inner[0] == "down" else 1)


def fold(tensors: Tensors, where: str) -> dict[str, StoredTensor]:
    """A file's tensors with weight norm folded, the LSTM's two biases as one, and without training's statistics.

    Raises:
      ConvertError: a half of a weight or bias is missing, or a codebook was never begun.
    """
    folded, biases = {}, {}
    for name, tensor in fold_weight_norm(tensors, where).items():
        if statistic := _STATISTICS.fullmatch(name):
            if statistic[2] == "inited" and not tensor.read().all():
                raise ConvertError(f"{where}: {name} is {tensor.read()}: this codebook was never trained")
        elif bias := re.fullmatch(r"(.+\.lstm\.bias)_(?:ih|hh)(_l\d+)", name):
            biases.setdefault(bias[1] + bias[2], {})[name] = tensor
        else:
            folded[name] = tensor
    for name, pair in biases.items():
        shapes = {half: tensor.shape for half, tensor in pair.items()}
        if len(pair) != 2 or len(set(shapes.values())) != 1:
            raise ConvertError(f"{where}: expected two biases of one shape, bias_ih and bias_hh, got {shapes}")
        put(folded, name, _sum(*pair.values()), where)
    return folded


def _sum(one: StoredTensor, other: StoredTensor) -> StoredTensor:
    return StoredTensor(one.shape, one.dtype, lambda: one.read().astype(np.float32) + other.read().astype(np.float32))


def unfold(tensors: Tensors, values: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors that transformers' model with this config has, of which `fold` makes these again.

    Args:
      tensors: folded, by HuggingFace's names.
      values: HuggingFace's config.
    """
    unfolded, weight_norm = {}, values["norm_type"] == "weight_norm"
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "embed":
            ones = np.ones(tensor.shape[0], np.float32)
            begun = np.ones(1, np.float32)
            statistics = {"inited": in_memory(begun), "cluster_size": in_memory(ones), "embed_avg": tensor}
            unfolded |= {name: tensor} | {f"{module}.{key}": value for key, value in statistics.items()}
        elif re.fullmatch(r"bias_l\d+", leaf):
            zeros = in_memory(np.zeros(tensor.shape, np.float32))
            unfolded |= {f"{module}.bias_ih{leaf[4:]}": tensor, f"{module}.bias_hh{leaf[4:]}": zeros}
        elif weight_norm and name.endswith(".conv.weight"):
            halves = split_weight_norm(tensor.read())
            original = f"{module}.parametrizations.weight.original"
            unfolded |= {f"{original}{half}": in_memory(array) for half, array in enumerate(halves)}
        else:
            unfolded[name] = tensor
    return unfolded


def seanet_config(found: Mapping[str, Any], where: str, **others: Any) -> SEANetConfig:
    """Our encoder and decoder from the values of `SEANET_FIELDS`."""
    growth, count = found["dilation_growth_rate"], found["num_residual_layers"]
    return SEANetConfig(
        channels=found["audio_channels"],
        num_filters=found["num_filters"],
        embed_dim=found["hidden_size"],
        strides=tuple(found["upsampling_ratios"][::-1]),
        dilations=tuple(growth**unit for unit in range(count)),
        kernel_size=found["kernel_size"],
        last_kernel_size=found["last_kernel_size"],
        residual_kernel_size=found["residual_kernel_size"],
        compress=found["compress"],
        conv_shortcut=found["use_conv_shortcut"],
        causal=found["use_causal_conv"],
        pad_mode=one_of(_PAD_MODES, "pad_mode", found["pad_mode"], where),
        **others,
    )


def seanet_fields(config: SEANetConfig) -> dict[str, Any]:
    """HuggingFace's values of `SEANET_FIELDS` for our encoder and decoder."""
    return {
        "audio_channels": config.channels,
        "num_filters": config.num_filters,
        "num_residual_layers": len(config.dilations),
        "upsampling_ratios": list(config.strides[::-1]),
        "kernel_size": config.kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "residual_kernel_size": config.residual_kernel_size,
        "dilation_growth_rate": config.dilations[1] if len(config.dilations) > 1 else 2,
        "use_causal_conv": config.causal,
        "pad_mode": next(hf for hf, ours in _PAD_MODES.items() if ours == config.pad_mode),
        "compress": config.compress,
        "hidden_size": config.embed_dim,
        "use_conv_shortcut": config.conv_shortcut,
        "trim_right_ratio": 1.0,
    }


def read_config(values: Mapping[str, Any], where: str) -> EnCodecConfig:
    """Our config from HuggingFace's.

    Raises:
      ConvertError: it describes a net that ours cannot be.
    """
    found = fields(values, _FIELDS, where)
    require(values, {"trim_right_ratio": 1.0, "normalize": found["chunk_length_s"] is not None}, where)
    norm = one_of(_NORMS, "norm_type", found["norm_type"], where)
    seanet = seanet_config(found, where, norm=norm, num_lstm_layers=found["num_lstm_layers"])
    bits = math.ceil(math.log2(found["codebook_size"]))
    frame_rate = math.ceil(found["sampling_rate"] / seanet.hop_length)
    bandwidths = tuple(map(float, found["target_bandwidths"]))
    num_codebooks = int(1000 * bandwidths[-1] // (frame_rate * bits))
    rvq = RVQConfig(
        num_codebooks, found["codebook_size"], found["codebook_dim"] or found["hidden_size"], found["hidden_size"]
    )
    segments = {"segment_s": None if found["chunk_length_s"] is None else float(found["chunk_length_s"])}
    if found["overlap"] is not None:
        segments["segment_overlap"] = float(found["overlap"])
    return EnCodecConfig(found["sampling_rate"], seanet, rvq, bandwidths, **segments)


def hf_config(config: EnCodecConfig) -> dict[str, Any]:
    """HuggingFace's config."""
    return {
        "architectures": ["EncodecModel"],
        "model_type": "encodec",
        **seanet_fields(config.seanet),
        "target_bandwidths": list(config.bandwidths) or [_kbps(config)],
        "sampling_rate": config.sample_rate,
        "normalize": config.segment_s is not None,
        "chunk_length_s": config.segment_s,
        "overlap": None if config.segment_s is None else config.segment_overlap,
        "norm_type": next(hf for hf, ours in _NORMS.items() if ours == config.seanet.norm),
        "num_lstm_layers": config.seanet.num_lstm_layers,
        "codebook_size": config.codebook_size,
        "codebook_dim": config.rvq.codebook_dim,
    }


def _kbps(config: EnCodecConfig) -> float:
    """Of all codebooks, so that transformers finds as many in it."""
    level = math.ceil(math.log2(config.codebook_size)) * math.ceil(config.sample_rate / config.hop_length)
    kbps = config.num_codebooks * level / 1000
    return kbps if 1000 * kbps // level == config.num_codebooks else math.nextafter(kbps, math.inf)


def guess_config(tensors: Tensors) -> EnCodecConfig:
    """Our config for a file of the repository `encodec`, which says nothing: of its two models, that of such norms."""
    has_norms = any(name.endswith(".conv.norm.weight") for name in tensors)
    return PRESETS["encodec_48khz" if has_norms else "encodec_24khz"]


def read_run(run: Mapping[str, Any], where: str) -> EnCodecConfig:
    """Our config from the config of an audiocraft run.

    Raises:
      ConvertError: it is not of an EnCodec, or describes a net that ours cannot be.
    """
    missing = {"encodec", "seanet", "rvq", "sample_rate"} - run.keys()
    if missing:
        raise ConvertError(f"{where}: expected the config of an EnCodec, but it has no {', '.join(sorted(missing))}")
    net, rvq = run["seanet"], run["rvq"]
    require(run, {"compression_model": "encodec"}, where)
    require(run["encodec"], {"autoencoder": "seanet", "quantizer": "rvq", "renormalize": False}, where)
    require(net, {"activation": "ELU", "activation_params": {"alpha": 1.0}, "disable_norm_outer_blocks": 0}, where)
    require(net.get("decoder") or {}, {"trim_right_ratio": 1.0, "final_activation": None}, where)
    values = {hf: net[name] for hf, name in SEANET_ARGUMENTS.items() if name in net}
    values |= {"use_conv_shortcut": not net.get("true_skip", True), "num_lstm_layers": net.get("lstm", 0)}
    values |= {"norm_type": net.get("norm", "weight_norm"), "sampling_rate": run["sample_rate"]}
    config = read_config(values | {"codebook_size": rvq.get("bins", 1024)}, where)
    config = dataclasses.replace(config, rvq=dataclasses.replace(config.rvq, num_codebooks=rvq["n_q"]))
    return dataclasses.replace(config, bandwidths=(_kbps(config),))
