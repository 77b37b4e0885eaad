"""Writes checkpoints of codecs, whole or not at all: folders of ours, and HuggingFace's."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxaudio.config import to_dict
from jaxaudio.convert.codec_read import TABLES, CodecFile, Kind, parameters
from jaxaudio.convert.folders import PARAMETERS, SAFETENSORS_FILES, TORCH_FILES, whole_folder, write_json
from jaxaudio.convert.tensors import ConvertError, StoredTensor, write_safetensors
from jaxaudio.nn.codec import CodecConfig

_PREPROCESSOR = "preprocessor_config.json"
_REPLACEABLE = (
    "config.json", _PREPROCESSOR, *SAFETENSORS_FILES, *TORCH_FILES, PARAMETERS, "README.md", ".gitattributes",
)  # fmt: skip


def write_ours(folder: pathlib.Path, file: CodecFile, *, overwrite: bool = False) -> None:
    """Writes a folder of ours.

    Raises:
      ConvertError: the folder exists and is not to be overwritten, or holds other things than a checkpoint.
    """
    with whole_folder(folder, overwrite, _REPLACEABLE) as temporary:
        values = {"kind": file.kind, "name": file.name, "config": to_dict(file.config)}
        write_json(temporary / "config.json", values)
        write_safetensors(temporary / PARAMETERS, file.tensors)


def write_hf(folder: pathlib.Path, file: CodecFile, *, overwrite: bool = False) -> None:
    """Writes a folder that transformers' `from_pretrained` loads; what training kept of codebooks is not in it.

    Raises:
      ConvertError: as `write_ours`, or transformers has no such model.
    """
    if file.kind not in TABLES:
        raise ConvertError(f"transformers has no {file.kind}; it has {', '.join(TABLES)}")
    values = _hf_config(file.kind, file.config)
    tensors: dict[str, StoredTensor] = {}
    for parameter in parameters(file.kind, file.config, "hf"):
        tensors |= parameter.to_upstream(file.tensors[parameter.path].read())
    with whole_folder(folder, overwrite, _REPLACEABLE) as temporary:
        write_json(temporary / "config.json", values)
        write_json(temporary / _PREPROCESSOR, _hf_preprocessor_config(file.kind, file.config))
        tensors = TABLES[file.kind].unfold(tensors, values)
        # transformers refuses safetensors whose metadata do not say so.
        write_safetensors(temporary / "model.safetensors", tensors, {"format": "pt"})


def _hf_config(kind: Kind, config: CodecConfig) -> dict[str, Any]:
    """transformers' config of it, which must give ours again."""
    table = TABLES[kind]
    values = {**table.hf_config(config), "dtype": "float32"}
    back = table.read_config(values, "config.json")
    # What transformers has no word for: any bandwidth, and how we compute.
    seanet = dataclasses.replace(back.seanet, dtype=config.seanet.dtype)
    back = dataclasses.replace(back, seanet=seanet, bandwidths=config.bandwidths)
    if back != config:
        raise ConvertError(f"transformers has no {kind} with {config}; the nearest is {back}")
    return values


def _hf_preprocessor_config(kind: Kind, config: CodecConfig) -> Mapping[str, Any]:
    """transformers' front-end."""
    values = {
        "feature_extractor_type": "DacFeatureExtractor" if kind == "dac" else "EncodecFeatureExtractor",
        "feature_size": config.channels,
        "sampling_rate": config.sample_rate,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }
    if kind == "dac":
        return values | {"hop_length": config.hop_length}
    segments = kind == "encodec" and config.segment_s is not None
    overlap = config.segment_overlap if segments else None
    return values | {"chunk_length_s": config.segment_s if segments else None, "overlap": overlap}
