"""Which performances are listed, for which split, and which are not and why; small files, and ASAP's real table."""

import collections
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import pytest

from jaxaudio.data import performances
from jaxaudio.data.audio_crops import SplitConfig
from jaxaudio.data.performances import PerformanceError, PerformanceFile, SkippedFile

# By folder: three performances of two compositions, and one that is in no folder; a listing does not parse them.
FILES = {"a/one/x.mid": b"1", "a/one/y.MIDI": b"2", "a/two/x.mid": b"3", "alone.mid": b"4"}
ALL_TRAIN = SplitConfig(valid_rate=0.0, test_rate=0.0)
MAESTRO = (  # composer, title, split, file
    ("B", "Sonata, No. 1", "train", "2004/a.midi"),
    ("B", "Sonata, No. 2", "validation", "2004/b.midi"),
    ("C", "Waltz", "test", "2006/c.midi"),
    ("C", "Waltz", "train", "2006/d.midi"),
)


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def zipped(folder):
    return pathlib.Path(shutil.make_archive(str(folder), "zip", folder))


def names(source):
    return [file.name for file in source.files]


def maestro(folder, rows=MAESTRO, table="csv"):
    columns = ("canonical_composer", "canonical_title", "split", "midi_filename")
    fill(folder, {name: name.encode() for *_, name in rows})
    if table == "csv":
        with open(folder / "maestro-v3.0.0.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
    else:
        by_column = {
            name: dict(enumerate(values)) for name, values in zip(columns, zip(*rows, strict=True), strict=True)
        }
        by_row = [dict(zip(columns, row, strict=True)) for row in rows]
        content = json.dumps(by_column if table == "json by column" else by_row)
        (folder / "maestro-v1.0.0.json").write_text(content, encoding="utf-8")
    return folder


def asap(folder, rows):
    fill(folder / "files", {name: name.encode() for *_, name in rows})
    shutil.make_archive(str(folder / "performances"), "zip", folder / "files")
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("composer", "title", "midi_performance"), *rows])
    return folder


def test_a_folder_and_its_zip_by_composition(tmp_path):
    folder = fill(tmp_path / "midi", FILES | {"readme.txt": b"x", "z/copy.mid": b"3"})
    skipped = (
        SkippedFile("readme.txt", "is not called .mid or .midi"),
        SkippedFile("z/copy.mid", "has the bytes of a/two/x.mid"),
    )
    for path in (folder, zipped(folder)):
        source = performances.list_folder_or_zip(path, split=ALL_TRAIN)
        assert [(file.name, file.composition) for file in source.files] == [
            ("a/one/x.mid", "a/one"),
            ("a/one/y.MIDI", "a/one"),
            ("a/two/x.mid", "a/two"),
            ("alone.mid", "alone"),
        ]
        assert source.skipped == skipped
        with source.reader() as read:
            assert [read(file) for file in source.files] == list(FILES.values())
    by_file = performances.list_folder_or_zip(folder, "file", ALL_TRAIN)
    assert [file.composition for file in by_file.files] == ["a/one/x", "a/one/y", "a/two/x", "alone"]


def test_splits_are_by_pattern_and_by_hash_and_do_not_move(tmp_path):
    folder = fill(tmp_path, {f"{piece}/{take}.mid": f"{piece} {take}".encode() for piece in range(40) for take in "ab"})
    source = performances.list_folder_or_zip(folder, split=SplitConfig(("^7$",), ("^8$",), 0.2, 0.3, ("^9$",)))

    def split_of(piece):
        if piece in "789":
            return {"7": "valid", "8": "test", "9": None}[piece]
        draw = int(hashlib.sha256(piece.encode()).hexdigest()[:16], 16) / 16**16
        return "test" if draw < 0.3 else "valid" if draw < 0.5 else "train"

    expected = {str(piece): split_of(str(piece)) for piece in range(40)}
    assert {file.composition: file.split for file in source.files} == {k: v for k, v in expected.items() if v}
    assert source.skipped == tuple(SkippedFile(f"9/{take}.mid", "its composition 9 is excluded") for take in "ab")
    shutil.rmtree(folder / "11")
    again = performances.list_folder_or_zip(folder, split=SplitConfig(("^7$",), ("^8$",), 0.2, 0.3, ("^9$",)))
    assert set(again.files) == {file for file in source.files if file.composition != "11"}


@pytest.mark.parametrize("table", ["csv", "json by row", "json by column"])
def test_maestro_keeps_its_split_and_no_composition_is_in_two(tmp_path, table):
    folder = maestro(tmp_path / "maestro" / "maestro-v3.0.0", table=table)
    fill(folder, {"2004/a.wav": b"audio", "2004/extra.midi": b"extra"})
    for path, prefix in ((folder, ""), (zipped(folder.parent), "maestro-v3.0.0/")):  # the release's zip has a folder
        source = performances.list_maestro(path)
        assert [(file.name, file.composition, file.split) for file in source.files] == [
            (f"{prefix}2004/a.midi", "B/Sonata, No. 1", "train"),
            (f"{prefix}2004/b.midi", "B/Sonata, No. 2", "valid"),
            (f"{prefix}2006/c.midi", "C/Waltz", "test"),
        ]
        table_name = f"{prefix}maestro-v3.0.0.csv" if table == "csv" else f"{prefix}maestro-v1.0.0.json"
        assert source.skipped == (
            SkippedFile(f"{prefix}2004/extra.midi", f"is not in {table_name}"),
            SkippedFile(f"{prefix}2006/d.midi", "is in train, its composition in test too"),
        )


