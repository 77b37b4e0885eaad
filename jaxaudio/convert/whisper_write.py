"""Writes Whisper checkpoints, whole or not at all: HuggingFace's folders, OpenAI's .pt files, folders of our own."""

import fnmatch
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from jaxaudio.config import to_dict
from jaxaudio.convert import whisper_names
from jaxaudio.convert.folders import (
    PARAMETERS,
    SAFETENSORS_FILES,
    TORCH_FILES,
    exists_error,
    whole_folder,
    write_json,
)
from jaxaudio.convert.tensors import StoredTensor, write_safetensors
from jaxaudio.convert.torch_files import write_torch
from jaxaudio.convert.whisper_names import Layout
from jaxaudio.convert.whisper_read import CONFIG_FILES, HEAD, TOKENIZER_FILES, Checkpoint
from jaxaudio.data.files import atomic_path
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.models.whisper import FRAME_RATE, HOP_LENGTH, N_FFT, SAMPLE_RATE, WhisperConfig

_OURS = (PARAMETERS, f"{PARAMETERS}.json")
_REPLACEABLE = (
    *CONFIG_FILES,
    *TOKENIZER_FILES,
    *SAFETENSORS_FILES,
    *TORCH_FILES,
    *_OURS,
    "README.md",
    ".gitattributes",
)


