"""Tokenizer files of Whisper checkpoints: what they hold, and the pair of files that we write."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

from jaxaudio.data.byte_pair import (
    BytePairEncoding,
    from_tiktoken,
    from_tokenizer_json,
    from_vocab_merges,
    read_json,
    to_vocab_merges,
)
from jaxaudio.data.files import atomic_path


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What files say about a tokenizer.

    Attributes:
        path: The file or folder, for messages.
        bpe: The byte pairs.
        added_tokens: Tokens beyond the byte pairs to their ids; old files do not list all of them.
        is_multilingual: None if no file says.
    """

    path: pathlib.Path
    bpe: BytePairEncoding
    added_tokens: dict[str, int]
    is_multilingual: bool | None


def read_folder(folder: str | os.PathLike) -> TokenizerFiles:
    """Reads the tokenizer files of a checkpoint's folder; see `WhisperTokenizer.from_folder`."""
    folder = pathlib.Path(folder)
    tiktoken_files = sorted(folder.glob("*.tiktoken"))
    if (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        bpe, added = from_tokenizer_json(path), _added_in_tokenizer_json(path)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        path = folder / "vocab.json"
        bpe, added = from_vocab_merges(path, folder / "merges.txt"), {}
    elif len(tiktoken_files) == 1:
        path = tiktoken_files[0]
        bpe, added = from_tiktoken(path), {}
    else:
        raise FileNotFoundError(
            f"{folder} should hold tokenizer.json, or vocab.json and merges.txt, or one .tiktoken file; its files are "
            f"{sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else 'none: it is no folder'}."
        )
    if (folder / "added_tokens.json").exists():
        added |= read_json(folder / "added_tokens.json")
    is_multilingual = None
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            content = read_json(folder / name)
            is_multilingual = content.get("is_multilingual", is_multilingual)
            listed = content.get("added_tokens_decoder", {})
            added |= {entry["content"]: int(token) for token, entry in listed.items()}
    return TokenizerFiles(path, bpe, added, is_multilingual)


def read_file(path: str | os.PathLike) -> TokenizerFiles:
    """Reads one file; see `WhisperTokenizer.from_file`.

    Raises:
        ValueError: The file is neither `.json` nor `.tiktoken`; has its path.
    """
    path = pathlib.Path(path)
    if path.suffix == ".json":
        return TokenizerFiles(path, from_tokenizer_json(path), _added_in_tokenizer_json(path), None)
    if path.suffix == ".tiktoken":
        return TokenizerFiles(path, from_tiktoken(path), {}, None)
    raise ValueError(f"{path}: expected a tokenizer.json or a .tiktoken file.")


def _added_in_tokenizer_json(path: pathlib.Path) -> dict[str, int]:
    return {entry["content"]: entry["id"] for entry in read_json(path).get("added_tokens", [])}


def write_folder(
    folder: str | os.PathLike,
    bpe: BytePairEncoding,
    special_tokens: Mapping[str, int],
    timestamp_begin: int,
    is_multilingual: bool,
):
    """Writes `tokenizer.json` and `tokenizer_config.json`.

    As in the published files, times are added tokens that are not special: transformers finds the first time by that.
    """
    vocab, merges = to_vocab_merges(bpe)
    added = [
        {
            "id": token,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token < timestamp_begin,
        }
        for name, token in special_tokens.items()
    ]
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": [f"{left} {right}" for left, right in merges],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": words,
        "model": model,
    }
    end, *others = (name for name, token in special_tokens.items() if token < timestamp_begin)
    config = {
        "tokenizer_class": "WhisperTokenizer",
        "add_prefix_space": False,
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "additional_special_tokens": others,
        "clean_up_tokenization_spaces": False,
        "is_multilingual": is_multilingual,
    }
    folder = pathlib.Path(folder)
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        with atomic_path(folder / name) as path:
            path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
