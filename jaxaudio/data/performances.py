"""Performances in MIDI files: MAESTRO, ASAP, or any folder or zip, split so that no composition is in two splits.

The files stay where they are; a `PerformanceSource` lists which to read, for which split, and which not, and why.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from jaxaudio.data.audio_crops import SplitConfig, split_recordings

SUFFIXES = (".mid", ".midi")
TENTHS = SplitConfig(valid_rate=0.1, test_rate=0.1)
"""A tenth of the compositions for validation and one for the test (Music Transformer, section 4.2)."""
_MAESTRO_SPLITS = {"train": "train", "validation": "valid", "test": "test"}


class PerformanceError(ValueError):
    """Performances that cannot be listed or read; the message names the file and what was expected."""


@dataclasses.dataclass(frozen=True)
class PerformanceFile:
    """One performance.

    Attributes:
      name: of the file in the folder or zip.
      composition: what is performed; it is in one split alone.
      split: "train", "valid" or "test".
      sha256: of the file's bytes, in hex.
    """

    name: str
    composition: str
    split: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class SkippedFile:
    """A file that is not among the performances, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class PerformanceSource:
    """Which files of a folder or zip are the performances.

    Attributes:
      path: of the folder or zip.
      files: by name.
      skipped: by name.
    """

    path: str
    files: tuple[PerformanceFile, ...]
    skipped: tuple[SkippedFile, ...]

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[PerformanceFile], bytes]]:
        """Within the block, a function that gives the bytes of a file.

        Raises:
          PerformanceError: the folder or zip is gone; by the function: the file is not what was listed.
        """
        with _opened(pathlib.Path(self.path)) as (_, read):

            def checked(file: PerformanceFile) -> bytes:
                content = read(file.name)
                digest = hashlib.sha256(content).hexdigest()
                if digest != file.sha256:
                    raise PerformanceError(
                        f"{self.path}: {file.name} has sha256 {digest}, {file.sha256} when it was listed; list it again"
                    )
                return content

            yield checked


def list_asap(data_dir: str | os.PathLike, split: SplitConfig = TENTHS) -> PerformanceSource:
    """ASAP: a composition is a composer and a title, "Bach/Fugue_bwv_846", whatever folders its performances are in.

    Foscarin et al. 2020, github.com/fosfrancesco/asap-dataset, which has no split of its own.

    Args:
      data_dir: folder of performances.zip and metadata.csv (composer, title, midi_performance), or of a folder asap
        that has them.
      split: of the compositions, by pattern and by hash.
    Raises:
      PerformanceError: one of the two files is missing, is no zip or lacks a column.
      ValueError: as `audio_crops.split_recordings`.
    """
    folder = pathlib.Path(data_dir).expanduser()
    if (folder / "asap").is_dir():
        folder = folder / "asap"
    table, archive = folder / "metadata.csv", folder / "performances.zip"
    if not table.is_file():
        raise PerformanceError(f"there is no {table}; expected ASAP's metadata.csv beside performances.zip")
    rows = _csv_rows(table.read_bytes(), str(table), ("composer", "title", "midi_performance"))
    compositions = {row["midi_performance"]: f"{row['composer']}/{row['title']}" for row in rows}
    return _source(archive, compositions, _split(compositions, split), f"is not in {table.name}")


def list_maestro(path: str | os.PathLike) -> PerformanceSource:
    """MAESTRO as it is released, with the split of its table; "validation" is our "valid".

    Hawthorne et al. 2019, https://arxiv.org/abs/1810.12247, versions 1 to 3. TensorFlow Datasets has no MAESTRO, and
    the release's TFRecords cannot be read in any order, so that the MIDI files are read. A composition is a composer
    and a title, to the letter; where the table has one in two splits, its performances stay in the test or the
    validation split and the others are skipped.

    Args:
      path: the folder maestro-v3.0.0, with or without audio, or the zip maestro-v3.0.0-midi.zip.
    Raises:
      PerformanceError: there is no such file, no table maestro-v*.csv or .json in it, a table that lacks a column, or
        a split that is none of MAESTRO's.
    """
    path = pathlib.Path(path).expanduser()
    with _opened(path) as (names, read):
        tables = sorted(name for name in names if re.fullmatch(r"(.*/)?maestro-v[\d.]+\.(csv|json)", name))
        if not tables:
            raise PerformanceError(f"{path} has no maestro-v*.csv or .json; expected the folder or zip of a release")
        rows = _maestro_rows(tables[0], read(tables[0]))  # .csv comes before .json
    base = tables[0].rpartition("/")[0]
    compositions, own_split, held_out = {}, {}, {}
    for row in rows:
        name = f"{base}/{row['midi_filename']}" if base else row["midi_filename"]
        if row["split"] not in _MAESTRO_SPLITS:
            expected = ", ".join(_MAESTRO_SPLITS)
            raise PerformanceError(f"{path}: {tables[0]}: split {row['split']!r} of {name}; expected {expected}")
        compositions[name] = f"{row['canonical_composer']}/{row['canonical_title']}"
        own_split[name] = _MAESTRO_SPLITS[row["split"]]
    for split in ("train", "valid", "test"):  # the last one wins
        held_out |= {compositions[name]: split for name, own in own_split.items() if own == split}
    source = _source(path, compositions, held_out, f"is not in {tables[0]}")
    moved = [file for file in source.files if file.split != own_split[file.name]]
    skipped = [SkippedFile(f.name, f"is in {own_split[f.name]}, its composition in {f.split} too") for f in moved]
    return dataclasses.replace(
        source,
        files=tuple(file for file in source.files if file not in moved),
        skipped=tuple(sorted([*source.skipped, *skipped], key=lambda file: file.name)),
    )


