import dataclasses
import json
import pickle

import grain
import numpy as np
import pytest

from jaxaudio.data import token_dataset
from jaxaudio.data.manifests import TimedText, Utterance
from jaxaudio.data.token_dataset import FailedClip, TokenClip, TokenDataset, TokenFormat, TokenWriter

FORMAT = TokenFormat("tiny", "ab12", "ef56", 3, 300, 75.0, 320, 24000, 1, scale=False)
UTTERANCES = [
    Utterance("a.wav", text="one\u2028two", id="first"),
    Utterance("b.wav", language="de", duration_s=1.5),
    Utterance("c.wav", segments=(TimedText(0.0, 1.0, "drei"),)),
    Utterance("d.wav", text="vier"),
    Utterance("e.wav"),
]


def clip(index, num_frames, **changes):
    codes = np.random.default_rng(index).integers(0, 300, (3, num_frames), np.int32)
    return TokenClip(index, UTTERANCES[index], codes, 320 * num_frames - 7, **changes)


def assert_same(ours, expected):
    assert (ours.index, ours.utterance, ours.num_samples) == (expected.index, expected.utterance, expected.num_samples)
    assert ours.codes.dtype == np.int32
    np.testing.assert_array_equal(ours.codes, expected.codes)


CLIPS = [clip(0, 4), clip(1, 0), clip(2, 9), clip(3, 1), clip(4, 5)]


@pytest.fixture
def folder(tmp_path):
    writer = TokenWriter(tmp_path, FORMAT, UTTERANCES, 2)
    for number in (2, 0, 1):  # whatever their order, and that within a shard
        writer.write(number, [CLIPS[index] for index in reversed(writer.todo(number))])
    writer.finish()
    return tmp_path


def test_what_is_written_is_read(folder):
    dataset = TokenDataset(folder)
    assert dataset.format == FORMAT
    assert (len(dataset), dataset.num_frames, dataset.failed) == (5, 19, ())
    for index in range(5):
        assert_same(dataset[index], CLIPS[index])
    assert_same(dataset[-1], CLIPS[4])
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"clip {index} of .*, which has 5"):
            dataset[index]


def test_files_can_be_read_without_us(folder):
    codes = np.load(folder / "shard-00000.npy")
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(codes, np.concatenate([CLIPS[0].codes, CLIPS[1].codes], axis=1).T)
    lines = [json.loads(line) for line in (folder / "shard-00001.jsonl").read_text().split("\n")[:-1]]
    assert lines[1] == {
        "index": 3, "audio": "d.wav", "text": "vier", "num_frames": 1, "num_samples": 313, "start_frame": 9,
        "scales": None,
    }  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == {
        "codec": "tiny", "config_hash": "ab12", "codebooks_hash": "ef56", "num_codebooks": 3, "codebook_size": 300,
        "frame_rate": 75.0, "hop_length": 320, "sample_rate": 24000, "channels": 1, "scale": False,
        "segment_length": None, "segment_stride": None,
    }  # fmt: skip
    assert (manifest["num_clips"], manifest["num_frames"], manifest["failed"]) == (5, 19, [])
    assert manifest["resampler"].startswith("soxr ")
    assert manifest["shards"][1] == {"name": "shard-00001", "num_clips": 2, "num_frames": 10}


def test_it_is_a_source_for_grain_and_small_to_send(folder):
    dataset = TokenDataset(folder)
    dataset[3]
    assert len(pickle.dumps(dataset)) < 1500  # no codes travel to worker processes
    drawn = list(grain.MapDataset.source(pickle.loads(pickle.dumps(dataset))).shuffle(seed=3).map(lambda c: c.index))
    assert sorted(drawn) == [0, 1, 2, 3, 4]


def test_scales_come_back(tmp_path):
    writer = TokenWriter(tmp_path, dataclasses.replace(FORMAT, scale=True), UTTERANCES[:1], 1)
    scales = np.array([0.1, 3.7e-5], np.float32)
    writer.write(0, [clip(0, 2, scales=scales)])
    writer.finish()
    np.testing.assert_array_equal(TokenDataset(tmp_path)[0].scales, scales)


def test_a_second_run_does_what_the_first_left(tmp_path):
    writer = TokenWriter(tmp_path, FORMAT, UTTERANCES, 2)
    writer.write(0, CLIPS[:2])
    assert writer.finish() is None
    with pytest.raises(ValueError, match="no manifest.json: some of its shards are missing"):
        TokenDataset(tmp_path)
    again = TokenWriter(tmp_path, FORMAT, UTTERANCES, 2)
    assert [again.todo(number) for number in range(again.num_shards)] == [[], [2, 3], [4]]


