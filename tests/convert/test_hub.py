"""Sizes and hub ids: which repository and files are asked for, what a failure says."""

import fnmatch
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import whisper_peers
from huggingface_hub.errors import LocalEntryNotFoundError
from whisper_small import BYTES, SMALL

from jaxaudio.convert import hub
from jaxaudio.convert.whisper import ConvertError, load_whisper

PUBLISHED = [
    "README.md", "flax_model.msgpack", "model.fp32-00001-of-00002.safetensors", "onnx/config.json", "tf_model.h5",
    "pytorch_model.bin",
]  # fmt: skip


class FakeHub:
    """Stands for huggingface_hub: one repository, of which it "downloads" the files that are allowed."""

    def __init__(self, source: pathlib.Path, cache: pathlib.Path):
        self.source, self.cache, self.asked = source, cache, []

    def snapshot_download(self, repo_id, *, allow_patterns):
        self.asked.append(repo_id)
        self.cache.mkdir(exist_ok=True)
        for file in self.source.rglob("*"):
            name = file.relative_to(self.source).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).write_bytes(file.read_bytes())
        return str(self.cache)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    source = tmp_path / "repository"
    whisper_peers.make_hf(1, SMALL, BYTES.eot).save_pretrained(source)
    BYTES.save(source)
    (source / "onnx").mkdir()
    for name in PUBLISHED:
        (source / name).write_text("other formats")
    fake = FakeHub(source, tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


@pytest.mark.parametrize(
    ("source", "repository"),
    [
        ("tiny", "openai/whisper-tiny"),
        ("base.en", "openai/whisper-base.en"),
        ("large-v1", "openai/whisper-large"),
        ("large-v2", "openai/whisper-large-v2"),
        ("large", "openai/whisper-large-v3"),
        ("turbo", "openai/whisper-large-v3-turbo"),
        ("large-v3-turbo", "openai/whisper-large-v3-turbo"),
        ("distil-whisper/distil-small.en", "distil-whisper/distil-small.en"),
    ],
)
def test_names_become_repositories(source, repository, fake_hub):
    checkpoint = load_whisper(source)
    assert fake_hub.asked == [repository]
    expected = load_whisper(fake_hub.source)
    np.testing.assert_array_equal(
        checkpoint.params["decoder"]["token_embedding"], expected.params["decoder"]["token_embedding"]
    )
    fetched = {path.name for path in fake_hub.cache.iterdir()}
    assert fetched == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


def test_a_repository_without_safetensors(fake_hub):
    state = whisper_peers.make_hf(1, SMALL, BYTES.eot).state_dict()
    (fake_hub.source / "model.safetensors").unlink()
    torch.save(state, fake_hub.source / "pytorch_model.bin")
    checkpoint = load_whisper("someone/whisper-mine")
    assert fake_hub.asked == ["someone/whisper-mine"] * 2
    expected = state["model.decoder.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(checkpoint.params["decoder"]["token_embedding"], expected)


def test_a_local_folder_goes_first(fake_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_hub.source.rename(tmp_path / "tiny")
    load_whisper("tiny")
    assert fake_hub.asked == []


def test_names_that_are_nothing(tmp_path):
    for name in ("huge", "a/b/c", "./model/tiny", "with space/x", str(tmp_path / "absent")):
        with pytest.raises(
            ConvertError, match=r"is no file or folder, no id .* and no size; the sizes are tiny, tiny\.en"
        ):
            load_whisper(name)


def test_without_network(monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot reach the Hub\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = (
        r"'openai/whisper-tiny' is no local path, .*\(LocalEntryNotFoundError: cannot reach the Hub\).*give the path"
    )
    with pytest.raises(ConvertError, match=message):
        load_whisper("tiny")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConvertError, match=r"'openai/whisper-tiny'.*pip install huggingface_hub.*give the path"):
        load_whisper("tiny")


def test_offline_the_cache_is_used(tmp_path):
    """The real huggingface_hub, in a process that must not look further than its cache."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--openai--whisper-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    code = (
        "from jaxaudio.convert.hub import fetch_folder\n"
        "from jaxaudio.convert.tensors import ConvertError\n"
        "print(fetch_folder('openai/whisper-tiny', ['config.json', 'model.safetensors']))\n"
        "try:\n"
        "    fetch_folder('openai/whisper-base', ['config.json'])\n"
        "except ConvertError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    root = pathlib.Path(hub.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    found, error = done.stdout.strip().split("\n")
    assert pathlib.Path(found) == snapshot
    assert "'openai/whisper-base' is no local path" in error
    assert "HF_HUB_OFFLINE" in error