def list_folder_or_zip(
    path: str | os.PathLike,
    composition: Literal["folder", "file"] = "folder",
    split: SplitConfig = TENTHS,
) -> PerformanceSource:
    """All MIDI files of a folder and the folders in it, or of a zip.

    Args:
      path: the folder or zip.
      composition: "folder": the performances of a composition share a folder, after which it is called, and a file
        that is in no folder is a composition of its own. "file": every file is one.
      split: of the compositions, by pattern and by hash.
    Raises:
      PerformanceError: there is no such folder or zip, no MIDI file in it, or no composition for the training split.
      ValueError: as `audio_crops.split_recordings`.
    """
    path = pathlib.Path(path).expanduser()
    with _opened(path) as (names, _):
        compositions = {name: name.rpartition(".")[0] for name in names if name.lower().endswith(SUFFIXES)}
    if not compositions:
        raise PerformanceError(f"{path} has no file called {' or '.join(SUFFIXES)}; expected performances")
    if composition == "folder":
        compositions = {name: name.rpartition("/")[0] or stem for name, stem in compositions.items()}
    splits = _split(compositions, split)
    if "train" not in splits.values():
        raise PerformanceError(
            f"{path}: none of {len(splits)} compositions (by {composition}), such as {min(compositions.values())!r}, "
            "falls into train; ask for composition='file', or lower valid_rate and test_rate"
        )
    return _source(path, compositions, splits, f"is not called {' or '.join(SUFFIXES)}", every_file=True)


def _split(compositions: Mapping[str, str], config: SplitConfig) -> dict[str, str]:
    splits = split_recordings(sorted(set(compositions.values())), config)
    return {composition: split for split, members in splits.items() for composition in members}


def _source(
    path: pathlib.Path,
    compositions: Mapping[str, str],
    splits: Mapping[str, str],
    unlisted: str,
    every_file: bool = False,
) -> PerformanceSource:
    """The files of `compositions` (of each name), in the split of their composition.

    Args:
      path: of the folder or zip.
      compositions: of each file, by name.
      splits: of each composition; one that has none is excluded.
      unlisted: why the other MIDI files, or with `every_file` all other files, are skipped.
      every_file: see `unlisted`.
    """
    files, skipped, first = [], [], {}
    with _opened(path) as (names, read):
        others = {name for name in names if every_file or name.lower().endswith(SUFFIXES)}
        for name in sorted(others | compositions.keys()):
            composition, digest = compositions.get(name), ""
            if composition is None:
                reason = unlisted
            elif composition not in splits:
                reason = f"its composition {composition} is excluded"
            elif name not in names:
                reason = f"is not in {path.name}"
            else:
                digest, reason = _digest(read, name)
            if digest and first.setdefault(digest, name) != name:
                reason = f"has the bytes of {first[digest]}"
            if reason:
                skipped.append(SkippedFile(name, reason))
            else:
                files.append(PerformanceFile(name, composition, splits[composition], digest))
    if not files:
        raise PerformanceError(f"{path} has none of {len(compositions)} performances; {skipped[0]} is the first")
    return PerformanceSource(str(path), tuple(files), tuple(skipped))


def _digest(read: Callable[[str], bytes], name: str) -> tuple[str, str]:
    """sha256 of a file, or why it has none."""
    try:
        return hashlib.sha256(read(name)).hexdigest(), ""
    except (OSError, zipfile.BadZipFile) as error:
        return "", f"cannot be read: {error}"


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[tuple[set[str], Callable[[str], bytes]]]:
    """Names of all files of a folder or zip, and what reads one."""
    if path.is_dir():
        names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        yield names, lambda name: (path / name).read_bytes()
        return
    expected = "expected a folder of MIDI files or a zip of them"
    if not path.is_file():
        raise PerformanceError(f"there is no {path}; {expected}")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise PerformanceError(f"{path} is no zip ({error}); {expected}") from error
    with archive:
        yield {info.filename for info in archive.infolist() if not info.is_dir()}, archive.read


def _maestro_rows(name: str, content: bytes) -> list[dict[str, Any]]:
    columns = ("canonical_composer", "canonical_title", "split", "midi_filename")
    if name.endswith(".csv"):
        return _csv_rows(content, name, columns)
    table = json.loads(content)
    if isinstance(table, dict) and set(columns) <= table.keys():  # version 3: columns, each by the number of the row
        table = [{column: table[column][row] for column in columns} for row in table["midi_filename"]]
    if not isinstance(table, list) or any(not set(columns) <= row.keys() for row in table):
        raise PerformanceError(f"{name} lacks some of {', '.join(columns)}; expected MAESTRO's table")
    return table


def _csv_rows(content: bytes, name: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise PerformanceError(f"{name} has no {', '.join(missing)}; its columns are {reader.fieldnames}")
    return list(reader)
