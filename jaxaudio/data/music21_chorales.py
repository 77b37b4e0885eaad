"""The four-part Bach chorales that ship inside the music21 package, on a grid of 16th notes.

They need no download, but they are not the JSB data set and this split is not its split: most JSB chorales, its test
set included, are among them in some key. Numbers reached here compare with numbers reached here only, and a model
trained on these must not be evaluated on JSB.

A score is read as written: repeats are not expanded, grace notes (which have no length) are left out, and a step holds
what sounds at its beginning.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxaudio.data.chorales import NUM_VOICES, REST, STEPS_PER_BEAT, ChoraleError, check_grid
from jaxaudio.data.files import atomic_path

SPLITS = ("train", "valid", "test")
NOT_JSB = "own split of the chorales in music21, by chorale; not the JSB split, and not comparable with JSB results"
NUM_CHORDS = 8  # chords in a row by which two settings of one chorale are recognised
_FORMAT = 1  # raise it when gridding changes, so that no older cache is read


@dataclasses.dataclass(frozen=True)
class Music21Chorales:
    """The usable chorales by split, and what was left out.

    Attributes:
        splits: {"train", "valid", "test"} to grids (T, 4) int32, MIDI pitch or -1 for a rest, voices S A T B.
        names: The same keys to file names, such as "bwv66.6.mxl", in the order of the grids.
        unusable: File name to the reason why it is in no split.
        music21_version: Version of the package that the scores come from.
        description: Says what this split is, for reports.
    """

    splits: Mapping[str, tuple[np.ndarray, ...]]
    names: Mapping[str, tuple[str, ...]]
    unusable: Mapping[str, str]
    music21_version: str
    description: str = NOT_JSB


def load_music21(
    cache_dir: str | os.PathLike, *, num_processes: int = 2, progress: Callable[[int, int], None] | None = None
) -> Music21Chorales:
    """The chorales of the installed music21, parsed once and cached.

    Args:
        cache_dir: Folder for the cache, an .npz without pickles whose name has the music21 version.
        num_processes: Processes that parse; they import neither JAX nor the caller's program.
        progress: Called with (files parsed, files in all); None shows a bar when there is something to parse.

    Raises:
        ValueError: The cached file is damaged (says which; remove it), or no chorale is usable.
        RuntimeError: A parsing process failed (has its exit status).
    """
    import music21

    version = music21.VERSION_STR
    cache = pathlib.Path(cache_dir) / f"music21-{version}-chorales-{_FORMAT}.npz"
    if not cache.exists():
        _write_cache(cache, parse_scores(score_paths(), num_processes=num_processes, progress=progress))
    grids, unusable = _read_cache(cache)
    if not grids:
        raise ValueError(f"None of {len(unusable)} scores in music21 {version} is a usable chorale: {unusable}.")
    members = {split: [] for split in SPLITS}
    for name, split in split_chorales(grids).items():
        members[split].append(name)
    return Music21Chorales(
        splits={split: tuple(grids[name] for name in names) for split, names in members.items()},
        names={split: tuple(names) for split, names in members.items()},
        unusable=unusable,
        music21_version=version,
    )


def score_paths() -> list[pathlib.Path]:
    """The MusicXML scores of Bach in the installed music21, sorted by name.

    The three kern files beside them are second encodings of scores that are there as MusicXML.
    """
    import music21

    folder = pathlib.Path(music21.common.getCorpusFilePath()) / "bach"
    return sorted(path for path in folder.iterdir() if path.suffix in (".mxl", ".xml"))


def parse_scores(
    paths: Sequence[pathlib.Path], *, num_processes: int = 2, progress: Callable[[int, int], None] | None = None
) -> dict[str, np.ndarray | str]:
    """File name to grid (T, 4), or to the reason why the score is no usable chorale; sorted by name.

    Raises:
        ValueError: `num_processes` is less than 1.
        RuntimeError: A parsing process failed; its own message went to stderr.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1.")
    results: dict[str, np.ndarray | str] = {}
    with _reporting(progress, len(paths)) as report:

        def collect(share: Sequence[pathlib.Path], failures: list[int]) -> None:
            # Not multiprocessing: its spawned children import the caller's main module, and with it JAX.
            command = [sys.executable, "-m", "jaxaudio.data.music21_chorales", *map(os.fspath, share)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
                for line in process.stdout:
                    name, grid = json.loads(line)
                    results[name] = grid if isinstance(grid, str) else np.array(grid, np.int32)
                    report()
            if process.returncode:
                failures.append(process.returncode)

        failures: list[int] = []
        shares = [paths[index::num_processes] for index in range(min(num_processes, len(paths)))]
        threads = [threading.Thread(target=collect, args=(share, failures)) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures or len(results) < len(paths):
        raise RuntimeError(
            f"Parsing failed after {len(results)} of {len(paths)} scores, exit status {failures}; see the messages "
            "above."
        )
    return dict(sorted(results.items()))


def grid_score(path: str | os.PathLike) -> np.ndarray:
    """One score as a grid (T, 4) int32 of S A T B, T up to the end of the score.

    Raises:
        ChoraleError: The score has not four parts or no notes, a part sounds two notes at once, or a pitch lies outside
            36..81.
    """
    import music21

    # Neither read nor write music21's own cache: that is a folder of pickles.
    score = music21.converter.parse(os.fspath(path), forceSource=True, storePickle=False)
    if len(score.parts) != NUM_VOICES:
        relation = "fewer" if len(score.parts) < NUM_VOICES else "more"
        raise ChoraleError(f"{relation} than {NUM_VOICES} parts: {len(score.parts)}")
    grid = np.full((math.ceil(score.highestTime * STEPS_PER_BEAT), NUM_VOICES), REST, np.int32)
    for voice, part in enumerate(score.parts):
        for note in part.flatten().notes:
            start = math.ceil(note.offset * STEPS_PER_BEAT)
            end = math.ceil((note.offset + note.quarterLength) * STEPS_PER_BEAT)
            if (grid[start:end, voice] != REST).any() or len(note.pitches) != 1:
                raise ChoraleError(f"part {voice} sounds two notes at once at quarter {float(note.offset):g}")
            grid[start:end, voice] = note.pitches[0].midi
    if (grid == REST).all():
        raise ChoraleError("no notes")
    return check_grid(grid)


def split_chorales(grids: Mapping[str, np.ndarray]) -> dict[str, str]:
    """File name to "train", "valid" or "test": about 80, 10 and 10 in a hundred, the same on every machine.

    Scores of one BWV number stay together, and so do settings that share more than half of the runs of eight chords of
    the shorter one in any key: Bach used some chorales in several works. Each such group is placed by a hash. Another
    harmonisation of the same tune may stand in another split, as in JSB.
    """
    leader = {name: name for name in sorted(grids)}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for left, right in _same_work(leader) + _same_setting(grids):
        first, second = sorted((find(left), find(right)))
        leader[second] = first
    return {name: _hashed_split(find(name)) for name in leader}


def _hashed_split(name: str) -> str:
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return {0: "valid", 1: "test"}.get(bucket, "train")


def _same_work(names: Mapping[str, str]) -> list[tuple[str, str]]:
    first: dict[str, str] = {}
    return [(first.setdefault(re.match(r"(bwv\d+)?", name)[0] or name, name), name) for name in names]


def _same_setting(grids: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    runs = {name: chord_runs(grid) for name, grid in grids.items()}
    having = collections.defaultdict(list)
    for name in sorted(runs):
        for run in runs[name]:
            having[run].append(name)
    shared = collections.Counter(
        (left, right) for names in having.values() for i, left in enumerate(names) for right in names[i + 1 :]
    )
    return [pair for pair, count in shared.items() if 2 * count > min(len(runs[name]) for name in pair)]


def chord_runs(grid: np.ndarray) -> set[bytes]:
    """All runs of eight successive different chords, each relative to the first pitch that sounds in it.

    A piece with fewer chords is one run. Two grids that are transpositions of each other give the same set.
    """
    chords = grid[np.r_[True, (grid[1:] != grid[:-1]).any(axis=1)]]
    runs = set()
    for start in range(max(1, len(chords) - NUM_CHORDS + 1)):
        run = chords[start : start + NUM_CHORDS]
        sounding = run[run != REST]
        runs.add(np.where(run == REST, 1000, run - (sounding[0] if len(sounding) else 0)).astype(np.int16).tobytes())
    return runs


@contextlib.contextmanager
def _reporting(progress: Callable[[int, int], None] | None, total: int) -> Iterator[Callable[[], None]]:
    """A function to call once per parsed file, from any thread."""
    if progress is None:
        from tqdm import tqdm

        with tqdm(total=total, desc="parsing chorales", unit="file") as bar:
            yield bar.update
        return
    lock, parsed = threading.Lock(), 0

    def report() -> None:
        nonlocal parsed
        with lock:
            parsed += 1
            progress(parsed, total)

    yield report


def _write_cache(path: pathlib.Path, results: Mapping[str, np.ndarray | str]) -> None:
    grids = {name: grid for name, grid in results.items() if not isinstance(grid, str)}
    reasons = {name: reason for name, reason in results.items() if isinstance(reason, str)}
    with atomic_path(path) as temporary:
        np.savez_compressed(
            temporary,
            steps=np.concatenate([np.zeros((0, NUM_VOICES), np.int8), *grids.values()]).astype(np.int8),
            num_steps=np.array([len(grid) for grid in grids.values()], np.int64),
            names=np.array(list(grids), str),
            unusable=np.array(list(reasons), str),
            reasons=np.array(list(reasons.values()), str),
        )


def _read_cache(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            *grids, _ = np.split(arrays["steps"], np.cumsum(arrays["num_steps"]))  # nothing follows the last grid
            names = arrays["names"].tolist()
            unusable = dict(zip(arrays["unusable"].tolist(), arrays["reasons"].tolist(), strict=True))
        return {name: check_grid(grid) for name, grid in zip(names, grids, strict=True)}, unusable
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and the scores are parsed again.") from error


def _main(paths: Sequence[str]) -> None:
    """The parsing process: writes one JSON line [name, grid or reason] per score to stdout."""
    for path in map(pathlib.Path, paths):
        try:
            result = grid_score(path).tolist()
        except ChoraleError as error:
            result = str(error)
        print(json.dumps([path.name, result]), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