def test_clips_that_failed_are_named_and_done_again(tmp_path):
    writer = TokenWriter(tmp_path, FORMAT, UTTERANCES, 3)
    writer.write(1, CLIPS[3:])
    writer.write(0, [CLIPS[2], FailedClip(1, UTTERANCES[1], "b.wav: is empty"), CLIPS[0]])
    assert writer.finish()["failed"] == [
        {"index": 1, "audio": "b.wav", "language": "de", "duration_s": 1.5, "error": "b.wav: is empty"}
    ]
    dataset = TokenDataset(tmp_path)
    assert dataset.failed == (FailedClip(1, UTTERANCES[1], "b.wav: is empty"),)
    for position, expected in enumerate([CLIPS[0], CLIPS[2], CLIPS[3], CLIPS[4]]):
        assert_same(dataset[position], expected)

    again = TokenWriter(tmp_path, FORMAT, UTTERANCES, 3)
    assert [again.todo(number) for number in range(2)] == [[1], []]
    again.write(0, [CLIPS[1]])
    assert not (tmp_path / "manifest.json").exists()
    assert again.finish()["failed"] == []
    for position, expected in enumerate(CLIPS):
        assert_same(TokenDataset(tmp_path)[position], expected)


def test_a_shard_in_which_all_failed(tmp_path):
    writer = TokenWriter(tmp_path, FORMAT, UTTERANCES, 1)
    for number, expected in enumerate(CLIPS):
        writer.write(number, [FailedClip(number, UTTERANCES[number], "no") if number in (0, 2) else expected])
    writer.finish()
    assert [clip.index for clip in TokenDataset(tmp_path)] == [1, 3, 4]
    assert TokenWriter(tmp_path, FORMAT, UTTERANCES, 1).todo(2) == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "other"}, "codec 'tiny' there, 'other' now"),
        ({"config_hash": "cd34"}, "config_hash 'ab12' there, 'cd34' now"),
        ({"codebooks_hash": "00"}, "codebooks_hash 'ef56' there, '00' now"),
        ({"num_codebooks": 8}, "num_codebooks 3 there, 8 now"),
        ({"clips_per_shard": 4}, "clips_per_shard 2 there, 4 now"),
        ({"utterances": UTTERANCES[:4]}, "num_recordings 5 there, 4 now; list_sha256 '"),
    ],
)
def test_another_request_is_refused(folder, changes, message):
    settings = {"utterances": UTTERANCES, "clips_per_shard": 2} | changes
    fields = {name: settings.pop(name) for name in changes if name not in ("utterances", "clips_per_shard")}
    with pytest.raises(ValueError, match=message):
        TokenWriter(folder, dataclasses.replace(FORMAT, **fields), **settings)


def test_another_resampler_is_refused(folder, monkeypatch):
    monkeypatch.setattr(token_dataset, "RESAMPLER", "soxr 9 HQ")
    with pytest.raises(ValueError, match="resampler 'soxr .* VHQ' there, 'soxr 9 HQ' now"):
        TokenWriter(folder, FORMAT, UTTERANCES, 2)


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="clips_per_shard is 0 of 5 recordings"):
        TokenWriter(tmp_path, FORMAT, UTTERANCES, 0)
    writer = TokenWriter(tmp_path, FORMAT, UTTERANCES, 1)
    with pytest.raises(ValueError, match=r"shard 0: expected recordings \[0\], got \[1\]"):
        writer.write(0, [CLIPS[1]])
    for changes, message in [
        ({"codes": np.zeros((2, 4), np.int32)}, r"codes are int32 \(2, 4\); expected int32 \(3, T\)"),
        ({"codes": np.zeros((3, 4), np.int64)}, "codes are int64"),
        ({"codes": np.full((3, 1), 300, np.int32)}, "codes are from 300 to 300; expected 0 to 299"),
        ({"codes": np.full((3, 1), -1, np.int32)}, "codes are from -1 to -1"),
        ({"scales": np.ones(1, np.float32)}, r"scales are \[1.\]; expected some is False"),
    ]:
        with pytest.raises(ValueError, match=f"recording 0: {message}"):
            writer.write(0, [dataclasses.replace(CLIPS[0], **changes)])


def test_folders_that_are_none_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no manifest.json: expected a folder that `jaxaudio tokenize` wrote"):
        TokenDataset(tmp_path / "nothing")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version is 2; expected 1"):
        TokenDataset(folder)


def test_a_damaged_shard_is_refused(folder):
    np.save(folder / "shard-00001.npy", np.zeros((9, 3), np.uint16))
    with pytest.raises(ValueError, match=r"shard-00001.jsonl:2: frames 9 to 10 of 9; the shard is damaged"):
        TokenDataset(folder)[3]
