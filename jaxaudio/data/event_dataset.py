"""Performances as event tokens on disk, of which `event_batches` cuts batches. NumPy, no JAX.

    manifest.json       what the tokens mean, every performance, and the files that were skipped and why
    settings.json       what was asked for; written first, so that nothing else is mixed in
    pieces/00012.npy    int16 tokens of a performance, one stretch after the other
    pieces/00012.json   what the manifest says of it, or why it was skipped; written last, so that it is done

Training performances are there in every stretch, the others as they were played. Transpositions are exact on tokens and
are left to those who read them.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxaudio.data.audio_crops import SPLITS
from jaxaudio.data.events import STRETCHES, EventVocabulary, apply_sustain, encode_events, stretch
from jaxaudio.data.files import atomic_path
from jaxaudio.data.midi_performance import read_performance
from jaxaudio.data.performances import PerformanceSource, SkippedFile

_VERSION = 1  # to be raised when the same file gives other tokens


class EventDatasetError(ValueError):
    """A token dataset that cannot be written or read; the message has the folder and what was expected."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One performance of a dataset.

    Attributes:
      index: of its file in the list it was written from.
      name: of its file.
      composition: what is performed.
      duration_s: from 0 to the end of the last note, pedal included, as played.
      num_notes: of it.
      num_dropped: notes of the file that are left out, for they were never released or had no length.
      lowest_pitch, highest_pitch: of its notes.
      num_tokens: in each stretch of its split.
    """

    index: int
    name: str
    composition: str
    duration_s: float
    num_notes: int
    num_dropped: int
    lowest_pitch: int
    highest_pitch: int
    num_tokens: tuple[int, ...]


class EventDataset:
    """Random access to the performances of a folder that `write_event_dataset` wrote.

    Tokens are mapped into memory when they are asked for; nothing else but the manifest is read.

    Attributes:
      vocabulary: of the tokens.
      pieces: of each split, in the order of the files.
      skipped: the files that are not here.

    Raises:
      EventDatasetError: the folder has no manifest, or one that this version does not read; has what to do.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self._folder = pathlib.Path(folder)
        path = self._folder / "manifest.json"
        if not path.is_file():
            begun = (self._folder / "settings.json").is_file()
            expected = "write it to its end" if begun else "expected a folder of write_event_dataset"
            raise EventDatasetError(f"{folder} has no manifest.json; {expected}")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION:
            raise EventDatasetError(f"{path} has version {manifest['version']}, expected {_VERSION}; write it again")
        self.vocabulary = EventVocabulary(**manifest["vocabulary"])
        self.skipped = tuple(SkippedFile(**fields) for fields in manifest["skipped"])
        self.pieces = {
            split: tuple(Piece(**fields | {"num_tokens": tuple(fields["num_tokens"])}) for fields in pieces)
            for split, pieces in manifest["pieces"].items()
        }
        self._stretches = {split: tuple(factors) for split, factors in manifest["stretches"].items()}

    def stretches(self, split: str) -> tuple[float, ...]:
        """The factors in which the performances of a split are there.

        Raises:
          EventDatasetError: no such split.
        """
        if split not in self._stretches:
            raise EventDatasetError(f"split is {split!r}; expected one of {', '.join(self._stretches)}")
        return self._stretches[split]

    def tokens(self, split: str, piece: int, stretch: float = 1.0) -> np.ndarray:
        """(N,) int16 tokens of the piece at this place in its split, mapped from disk, without start and end tokens.

        Raises:
          EventDatasetError: no such split, or a stretch that it is not there in; has those that are.
          IndexError: no such piece.
        """
        factors = self.stretches(split)
        if stretch not in factors:
            raise EventDatasetError(f"stretch is {stretch}; {split} has {', '.join(map(str, factors))}")
        found = self.pieces[split][piece]
        which = factors.index(stretch)
        start = sum(found.num_tokens[:which])
        tokens = np.load(_piece_path(self._folder, found.index), mmap_mode="r")
        return tokens[start : start + found.num_tokens[which]]

    def report(self) -> str:
        """A short table: what each split has, and what was skipped and why."""
        lines = [f"{'split':8}{'performances':>13}{'compositions':>13}{'hours':>8}{'tokens':>12}"]
        for split, pieces in self.pieces.items():
            compositions = {piece.composition for piece in pieces}
            hours = sum(piece.duration_s for piece in pieces) / 3600
            which = self._stretches[split].index(1.0)
            tokens = sum(piece.num_tokens[which] for piece in pieces)
            lines.append(f"{split:8}{len(pieces):13}{len(compositions):13}{hours:8.1f}{tokens:12}")
        lines.append(f"skipped {len(self.skipped):13}" + (", the first of them:" if len(self.skipped) > 5 else ""))
        lines += [f"  {file.name}: {file.reason}" for file in self.skipped[:5]]
        return "\n".join(lines)


