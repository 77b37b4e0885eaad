"""Performances as tokens on disk: by hand, against notes moved one by one, interrupted, in processes, refused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxaudio.data import event_dataset
from jaxaudio.data.audio_crops import SplitConfig
from jaxaudio.data.event_dataset import EventDataset, EventDatasetError, write_event_dataset
from jaxaudio.data.events import MAGENTA, PAPER
from jaxaudio.data.midi import Note, write_midi
from jaxaudio.data.performances import SkippedFile, list_folder_or_zip

STRETCHES = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("midi")
    rng = np.random.default_rng(0)
    for name in ("a/1", "a/2", "b/1", "c/1"):
        starts = np.cumsum(rng.uniform(0.1, 0.5, 12))
        notes = [Note(s, s + 0.3, int(rng.integers(40, 80)), int(rng.integers(1, 128)), 0) for s in starts]
        (folder / name).parent.mkdir(exist_ok=True)
        write_midi(notes, folder / f"{name}.mid")
    write_midi([Note(0.5, 1.0, 60, 80, 0)], folder / "hand.mid")
    write_midi([Note(0.0, 0.5, 60, 80, 0), Note(0.5, 1.0, 20, 80, 0)], folder / "low.mid")
    (folder / "broken.mid").write_bytes(b"RIFF")
    (folder / "notes.txt").write_bytes(b"")
    return list_folder_or_zip(folder, split=SplitConfig(("^b$",), ("^c$",), 0.0, 0.0))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_event_dataset(source, folder, MAGENTA, STRETCHES, num_workers=1)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_note_by_hand(folder):
    dataset = EventDataset(folder)
    (piece,) = (index for index, piece in enumerate(dataset.pieces["train"]) if piece.name == "hand.mid")
    # 178 is a shift by 10 ms, 278 the softest velocity, 2 and 90 the lowest key down and up (the layout of Magenta).
    for stretch, shift in ((0.5, 178 + 24), (1.0, 178 + 49), (2.0, 178 + 99)):
        tokens = dataset.tokens("train", piece, stretch)
        assert tokens.tolist() == [shift, 278 + 19, 2 + 60 - 21, shift, 90 + 60 - 21]
        assert (tokens.dtype, isinstance(tokens, np.memmap)) == (np.int16, True)
    found = dataset.pieces["train"][piece]
    assert (found.composition, found.num_notes, found.num_dropped, found.duration_s) == ("hand", 1, 0, 1.0)
    assert (found.lowest_pitch, found.highest_pitch, found.num_tokens) == (60, 60, (5, 5, 5))


def test_splits_and_what_was_skipped(folder, source):
    dataset = EventDataset(folder)
    assert {split: [piece.name for piece in pieces] for split, pieces in dataset.pieces.items()} == {
        "train": ["a/1.mid", "a/2.mid", "hand.mid"],
        "valid": ["b/1.mid"],
        "test": ["c/1.mid"],
    }
    assert (dataset.stretches("train"), dataset.stretches("valid")) == (STRETCHES, (1.0,))
    assert dataset.vocabulary == MAGENTA
    assert [file.name for file in dataset.skipped] == ["broken.mid", "low.mid", "notes.txt"]
    assert "begins with b'RIFF'" in dataset.skipped[0].reason
    assert "1 of 2 notes need a pitch in 21..108" in dataset.skipped[1].reason
    assert dataset.skipped[2] == SkippedFile("notes.txt", "is not called .mid or .midi")
    lines = dataset.report().splitlines()
    tokens = sum(len(dataset.tokens("train", index)) for index in range(3))
    assert lines[1].split() == ["train", "3", "2", "0.0", str(tokens)]
    assert [line.split()[0] for line in lines] == ["split", "train", "valid", "test", "skipped", *(
        f"{file.name}:" for file in dataset.skipped
    )]  # fmt: skip
    with pytest.raises(EventDatasetError, match="split is 'dev'; expected one of train, valid, test"):
        dataset.tokens("dev", 0)
    with pytest.raises(EventDatasetError, match="stretch is 2.0; valid has 1.0"):
        dataset.tokens("valid", 0, 2.0)
    with pytest.raises(IndexError):
        dataset.tokens("valid", 1)


def test_any_number_of_processes_writes_the_same(folder, source, tmp_path):
    write_event_dataset(source, tmp_path, MAGENTA, STRETCHES, num_workers=2)
    assert contents(tmp_path) == contents(folder)


def test_a_killed_run_goes_on_where_it_was(folder, source, tmp_path, monkeypatch):
    encode, calls = event_dataset.encode_events, []

    def interrupted(notes, vocabulary):
        calls.append(len(notes))
        if len(calls) == 10:  # 3 + 3 + 1 + 0 + 1 stretches of the five files before hand.mid, and its second one
            raise KeyboardInterrupt
        return encode(notes, vocabulary)

    monkeypatch.setattr(event_dataset, "encode_events", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_event_dataset(source, tmp_path, MAGENTA, STRETCHES, num_workers=1)
    with pytest.raises(EventDatasetError, match="has no manifest.json; write it to its end"):
        EventDataset(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("pieces/*.json")) == [f"{index:05d}.json" for index in range(5)]
    assert not (tmp_path / "pieces" / "00005.npy").exists()
    (tmp_path / "pieces" / "00005.npy").write_bytes(b"of a run that was killed before it wrote the line")
    del calls[:]
    write_event_dataset(source, tmp_path, MAGENTA, STRETCHES, num_workers=1)
    assert calls == [1, 1, 1, 2]  # hand.mid in three stretches, and low.mid, which is refused
    assert contents(tmp_path) == contents(folder)
    write_event_dataset(source, tmp_path, MAGENTA, STRETCHES, num_workers=1)
    assert len(calls) == 4  # it is there


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(folder, source, tmp_path, finished):
    if not finished:
        (tmp_path / "settings.json").write_bytes((folder / "settings.json").read_bytes())
        folder = tmp_path
    before = contents(folder)
    fewer = dataclasses.replace(source, files=source.files[1:])
    for changed, vocabulary, stretches, match in (
        (source, PAPER, STRETCHES, r"vocabulary .*'min_pitch': 21.* there, .*'min_pitch': 0.* now"),
        (source, MAGENTA, (1.0,), r"stretches .*\[0.5, 1.0, 2.0\].* there, .*'train': \[1.0\].* now"),
        (fewer, MAGENTA, STRETCHES, "num_files 7 there, 6 now; files_sha256 .* there, .* now. Name another"),
    ):
        with pytest.raises(EventDatasetError, match=match):
            write_event_dataset(changed, folder, vocabulary, stretches, num_workers=1)
    assert contents(folder) == before


def test_errors(source, folder, tmp_path):
    for stretches in ((0.95,), (1.0, 1.0), (0.0, 1.0)):
        with pytest.raises(EventDatasetError, match=f"stretches are .{stretches[0]}.*1.0 among them"):
            write_event_dataset(source, tmp_path, MAGENTA, stretches)
    with pytest.raises(EventDatasetError, match="has 40210 ids; int16 holds 32768"):
        write_event_dataset(source, tmp_path, dataclasses.replace(MAGENTA, max_shift_steps=40_000))
    with pytest.raises(EventDatasetError, match="num_workers is 0"):
        write_event_dataset(source, tmp_path, MAGENTA, num_workers=0)
    with pytest.raises(EventDatasetError, match="has no manifest.json; expected a folder of write_event_dataset"):
        EventDataset(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"version": 9}), encoding="utf-8")
    with pytest.raises(EventDatasetError, match="has version 9, expected 1; write it again"):
        EventDataset(tmp_path)
