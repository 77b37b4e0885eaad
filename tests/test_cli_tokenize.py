import json

import pytest
import tiny_codec

from jaxaudio import cli
from jaxaudio.convert.codec import save_codec
from jaxaudio.data.manifests import Utterance, write_manifest
from jaxaudio.data.token_dataset import TokenDataset


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec") / "tiny"
    save_codec(tiny_codec.make_codec(), folder)
    return str(folder)


@pytest.fixture
def manifest(tmp_path):
    paths = tiny_codec.write_recordings(tmp_path, (810, 833, 870))
    write_manifest(
        [Utterance(path, text="text", id=f"id {i}") for i, path in enumerate(paths)], tmp_path / "list.jsonl"
    )
    return str(tmp_path / "list.jsonl")


def run(*arguments):
    return cli.main(["tokenize", *arguments, "--compilation_cache", "None"])


@pytest.mark.parametrize(("rate", "num_codebooks"), [([], 4), (["--kbps", "3.2"], 2), (["--num_codebooks", "4"], 4)])
def test_a_list_becomes_a_dataset(codec, manifest, tmp_path, capsys, rate, num_codebooks):
    out = str(tmp_path / "out")
    assert run(manifest, out, "--codec", codec, "--batch_size", "3", *rate) == 0
    printed = capsys.readouterr().out
    assert f"{num_codebooks} codebooks of tiny, 0.3 s encoded now" in printed
    assert "3 clips, 127 frames, 0 failed" in printed
    dataset = TokenDataset(out)
    assert [clip.codes.shape for clip in dataset] == [(num_codebooks, frames) for frames in (41, 42, 44)]
    assert dataset[1].utterance == Utterance("1.wav", text="text", id="id 1")

    assert run(manifest, out, "--codec", codec, *rate) == 0
    assert "0.0 s encoded now" in capsys.readouterr().out
    assert run(manifest, out, "--codec", codec, "--num_codebooks", "1") == 1
    assert f"num_codebooks {num_codebooks} there, 1 now" in capsys.readouterr().err


def test_what_fails_is_reported_and_the_others_go_on(codec, manifest, tmp_path, capsys):
    (tmp_path / "1.wav").write_bytes(b"no audio at all")
    command = [manifest, str(tmp_path / "out"), "--codec", codec, "--clips_per_shard", "2"]
    assert run(*command) == 1
    captured = capsys.readouterr()
    assert captured.err.count("jaxaudio tokenize: ") == 1
    assert "1.wav" in captured.err
    assert "2 clips, 85 frames, 1 failed" in captured.out
    failed = json.loads((tmp_path / "out" / "manifest.json").read_text())["failed"]
    assert [(line["index"], line["id"]) for line in failed] == [(1, "id 1")]


def test_processes_share_the_shards(codec, manifest, tmp_path, capsys):
    command = [manifest, str(tmp_path / "out"), "--codec", codec, "--clips_per_shard", "1"]
    assert run(*command, "--process_index", "0", "--process_count", "2") == 0
    assert "the shards of other processes are missing" in capsys.readouterr().out
    assert run(*command, "--process_index", "1", "--process_count", "2") == 0
    assert "3 clips, 127 frames" in capsys.readouterr().out


def test_bad_requests_end_in_one_line(codec, manifest, tmp_path, capsys):
    out = str(tmp_path / "out")
    for options, message in [
        (["--codec", codec, "--kbps", "5"], "tiny has no 5 kbps; choose of 3.2, 6.4"),
        (["--codec", codec, "--num_codebooks", "9"], "9 codebooks of tiny, which has 1 to 4"),
        (["--codec", codec, "--num_codebooks", "0"], "0 codebooks of tiny, which has 1 to 4"),
        (["--codec", codec, "--process_index", "3"], "index=3 of count=1 processes"),
        (["--codec", str(tmp_path)], str(tmp_path)),
    ]:
        assert run(manifest, out, *options) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
