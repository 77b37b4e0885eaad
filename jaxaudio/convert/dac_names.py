"""DAC's parameters by their names here, in HuggingFace's folders and in Descript's files, and its config there.

Descript's `weights.pth` holds {"metadata": {"kwargs": arguments}, "state_dict": tensors}, each weight split into length
and direction; HuggingFace's folders come with whole weights or split.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxaudio.convert.codec_tensors import Names, Tensors, fold_weight_norm
from jaxaudio.convert.tensors import ConvertError, StoredTensor
from jaxaudio.convert.upstream_config import fields, require
from jaxaudio.models.dac import PRESETS, DACConfig

# HuggingFace's fields with their defaults there, and Descript's arguments for the same.
_FIELDS = {
    "encoder_hidden_size": 64,
    "downsampling_ratios": [2, 4, 8, 8],
    "decoder_hidden_size": 1536,
    "n_codebooks": 9,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "sampling_rate": 16000,
}
_ARGUMENTS = {
    "encoder_dim": "encoder_hidden_size",
    "encoder_rates": "downsampling_ratios",
    "decoder_dim": "decoder_hidden_size",
    "n_codebooks": "n_codebooks",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "sample_rate": "sampling_rate",
}

# Of a residual unit: (Descript's, HuggingFace's).
_UNIT = {"snake_1": ("0", "snake1"), "conv_1": ("1", "conv1"), "snake_2": ("2", "snake2"), "conv_2": ("3", "conv2")}
# Of a stage: HuggingFace's.
_STAGE = {"snake": "snake1", "down": "conv1", "up": "conv_t1"}
# Behind the stages, as an offset to their number.
_LAST = {"snake": (1, "snake1"), "conv_out": (2, "conv2")}
_LEAVES = {"kernel": "weight", "bias": "bias", "alpha": "alpha"}
_QUANTIZER = {
    "codebooks": ("codebook.weight", "same"),
    "in_kernel": ("in_proj.weight", "pointwise"),
    "in_bias": ("in_proj.bias", "same"),
    "out_kernel": ("out_proj.weight", "pointwise"),
    "out_bias": ("out_proj.bias", "same"),
}


def names(shapes: Mapping[str, tuple[int, ...]], layout: str) -> Names:
    """Upstream's names and forms of the parameters with these paths and shapes."""
    found = {}
    for path, shape in shapes.items():
        part, *modules, leaf = path.split("/")
        if part == "quantizer":
            name, form = _QUANTIZER[leaf]
            found[path] = tuple(f"quantizer.quantizers.{level}.{name}" for level in range(shape[0])), form
            continue
        convolution = "conv_transpose" if modules[-1] == "up" else "conv"
        form = {"kernel": convolution, "bias": "same", "alpha": "channels"}[leaf]
        module = _hf_module(part, modules) if layout == "hf" else _descript_module(part, modules, shapes)
        found[path] = f"{module}.{_LEAVES[leaf]}", form
    return found


def _hf_module(part: str, modules: list[str]) -> str:
    if modules == ["conv_in"]:
        return f"{part}.conv1"
    if modules[0] in _LAST:
        return f"{part}.{_LAST[modules[0]][1]}"
    stage = f"{part}.block.{modules[0].removeprefix('stage_')}"
    if modules[1].startswith("unit_"):
        return f"{stage}.res_unit{int(modules[1].removeprefix('unit_')) + 1}.{_UNIT[modules[2]][1]}"
    return f"{stage}.{_STAGE[modules[1]]}"


def _descript_module(part: str, modules: list[str], shapes: Mapping[str, Any]) -> str:
    root = {"encoder": "encoder.block", "decoder": "decoder.model"}[part]
    num_stages = len({path.split("/")[1] for path in shapes if path.startswith(f"{part}/stage_")})
    if modules == ["conv_in"]:
        return f"{root}.0"
    if modules[0] in _LAST:
        return f"{root}.{num_stages + _LAST[modules[0]][0]}"
    stage = f"{root}.{int(modules[0].removeprefix('stage_')) + 1}.block"
    num_units = len({path.split("/")[2] for path in shapes if path.startswith(f"{part}/stage_0/unit_")})
    first, behind = (0, num_units) if part == "encoder" else (2, 0)
    if modules[1].startswith("unit_"):
        return f"{stage}.{first + int(modules[1].removeprefix('unit_'))}.block.{_UNIT[modules[2]][0]}"
    return f"{stage}.{behind + (modules[1] != 'snake')}"


def fold(tensors: Tensors, where: str) -> dict[str, StoredTensor]:
    """A file's tensors with weight norm folded."""
    return fold_weight_norm(tensors, where)


def unfold(tensors: Tensors, values: Mapping[str, Any]) -> Tensors:
    """The tensors that transformers' model has, which keeps whole weights."""
    return tensors


def read_config(values: Mapping[str, Any], where: str) -> DACConfig:
    """Our config from HuggingFace's.

    Raises:
      ConvertError: it describes a net that ours cannot be.
    """
    found = fields(values, _FIELDS, where)
    strides = tuple(found["downsampling_ratios"])
    embed_dim = found["encoder_hidden_size"] * 2 ** len(strides)
    filters, rest = divmod(found["decoder_hidden_size"], 2 ** len(strides))
    if rest:
        raise ConvertError(f"{where}: {len(strides)} stages cannot halve {found['decoder_hidden_size']} channels each")
    require(values, {"hidden_size": embed_dim, "upsampling_ratios": list(strides[::-1])}, where)
    preset = PRESETS["dac_44khz"]
    return DACConfig(
        found["sampling_rate"],
        dataclasses.replace(
            preset.seanet,
            num_filters=found["encoder_hidden_size"],
            decoder_filters=filters,
            embed_dim=embed_dim,
            strides=strides,
        ),
        dataclasses.replace(
            preset.rvq,
            num_codebooks=found["n_codebooks"],
            codebook_size=found["codebook_size"],
            codebook_dim=found["codebook_dim"],
            embed_dim=embed_dim,
        ),
    )


def read_arguments(arguments: Mapping[str, Any], where: str) -> DACConfig:
    """Our config from the arguments in one of Descript's files.

    Raises:
      ConvertError: an argument is missing, or they describe a net that ours cannot be.
    """
    missing = _ARGUMENTS.keys() - arguments.keys()
    if missing:
        raise ConvertError(f"{where}: expected the arguments {', '.join(sorted(missing))}, got {dict(arguments)}")
    values = {hf: arguments[name] for name, hf in _ARGUMENTS.items()}
    latent = {} if arguments.get("latent_dim") is None else {"hidden_size": arguments["latent_dim"]}
    decoder = {"upsampling_ratios": arguments["decoder_rates"]} if "decoder_rates" in arguments else {}
    return read_config(values | latent | decoder, where)


def hf_config(config: DACConfig) -> dict[str, Any]:
    """HuggingFace's config."""
    seanet, rvq = config.seanet, config.rvq
    return {
        "architectures": ["DacModel"],
        "model_type": "dac",
        "encoder_hidden_size": seanet.num_filters,
        "downsampling_ratios": list(seanet.strides),
        "decoder_hidden_size": (seanet.decoder_filters or seanet.num_filters) * 2 ** len(seanet.strides),
        "n_codebooks": rvq.num_codebooks,
        "codebook_size": rvq.codebook_size,
        "codebook_dim": rvq.codebook_dim,
        "sampling_rate": config.sample_rate,
        "upsampling_ratios": list(seanet.strides[::-1]),
        "hidden_size": seanet.embed_dim,
        "hop_length": config.hop_length,
    }
