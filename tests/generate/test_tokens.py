import dataclasses
import filecmp
import os

import numpy as np
import pytest
import tiny_codec

from jaxaudio.data.audio import load_audio
from jaxaudio.data.manifests import Utterance
from jaxaudio.data.token_dataset import TokenDataset
from jaxaudio.generate import tokens
from jaxaudio.generate.tokens import tokenize

LENGTHS = (810, 833, 870, 861, 47)  # few numbers of frames, each of which is a program to compile


@pytest.fixture(scope="module")
def codec():
    return tiny_codec.to_codec(tiny_codec.make_codec())


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    paths = tiny_codec.write_recordings(folder, LENGTHS)
    return [Utterance(path, text=f"text {number}") for number, path in enumerate(paths)]


def run(codec, utterances, folder, **options):
    root = os.path.dirname(utterances[0].audio)
    options = {"num_codebooks": 4, "batch_size": 2, "clips_per_shard": 3} | options
    return tokenize(codec, utterances, folder, root=root, **options)


def assert_same_files(a, b):
    names = sorted(os.listdir(a))
    assert names == sorted(os.listdir(b))
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def test_clips_in_batches_are_clips_one_by_one(codec, utterances, tmp_path):
    heard = []
    manifest = run(codec, utterances, tmp_path, on_clip=lambda clip: heard.append(clip.index))
    dataset = TokenDataset(tmp_path)
    assert len(dataset) == manifest["num_clips"] == 5
    assert sorted(heard) == [0, 1, 2, 3, 4]
    for index, (clip, utterance) in enumerate(zip(dataset, utterances, strict=True)):
        expected = codec.encode(load_audio(utterance.audio, 8000), num_codebooks=4)
        np.testing.assert_array_equal(clip.codes, expected.codes)
        assert clip.codes.shape == (4, -(-LENGTHS[index] // 20))
        assert (clip.num_samples, clip.scales) == (LENGTHS[index], None)
        assert clip.utterance == Utterance(f"{index}.wav", text=f"text {index}")
    assert len(np.unique(dataset[3].codes)) > 8  # they are not all alike
    format = dataset.format
    assert (format.codec, format.config_hash, format.num_codebooks, format.codebook_size) == (
        "tiny", codec.config_hash[:16], 4, 16,
    )  # fmt: skip
    assert (format.frame_rate, format.hop_length, format.sample_rate, format.channels) == (400.0, 20, 8000, 1)


def test_processes_write_what_one_writes(codec, utterances, tmp_path):
    run(codec, utterances, tmp_path / "one", clips_per_shard=2)
    assert run(codec, utterances, tmp_path / "two", clips_per_shard=2, process_index=1, process_count=2) is None
    assert run(codec, utterances, tmp_path / "two", clips_per_shard=2, batch_size=1, process_count=2)["num_clips"] == 5
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_a_killed_run_goes_on(codec, utterances, tmp_path, monkeypatch):
    run(codec, utterances, tmp_path / "whole")
    encode, calls = tokens._encode, []

    def killed(codec, waveforms, num_codebooks):
        calls.extend(waveforms)
        if 3 in waveforms or 4 in waveforms:
            raise KeyboardInterrupt
        return encode(codec, waveforms, num_codebooks)

    monkeypatch.setattr(tokens, "_encode", killed)
    with pytest.raises(KeyboardInterrupt):
        run(codec, utterances, tmp_path / "killed")
    assert sorted(os.listdir(tmp_path / "killed")) == ["settings.json", "shard-00000.jsonl", "shard-00000.npy"]

    monkeypatch.setattr(
        tokens, "_encode", lambda *rest: (calls.append("again"), calls.extend(rest[1]), encode(*rest))[2]
    )
    run(codec, utterances, tmp_path / "killed")
    assert sorted(calls[calls.index("again") + 1 :]) == [3, 4]  # the shard of 0, 1 and 2 was finished
    assert_same_files(tmp_path / "whole", tmp_path / "killed")


def test_recordings_that_fail_do_not_take_others_along(codec, utterances, tmp_path, monkeypatch):
    folder = os.path.dirname(utterances[0].audio)
    (tmp_path / "no.wav").write_bytes(b"no audio at all")
    listed = [utterances[0], Utterance(str(tmp_path / "no.wav")), Utterance(f"{folder}/gone.wav"), *utterances[1:]]
    encode_batch = type(codec).encode_batch

    def picky(self, waveforms, **options):
        if any(len(waveform) == 870 for waveform in waveforms):
            raise ValueError("870 samples are\nrefused")
        return encode_batch(self, waveforms, **options)

    monkeypatch.setattr(type(codec), "encode_batch", picky)
    manifest = run(codec, listed, tmp_path / "out", clips_per_shard=10, batch_size=5)
    errors = {failed["index"]: failed["error"] for failed in manifest["failed"]}
    assert sorted(errors) == [1, 2, 4]
    assert "no.wav" in errors[1]
    assert "there is no such file" in errors[2]
    assert errors[4] == "870 samples are refused"
    assert [clip.index for clip in TokenDataset(tmp_path / "out")] == [0, 3, 5, 6]

    monkeypatch.undo()
    assert len(run(codec, listed, tmp_path / "out", clips_per_shard=10)["failed"]) == 2  # the others still fail


def test_another_codec_or_bandwidth_is_refused_by_name(codec, utterances, tmp_path):
    run(codec, utterances, tmp_path)
    with pytest.raises(ValueError, match="num_codebooks 4 there, 2 now"):
        run(codec, utterances, tmp_path, num_codebooks=2)
    other = tiny_codec.to_codec(tiny_codec.make_codec(name="other"))
    with pytest.raises(ValueError, match="codec 'tiny' there, 'other' now"):
        run(other, utterances, tmp_path)
    with pytest.raises(ValueError, match="index=2 of count=2"):
        run(codec, utterances, tmp_path, process_index=2, process_count=2)


def test_segments_keep_their_scales(utterances, tmp_path):
    checkpoint = tiny_codec.make_codec()
    config = dataclasses.replace(checkpoint.config, segment_s=0.05)
    codec = tiny_codec.to_codec(dataclasses.replace(checkpoint, config=config))
    run(codec, utterances[:2], tmp_path)
    dataset = TokenDataset(tmp_path)
    assert (dataset.format.scale, dataset.format.segment_length, dataset.format.segment_stride) == (True, 400, 396)
    for clip, utterance in zip(dataset, utterances, strict=False):
        expected = codec.encode(load_audio(utterance.audio, 8000), num_codebooks=4)
        np.testing.assert_array_equal(clip.codes, expected.codes)
        np.testing.assert_array_equal(clip.scales, expected.scales)
        assert len(clip.scales) == -(-clip.num_samples // 396)
