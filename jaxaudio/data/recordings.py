"""Recordings of a folder, a zip or a list, decoded once at a model's rate and channels, in memory or a mapped file."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np

from jaxaudio.data.audio import RESAMPLER
from jaxaudio.data.decoders import AudioError, open_audio
from jaxaudio.data.files import atomic_path
from jaxaudio.data.manifests import read_manifest

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """A decoded recording.

    Attributes:
      name: of the file below the folder or list that it was found in; of a zip's member "archive.zip/member.wav".
      waveform: (A, channels) float32; samples beyond full scale stay.
      sample_rate: Hz.
      peak: largest magnitude.
    """

    name: str
    waveform: np.ndarray
    sample_rate: int
    peak: float


def list_recordings(source: str | os.PathLike) -> list[str]:
    """Names of all recordings in a folder and the folders and zips in it, in a zip, or of a list (.jsonl), sorted.

    A recording is what is called .wav, .flac, .ogg or .mp3. A list gives its paths relative to its own folder.

    Raises:
      AudioError: there is no such file or folder, a zip that is none, or no recording.
      ManifestError: as `manifests.read_manifest`.
    """
    source = pathlib.Path(source).expanduser()
    if not source.exists():
        raise AudioError(f"{source}: there is no such folder or file; expected recordings, a zip of them or a list.")
    if source.suffix == ".jsonl":
        names = [os.path.relpath(utterance.audio, source.parent) for utterance in read_manifest(source)]
        names = sorted(set(names))
    elif source.is_dir():
        files = (path for path in source.rglob("*") if path.is_file())
        names = sorted(name for path in files for name in _names(path, path.relative_to(source).as_posix()))
    else:
        names = sorted(_names(source, source.name))
    if not names:
        raise AudioError(f"{source}: has no recording; expected files called {', '.join(SUFFIXES)}, or zips of them.")
    return names


def _names(path: pathlib.Path, name: str) -> list[str]:
    if path.suffix.lower() != ".zip":
        return [name] if path.suffix.lower() in SUFFIXES else []
    with _open_zip(path) as archive:
        return [f"{name}/{member}" for member in archive.namelist() if member.lower().endswith(SUFFIXES)]


def load_recordings(
    source: str | os.PathLike,
    names: Sequence[str],
    *,
    sample_rate: int,
    channels: int = 1,
    cache_dir: str | os.PathLike | None = None,
) -> list[Recording]:
    """Decodes and resamples (`data.audio.RESAMPLER`) recordings that `list_recordings` named, in the order given.

    One channel is the mean of a file's; a mono file gives every channel asked for.

    Args:
      source: as for `list_recordings`.
      names: of it.
      sample_rate: of the result, in Hz.
      channels: of the result.
      cache_dir: keeps all samples in one file there, which is mapped instead of held in memory and which later calls
        of the same files, sizes and times of change read. None keeps them in memory.
    Raises:
      AudioError: recordings that cannot be read; names every one of them with its reason.
    """
    root = pathlib.Path(source).expanduser()
    folder = root if root.is_dir() else root.parent
    if cache_dir is None:
        waveforms = list(_decode_all(folder, names, sample_rate, channels))
    else:
        waveforms = _cached(folder, names, sample_rate, channels, pathlib.Path(cache_dir).expanduser())
    return [
        Recording(name, waveform, sample_rate, float(np.abs(waveform).max()))
        for name, waveform in zip(names, waveforms, strict=True)
    ]


def _decode_all(folder: pathlib.Path, names: Sequence[str], sample_rate: int, channels: int) -> Iterator[np.ndarray]:
    """Waveforms in order; goes on after a recording that cannot be read, to name all of them in one error."""
    archives: dict[pathlib.Path, zipfile.ZipFile] = {}
    errors = []
    try:
        for name in names:
            try:
                samples, rate = _read(folder, name, archives)
                yield _conform(name, samples, rate, sample_rate, channels)
            except AudioError as error:
                errors.append(str(error))
    finally:
        for archive in archives.values():
            archive.close()
    if errors:
        raise AudioError(
            f"{len(errors)} of {len(names)} recordings cannot be read; mend, remove or exclude them:\n  "
            + "\n  ".join(errors)
        )


def _read(folder: pathlib.Path, name: str, archives: dict[pathlib.Path, zipfile.ZipFile]) -> tuple[np.ndarray, int]:
    """Samples (A, channels) at the file's own rate, and the rate."""
    file, zipped, member = name.partition(".zip/")
    if not zipped:
        with open_audio(folder / name) as source:
            return np.concatenate(list(source.chunks)), source.info.sample_rate
    import soundfile

    path = folder / f"{file}.zip"
    if path not in archives:
        archives[path] = _open_zip(path)
    try:
        return soundfile.read(io.BytesIO(archives[path].read(member)), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, KeyError, zipfile.BadZipFile) as error:
        raise AudioError(f"{path}/{member}: cannot be read ({error}); pack it again.") from error


def _open_zip(path: pathlib.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise AudioError(f"{path}: is no zip that can be read ({error}); pack or copy it again.") from error


def _conform(name: str, samples: np.ndarray, rate: int, sample_rate: int, channels: int) -> np.ndarray:
    if not np.isfinite(samples).all():
        first = int(np.argmin(np.isfinite(samples).all(axis=1)))
        raise AudioError(f"{name}: a sample at {first / rate:.4f} s is not finite; export the file again, or mend it.")
    if channels == 1:
        samples = samples.mean(axis=1, keepdims=True)
    elif samples.shape[1] == 1:
        samples = np.repeat(samples, channels, axis=1)
    elif samples.shape[1] != channels:
        raise AudioError(f"{name}: has {samples.shape[1]} channels; expected {channels}, or 1. Mix it down.")
    if rate != sample_rate:
        import soxr

        samples = soxr.resample(samples, rate, sample_rate, quality=RESAMPLER.split()[-1])
    if not len(samples):
        raise AudioError(f"{name}: is shorter than one sample at {sample_rate} Hz; expected audio that lasts.")
    return np.asarray(samples, np.float32)


def _cached(
    folder: pathlib.Path, names: Sequence[str], sample_rate: int, channels: int, cache_dir: pathlib.Path
) -> list[np.ndarray]:
    files = sorted({folder / (name.partition(".zip/")[0] + ".zip" if ".zip/" in name else name) for name in names})
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    key = json.dumps([facts, list(names), sample_rate, channels, RESAMPLER])
    path = cache_dir / f"recordings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.float32"
    lengths_path = path.with_suffix(".json")
    if not lengths_path.exists():
        lengths = []
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for waveform in _decode_all(folder, names, sample_rate, channels):
                file.write(np.ascontiguousarray(waveform).tobytes())
                lengths.append(len(waveform))
        with atomic_path(lengths_path) as temporary:  # written last: where it is, the samples are whole
            temporary.write_text(json.dumps(lengths))
    lengths = json.loads(lengths_path.read_text())
    samples = np.memmap(path, np.float32, "r", shape=(sum(lengths), channels))
    ends = np.cumsum(lengths).tolist()
    return [samples[end - length : end] for end, length in zip(ends, lengths, strict=True)]