def write_openai(path: pathlib.Path, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Writes a .pt file that openai-whisper loads.

    Raises:
      ConvertError: the file exists and is not to be overwritten, or torch is absent.
    """
    if path.exists() and not overwrite:
        raise exists_error(path)
    config = checkpoint.config
    dims = {
        "n_mels": config.num_mels,
        "n_vocab": config.vocab_size,
        "n_audio_ctx": config.num_positions,
        "n_audio_state": config.embed_dim,
        "n_audio_head": config.num_heads,
        "n_audio_layer": config.num_encoder_layers,
        "n_text_ctx": config.text_length,
        "n_text_state": config.embed_dim,
        "n_text_head": config.num_heads,
        "n_text_layer": config.num_decoder_layers,
    }
    with atomic_path(path) as temporary:
        write_torch(temporary, {"dims": dims}, "model_state_dict", _to_upstream(checkpoint, "openai"))


def write_hf(
    folder: pathlib.Path,
    checkpoint: Checkpoint,
    tokenizer: WhisperTokenizer,
    *,
    kept: Sequence[pathlib.Path] = (),
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers' `from_pretrained` loads.

    Args:
      folder: to write.
      checkpoint: the model; what its `hf_config` says beyond the sizes is said again.
      tokenizer: its vocabulary.
      kept: files to copy into the folder: the tokenizer's, generation_config.json and preprocessor_config.json. Those
        that are not given are written.
      overwrite: whether a checkpoint in that folder is replaced.
    Raises:
      ConvertError: the folder exists and is not to be overwritten, or holds other things than a checkpoint.
    """
    tensors = _to_upstream(checkpoint, "hf")
    if checkpoint.has_head:
        tensors[HEAD] = tensors["model.decoder.embed_tokens.weight"]
    with whole_folder(folder, overwrite, _REPLACEABLE) as temporary:
        _write_companions(temporary, kept, tokenizer)
        # transformers refuses safetensors whose metadata do not say so.
        write_safetensors(temporary / "model.safetensors", tensors, {"format": "pt"})
        write_json(temporary / "config.json", _hf_config(checkpoint, tokenizer))
        generation = temporary / "generation_config.json"
        if generation.exists():
            values = json.loads(generation.read_text(encoding="utf-8"))
        else:
            values = _hf_generation_config(checkpoint.config, tokenizer)
        heads = checkpoint.config.alignment_heads
        values.pop("alignment_heads", None)
        write_json(generation, values | ({} if heads is None else {"alignment_heads": [list(head) for head in heads]}))
        if not (temporary / "preprocessor_config.json").exists():
            write_json(temporary / "preprocessor_config.json", _hf_preprocessor_config(checkpoint.config))


def write_ours(
    folder: pathlib.Path,
    checkpoint: Checkpoint,
    tokenizer: WhisperTokenizer,
    *,
    kept: Sequence[pathlib.Path] = (),
    overwrite: bool = False,
) -> None:
    """Writes a folder of our own: parameters.safetensors with our paths, config.json and the tokenizer's files.

    Args and Raises: as `write_hf`.
    """
    values: dict[str, Any] = {"model": to_dict(checkpoint.config)}
    if checkpoint.hf_config is not None:
        values["huggingface"] = {"config": checkpoint.hf_config, "has_head": checkpoint.has_head}
    with whole_folder(folder, overwrite, _REPLACEABLE) as temporary:
        _write_companions(temporary, kept, tokenizer)
        write_safetensors(temporary / PARAMETERS, checkpoint.tensors)
        write_json(temporary / "config.json", values)


def _write_companions(folder: pathlib.Path, kept: Sequence[pathlib.Path], tokenizer: WhisperTokenizer) -> None:
    """Copies the files to keep, and writes the tokenizer where it is not among them."""
    for file in kept:
        shutil.copyfile(file, folder / file.name)
    if not any(fnmatch.fnmatch(file.name, pattern) for file in kept for pattern in TOKENIZER_FILES):
        tokenizer.save(folder)


def _to_upstream(checkpoint: Checkpoint, layout: Layout) -> dict[str, StoredTensor]:
    parameters = whisper_names.parameters(checkpoint.config)
    return {p.name(layout): p.to_upstream(checkpoint.tensors[p.path]) for p in parameters}


def _hf_config(checkpoint: Checkpoint, tokenizer: WhisperTokenizer) -> dict[str, Any]:
    """transformers' config: what its folder said, if the checkpoint came from one, and the model's sizes."""
    config = checkpoint.config
    said = checkpoint.hf_config or {
        "architectures": ["WhisperForConditionalGeneration"],
        "is_encoder_decoder": True,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "pad_token_id": tokenizer.eot,
        "decoder_start_token_id": tokenizer.sot,
        "begin_suppress_tokens": [*tokenizer.blank_tokens, tokenizer.eot],
        "dtype": checkpoint.dtype,
    }
    return {
        **said,
        "model_type": "whisper",
        "vocab_size": config.vocab_size,
        "num_mel_bins": config.num_mels,
        "d_model": config.embed_dim,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": 4 * config.embed_dim,
        "decoder_ffn_dim": 4 * config.embed_dim,
        "max_source_positions": config.num_positions,
        "max_target_positions": config.text_length,
    }


def _hf_generation_config(config: WhisperConfig, tokenizer: WhisperTokenizer) -> dict[str, Any]:
    """What transformers' `generate` needs to know of the vocabulary."""
    never_text = ("sot", "translate", "transcribe", "sot_lm", "sot_prev", "no_speech")
    values = {
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "pad_token_id": tokenizer.eot,
        "decoder_start_token_id": tokenizer.sot,
        "prev_sot_token_id": tokenizer.sot_prev,
        "no_timestamps_token_id": tokenizer.no_timestamps,
        "max_initial_timestamp_index": 50,
        "max_length": config.text_length,
        "return_timestamps": False,
        "begin_suppress_tokens": [*tokenizer.blank_tokens, tokenizer.eot],
        "suppress_tokens": sorted({*tokenizer.non_speech_tokens, *(getattr(tokenizer, name) for name in never_text)}),
        "is_multilingual": tokenizer.is_multilingual,
    }
    if tokenizer.is_multilingual:
        values["lang_to_id"] = {f"<|{code}|>": token for code, token in tokenizer.language_ids.items()}
        values["task_to_id"] = {"transcribe": tokenizer.transcribe, "translate": tokenizer.translate}
    return values


def _hf_preprocessor_config(config: WhisperConfig) -> dict[str, Any]:
    """transformers' front-end, the same as ours."""
    seconds, rest = divmod(config.num_frames, FRAME_RATE)
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": config.num_mels,
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP_LENGTH,
        "n_fft": N_FFT,
        "chunk_length": seconds if rest == 0 else config.num_frames / FRAME_RATE,
        "n_samples": config.num_frames * HOP_LENGTH,
        "nb_max_frames": config.num_frames,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