def test_asap_by_composer_and_title(tmp_path):
    rows = [("Bach", "Fugue_1", "Bach/Fugue/1/A.mid"), ("Bach", "Fugue_1", "Bach/Fugue/1_no_repeat/B.mid")]
    folder = asap(tmp_path / "asap", [*rows, ("Bach", "Fugue_2", "Bach/Fugue/2/C.mid")])
    (folder / "metadata.csv").write_text(
        (folder / "metadata.csv").read_text(encoding="utf-8").replace("2/C.mid", "2/D.mid"), encoding="utf-8"
    )
    source = performances.list_asap(tmp_path, ALL_TRAIN)
    assert [file.composition for file in source.files] == ["Bach/Fugue_1"] * 2
    assert source.skipped == (
        SkippedFile("Bach/Fugue/2/C.mid", "is not in metadata.csv"),
        SkippedFile("Bach/Fugue/2/D.mid", "is not in performances.zip"),
    )
    assert performances.list_asap(folder, ALL_TRAIN) == source


def test_asap_as_published_has_no_composition_in_two_splits():
    if "JAXAUDIO_DATA" not in os.environ:
        pytest.skip("JAXAUDIO_DATA names no folder with ASAP")
    folder = pathlib.Path(os.environ["JAXAUDIO_DATA"]) / "asap"
    source = performances.list_asap(folder)
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        pieces = {row["midi_performance"]: (row["composer"], row["title"]) for row in csv.DictReader(file)}
    splits = collections.defaultdict(set)
    for file in source.files:
        splits[pieces[file.name]].add(file.split)
    assert len(splits) == 222
    assert all(len(found) == 1 for found in splits.values())
    # A tenth of 222 compositions each, as the hash draws them, now and on every machine.
    assert collections.Counter(min(found) for found in splits.values()) == {"train": 176, "valid": 24, "test": 22}
    assert len(source.files) == 1066
    copy = "Beethoven/Piano_Sonatas/18-2/Schmitt01.mid"
    assert source.skipped == (SkippedFile(copy.replace("18-2", "18-2_no_repeat"), f"has the bytes of {copy}"),)


def test_errors(tmp_path):
    midi = fill(tmp_path / "midi", FILES)
    held_out = SplitConfig(valid_rate=0.0, test_rate=1.0)
    broken = fill(tmp_path, {"broken.zip": b"no zip"}) / "broken.zip"
    (tmp_path / "empty").mkdir()
    for path, arguments, match in (
        (tmp_path / "missing", {}, "there is no .*missing; expected a folder"),
        (broken, {}, "broken.zip is no zip"),
        (tmp_path / "empty", {}, "empty has no file called .mid or .midi"),
        (midi, {"split": held_out}, r"none of 3 compositions \(by folder\), such as 'a/one', falls into train"),
    ):
        with pytest.raises(PerformanceError, match=match):
            performances.list_folder_or_zip(path, **arguments)
    with pytest.raises(PerformanceError, match=r"midi has no maestro-v\*.csv or .json"):
        performances.list_maestro(midi)
    with pytest.raises(PerformanceError, match="split 'dev' of a.midi; expected train, validation, test"):
        performances.list_maestro(maestro(tmp_path / "m1", [("B", "S", "dev", "a.midi")]))
    (maestro(tmp_path / "m2") / "maestro-v3.0.0.csv").write_text("canonical_composer,split\n", encoding="utf-8")
    with pytest.raises(PerformanceError, match="csv has no canonical_title, midi_filename; its columns are"):
        performances.list_maestro(tmp_path / "m2")
    (maestro(tmp_path / "m3", table="json by row") / "maestro-v1.0.0.json").write_text("[{}]", encoding="utf-8")
    with pytest.raises(PerformanceError, match=r"maestro-v1.0.0.json lacks some of canonical_composer"):
        performances.list_maestro(tmp_path / "m3")
    with pytest.raises(PerformanceError, match="there is no .*midi/metadata.csv"):
        performances.list_asap(midi)
    folder = asap(tmp_path / "elsewhere", [("B", "S", "a.mid")])
    shutil.copy(folder.parent / "m2" / "maestro-v3.0.0.csv", folder / "metadata.csv")
    with pytest.raises(PerformanceError, match="metadata.csv has no composer, title, midi_performance"):
        performances.list_asap(folder)
    (folder / "metadata.csv").write_text("composer,title,midi_performance\nB,S,c.mid\n", encoding="utf-8")
    with pytest.raises(PerformanceError, match="performances.zip has none of 1 performances"):
        performances.list_asap(folder)


def test_a_file_that_changed_is_not_read(tmp_path):
    source = performances.list_folder_or_zip(fill(tmp_path, FILES), split=ALL_TRAIN)
    (tmp_path / "alone.mid").write_bytes(b"other")
    with (
        source.reader() as read,
        pytest.raises(PerformanceError, match="alone.mid has sha256 d9298a10.*list it"),
    ):
        read(source.files[-1])
    gone = dataclasses.replace(source, path=str(tmp_path / "gone"))
    with pytest.raises(PerformanceError, match="there is no .*gone"), gone.reader():
        pass
    assert source.files[-1] == PerformanceFile("alone.mid", "alone", "train", hashlib.sha256(b"4").hexdigest())
