"""MIDI files to event ids: our throughput beside note-seq's, both on one thread.

Run:   python -m experiments.benchmarks.events PERFORMANCES [--num_files 20] [--repeats 3]

PERFORMANCES is a folder or a zip of MIDI files, such as MAESTRO or ASAP. Of its files, ordered by size, `num_files` are
taken at equal distances. A call turns them all from files into ids of the 310-symbol vocabulary, pedal applied; first
both must give the same ids. `note_seq_peer.py` says how to install note-seq.
"""

import argparse
import pathlib
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.benchmarks import note_seq_peer
from experiments.benchmarks.timing import Timing, interleaved, table
from jaxaudio.data.events import MAGENTA, apply_sustain, encode_events
from jaxaudio.data.midi_performance import read_performance


class Results(NamedTuple):
    """What `main` measured.

    num_events: of all files together.
    timings: of "jaxaudio" and "note-seq".
    ratio: of the fastest calls, note-seq's time over ours.
    """

    num_events: int
    timings: dict[str, Timing]
    ratio: float


def choose(folder: pathlib.Path, num_files: int) -> list[pathlib.Path]:
    """Paths of `num_files` MIDI files from the smallest to the largest.

    Raises:
      ValueError: there are fewer; with how many.
    """
    found = [path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi")]
    if not 0 < num_files <= len(found):
        raise ValueError(f"{num_files} files cannot be taken from the {len(found)} MIDI files of {folder}")
    found.sort(key=lambda path: (path.stat().st_size, path))
    return [found[index] for index in np.linspace(0, len(found) - 1, num_files).astype(int)]


def ours(paths: Sequence[pathlib.Path]) -> list[list[int]]:
    """Ids of each file."""
    return [encode_events(apply_sustain(read_performance(path)), MAGENTA).tolist() for path in paths]


def theirs(paths: Sequence[pathlib.Path]) -> list[list[int]]:
    """Ids of each file by note-seq."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # pretty_midi's, of tempo changes outside of the first track
        sequences = (note_seq_peer.read_sequence(path) for path in paths)
        return [note_seq_peer.ids(note_seq_peer.events(sequence, MAGENTA), MAGENTA) for sequence in sequences]


def _check(outputs: dict[str, object]) -> None:
    if outputs["jaxaudio"] != outputs["note-seq"]:
        raise ValueError("note-seq gives other events for these files; there is nothing to compare")


def main(arguments: argparse.Namespace) -> Results:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as extracted:
        folder = arguments.performances
        if folder.is_file():
            with zipfile.ZipFile(folder) as archive:
                archive.extractall(extracted)
            folder = pathlib.Path(extracted)
        paths = choose(folder, arguments.num_files)
        num_events = sum(map(len, ours(paths)))
        calls = {"jaxaudio": lambda: ours(paths), "note-seq": lambda: theirs(paths)}
        timings = interleaved(calls, arguments.repeats, check=_check)
    rows = [
        [name, f"{timing.min_s:.3f}", f"{timing.median_s:.3f}", f"{num_events / timing.min_s:.0f}"]
        for name, timing in timings.items()
    ]
    ratio = timings["note-seq"].min_s / timings["jaxaudio"].min_s
    print(f"{len(paths)} files, {num_events} events, the same from both; {arguments.repeats} interleaved calls each")
    print(table(["MIDI files to events", "min s", "median s", "events/s"], rows))
    print(f"jaxaudio is {ratio:.1f} times faster (wanted: at least 5)")
    return Results(num_events, timings, ratio)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("performances", type=pathlib.Path, help="folder or zip of MIDI files")
    parser.add_argument("--num_files", type=int, default=20, help="taken from small to large (default 20)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each (default 3)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