def write_event_dataset(
    source: PerformanceSource,
    folder: str | os.PathLike,
    vocabulary: EventVocabulary,
    stretches: Sequence[float] = STRETCHES,
    num_workers: int | None = None,
) -> EventDataset:
    """Reads, pedals, stretches and encodes all files of a source, each in one of several processes.

    A run that was killed goes on where it was: what is lost is the file that each process had in hand. A dataset that
    is there already is not written again. Files that are no MIDI, have no notes, or have notes that the vocabulary does
    not have are skipped and reported.

    Args:
      source: of the performances.
      folder: made if missing.
      vocabulary: of the tokens.
      stretches: factors of all times for the training split, 1.0 among them; the other splits have 1.0 alone.
      num_workers: processes; None takes one for each core, 1 none but this one.

    Returns:
      The dataset.

    Raises:
      EventDatasetError: the folder was begun with another vocabulary, other stretches or other files (names both of
        each that differs); stretches without 1.0, twice, or not positive; more ids than int16 holds; no process.
      PerformanceError: a file changed since it was listed.
    """
    stretches = tuple(float(factor) for factor in stretches)
    if 1.0 not in stretches or len(set(stretches)) < len(stretches) or min(stretches) <= 0:
        raise EventDatasetError(f"stretches are {stretches}; expected positive factors, each once, 1.0 among them")
    if vocabulary.size > np.iinfo(np.int16).max + 1:
        raise EventDatasetError(f"{vocabulary} has {vocabulary.size} ids; int16 holds 32768")
    num_workers = os.cpu_count() or 1 if num_workers is None else num_workers
    if num_workers < 1:
        raise EventDatasetError(f"num_workers is {num_workers}; expected 1 or more")
    folder = pathlib.Path(folder)
    settings = _settings(source, vocabulary, stretches)
    _check_settings(folder, settings)
    if (folder / "manifest.json").is_file():
        return EventDataset(folder)
    todo = [index for index in range(len(source.files)) if not _line_path(folder, index).is_file()]
    shares = [todo[first::num_workers] for first in range(min(num_workers, len(todo)))]
    if len(shares) < 2:
        for share in shares:
            _write_pieces(source, folder, vocabulary, stretches, share)
    else:
        # Not by fork: the caller may have threads, JAX's among them, whose locks a fork would copy.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(len(shares), context) as pool:
            runs = [pool.submit(_write_pieces, source, folder, vocabulary, stretches, share) for share in shares]
            for run in concurrent.futures.as_completed(runs):
                run.result()
    _write_manifest(source, folder, settings)
    return EventDataset(folder)


def _settings(source: PerformanceSource, vocabulary: EventVocabulary, stretches: tuple[float, ...]) -> dict[str, Any]:
    listed = "\n".join(json.dumps(dataclasses.astuple(file)) for file in source.files)
    return {
        "version": _VERSION,
        "vocabulary": dataclasses.asdict(vocabulary),
        "stretches": {split: list(stretches) if split == "train" else [1.0] for split in SPLITS},
        "num_files": len(source.files),
        "files_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }


def _check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if not path.is_file():
        _write_json(path, settings)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} {there.get(name)} there, {settings.get(name)} now"
        for name in {**settings, **there}
        if there.get(name) != settings.get(name)
    ]
    if changed:
        raise EventDatasetError(f"{folder} was begun with {'; '.join(changed)}. Name another, or ask for the same")


def _write_pieces(
    source: PerformanceSource,
    folder: pathlib.Path,
    vocabulary: EventVocabulary,
    stretches: tuple[float, ...],
    indices: Sequence[int],
) -> None:
    """What one process does: each of the files in turn, its tokens first and then what there is to say of it."""
    parent = multiprocessing.parent_process()
    with source.reader() as read:
        for index in indices:
            if parent is not None and not parent.is_alive():
                return  # it was killed, and who runs it again should not find us at its files
            file = source.files[index]
            content = read(file)
            try:
                line, tokens = _encoded(content, vocabulary, stretches if file.split == "train" else (1.0,))
            except ValueError as error:  # MidiError, or a pitch that the vocabulary does not have
                line = {"reason": str(error)}
            else:
                with atomic_path(_piece_path(folder, index)) as temporary:
                    np.save(temporary, tokens)
            _write_json(_line_path(folder, index), line)


def _encoded(content: bytes, vocabulary: EventVocabulary, stretches: Sequence[float]) -> tuple[dict, np.ndarray]:
    performance = read_performance(content)
    notes = apply_sustain(performance)
    tokens = [encode_events(stretch(notes, factor), vocabulary) for factor in stretches]
    line = {
        "duration_s": float(notes.end_s.max()),
        "num_notes": len(notes),
        "num_dropped": performance.num_dropped,
        "lowest_pitch": int(notes.pitch.min()),
        "highest_pitch": int(notes.pitch.max()),
        "num_tokens": [len(row) for row in tokens],
    }
    return line, np.concatenate(tokens).astype(np.int16)


def _write_manifest(source: PerformanceSource, folder: pathlib.Path, settings: dict[str, Any]) -> None:
    pieces: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    skipped = list(source.skipped)
    for index, file in enumerate(source.files):
        line = json.loads(_line_path(folder, index).read_text(encoding="utf-8"))
        if "reason" in line:
            skipped.append(SkippedFile(file.name, line["reason"]))
        else:
            pieces[file.split].append({"index": index, "name": file.name, "composition": file.composition} | line)
    skipped.sort(key=lambda file: file.name)
    manifest = settings | {"pieces": pieces, "skipped": [dataclasses.asdict(file) for file in skipped]}
    _write_json(folder / "manifest.json", manifest)


def _write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def _piece_path(folder: pathlib.Path, index: int) -> pathlib.Path:
    return folder / "pieces" / f"{index:05d}.npy"


def _line_path(folder: pathlib.Path, index: int) -> pathlib.Path:
    return _piece_path(folder, index).with_suffix(".json")
