"""Recordings as codes on disk, which language models of audio read. NumPy, no JAX.

    manifest.json      what the codes mean (`TokenFormat`), the totals, the shards, and the clips that failed
    settings.json      what was asked for; written first, so that nothing else is mixed in
    shard-00000.npy    codes (frames, num_codebooks) of the shard's clips, one clip after the other
    shard-00000.jsonl  a line for each clip, as in the list of recordings and in its order; clips that failed come last

A shard holds a fixed part of the list, whoever writes it, and is there when its lines are; the manifest is there when
all shards are.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxaudio.data.audio import RESAMPLER
from jaxaudio.data.files import atomic_path
from jaxaudio.data.manifests import Utterance, from_fields, to_fields


@dataclasses.dataclass(frozen=True)
class TokenFormat:
    """What codes mean.

    Attributes:
      codec: name of the codec.
      config_hash: of its config.
      codebooks_hash: of its codebooks, which differ between two trainings of one config.
      num_codebooks: of each frame, the coarsest first.
      codebook_size: codes are from 0 to codebook_size - 1.
      frame_rate: frames of a second, in Hz; within a segment where there are segments.
      hop_length: samples of a frame.
      sample_rate: of the waveform, in Hz.
      channels: of the waveform.
      scale: whether each segment has a scale, without which its level is lost.
      segment_length, segment_stride: samples of a segment, and from the start of one to the start of the next; None
        where a clip is encoded whole.
    """

    codec: str
    config_hash: str
    codebooks_hash: str
    num_codebooks: int
    codebook_size: int
    frame_rate: float
    hop_length: int
    sample_rate: int
    channels: int
    scale: bool
    segment_length: int | None = None
    segment_stride: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TokenClip:
    """One recording as codes.

    Attributes:
      index: its place in the list of recordings.
      utterance: what the list says of it; its path as seen from the folder of the list.
      codes: (Q, T) int32.
      num_samples: of the waveform, per channel.
      scales: (segments,) float32, None where the format has no scale.
    """

    index: int
    utterance: Utterance
    codes: np.ndarray
    num_samples: int
    scales: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class FailedClip:
    """A recording that could not be encoded, and why."""

    index: int
    utterance: Utterance
    error: str


class TokenDataset:
    """Random access to the clips of a folder; a source for Grain.

    `dataset[i]` is a `TokenClip`, `len(dataset)` their number; clips that failed are not among them.

    Attributes:
      format: what the codes mean.
      failed: the clips that are not here.
      num_frames: of all clips.

    Raises:
      ValueError: the folder has no manifest, or one that this version does not read; has the path and what to do.
      IndexError: no clip has this index.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self._folder = pathlib.Path(folder)
        manifest = _read_manifest(self._folder)
        self.format = TokenFormat(**manifest["format"])
        self.failed = tuple(_failed_clip(line, str(self._folder)) for line in manifest["failed"])
        self.num_frames = manifest["num_frames"]
        self._ends = np.cumsum([shard["num_clips"] for shard in manifest["shards"]])
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> TokenClip:
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {self._folder}, which has {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        if number not in self._shards:
            self._shards[number] = _Shard(self._folder, number)
        return self._shards[number].clip(index - first)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # or the mapped codes would be copied to every worker process


class _Shard:
    """A finished shard, mapped into memory: neither codes nor lines are read before they are asked for."""

    def __init__(self, folder: pathlib.Path, number: int) -> None:
        self._path = _lines_path(folder, number)
        self._codes = np.load(self._path.with_suffix(".npy"), mmap_mode="r")
        self._lines = np.memmap(self._path, np.uint8, mode="r")
        self._ends = np.flatnonzero(self._lines == ord("\n")) + 1

    def clip(self, position: int) -> TokenClip:
        start = self._ends[position - 1] if position else 0
        return _token_clip(
            json.loads(bytes(self._lines[start : self._ends[position]])), self._codes, f"{self._path}:{position + 1}"
        )


class TokenWriter:
    """Writes the shards of a list of recordings, by one process or several, in one run or several.

    Args:
      folder: made if missing.
      token_format: of all codes.
      utterances: the whole list, paths as they shall be remembered.
      clips_per_shard: recordings that a shard stands for.

    Attributes:
      num_shards: of the whole list.

    Raises:
      ValueError: there are codes of another codec, bandwidth, list, size of shards or resampler; names both of each
        that differs.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        token_format: TokenFormat,
        utterances: Sequence[Utterance],
        clips_per_shard: int,
    ) -> None:
        if clips_per_shard < 1 or not utterances:
            raise ValueError(
                f"clips_per_shard is {clips_per_shard} of {len(utterances)} recordings; expected at least 1 of each"
            )
        self._folder, self._format, self._utterances = pathlib.Path(folder), token_format, utterances
        self._clips_per_shard = clips_per_shard
        self.num_shards = -(-len(utterances) // clips_per_shard)
        listed = "\n".join(json.dumps(to_fields(utterance), sort_keys=True) for utterance in utterances)
        settings = dataclasses.asdict(token_format) | {
            "num_recordings": len(utterances),
            "list_sha256": hashlib.sha256(listed.encode()).hexdigest(),
            "clips_per_shard": clips_per_shard,
            "resampler": RESAMPLER,
        }
        path = self._folder / "settings.json"
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
        changed = [
            f"{name} {there.get(name)!r} there, {settings.get(name)!r} now"
            for name in {**settings, **there}
            if there.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(f"{folder} was begun with {'; '.join(changed)}. Name another folder, or ask for the same")
        if not path.exists():
            _write_json(path, settings)

    def todo(self, number: int) -> list[int]:
        """Which recordings of a shard have no codes yet, by their places in the list."""
        done = {clip.index for clip in self._kept(number)}
        first = number * self._clips_per_shard
        last = min(first + self._clips_per_shard, len(self._utterances))
        return [index for index in range(first, last) if index not in done]

    def write(self, number: int, results: Sequence[TokenClip | FailedClip]) -> None:
        """Writes a shard from the results of what was to do, beside the clips that it had.

        Raises:
          ValueError: other recordings than those of `todo`, or codes that are not of the format; has them.
        """
        todo = self.todo(number)
        if sorted(result.index for result in results) != todo:
            raise ValueError(f"shard {number}: expected recordings {todo}, got {[result.index for result in results]}")
        clips = [*self._kept(number), *(result for result in results if isinstance(result, TokenClip))]
        failed = [result for result in results if isinstance(result, FailedClip)]
        clips.sort(key=lambda clip: clip.index)
        failed.sort(key=lambda clip: clip.index)
        for clip in clips:
            self._check(clip)
        codes = [np.zeros((0, self._format.num_codebooks), np.int32), *(clip.codes.T for clip in clips)]
        starts = np.cumsum([len(frames) for frames in codes])
        lines = [_clip_line(clip, int(start)) for clip, start in zip(clips, starts, strict=False)]
        lines += [_failed_line(clip) for clip in failed]
        path = _lines_path(self._folder, number)
        # From here on neither the shard nor the whole is there, until they are whole again.
        (self._folder / "manifest.json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        with atomic_path(path.with_suffix(".npy")) as temporary:
            np.save(temporary, np.concatenate(codes).astype(np.min_scalar_type(self._format.codebook_size - 1)))
        with atomic_path(path) as temporary:
            temporary.write_text("".join(_json_line(line) for line in lines), encoding="utf-8")

    def finish(self) -> dict[str, Any] | None:
        """Writes the manifest and returns it, or None while there are shards missing: another process will write it.

        Whoever writes it, it is the same.
        """
        paths = [_lines_path(self._folder, number) for number in range(self.num_shards)]
        if not all(path.exists() for path in paths):
            return None
        shards, failed = [], []
        for path in paths:
            lines = _read_lines(path)
            frames = [line["num_frames"] for line in lines if "error" not in line]
            shards.append({"name": path.stem, "num_clips": len(frames), "num_frames": sum(frames)})
            failed += [line for line in lines if "error" in line]
        manifest = {
            "version": 1,
            "format": dataclasses.asdict(self._format),
            "resampler": RESAMPLER,
            "num_clips": sum(shard["num_clips"] for shard in shards),
            "num_frames": sum(shard["num_frames"] for shard in shards),
            "shards": shards,
            "failed": failed,
        }
        _write_json(self._folder / "manifest.json", manifest)
        return manifest

    def _kept(self, number: int) -> list[TokenClip]:
        """The clips of a shard as they are on disk; none while it is not there."""
        path = _lines_path(self._folder, number)
        if not path.exists():
            return []
        codes = np.load(path.with_suffix(".npy"))
        return [_token_clip(line, codes, str(path)) for line in _read_lines(path) if "error" not in line]

    def _check(self, clip: TokenClip) -> None:
        expected, codes = self._format, clip.codes
        if codes.ndim != 2 or len(codes) != expected.num_codebooks or codes.dtype != np.int32:
            raise ValueError(
                f"recording {clip.index}: codes are {codes.dtype} {codes.shape}; expected int32 "
                f"({expected.num_codebooks}, T)"
            )
        if codes.size and not 0 <= codes.min() <= codes.max() < expected.codebook_size:
            raise ValueError(
                f"recording {clip.index}: codes are from {codes.min()} to {codes.max()}; expected 0 to "
                f"{expected.codebook_size - 1}"
            )
        if (clip.scales is not None) != expected.scale:
            raise ValueError(f"recording {clip.index}: scales are {clip.scales}; expected some is {expected.scale}")


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        begun = (folder / "settings.json").exists()
        reason = "some of its shards are missing; run the same `jaxaudio tokenize` to its end"
        raise ValueError(
            f"{folder}: has no manifest.json: {reason if begun else 'expected a folder that `jaxaudio tokenize` wrote'}"
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("version") != 1:
        raise ValueError(f"{path}: version is {manifest.get('version')!r}; expected 1, or a newer jaxaudio")
    return manifest


def _lines_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"shard-{number:05d}.jsonl"


def _clip_line(clip: TokenClip, start_frame: int) -> dict[str, Any]:
    return {
        "index": clip.index,
        **to_fields(clip.utterance),
        "num_frames": clip.codes.shape[1],
        "num_samples": clip.num_samples,
        "start_frame": start_frame,
        "scales": None if clip.scales is None else [float(scale) for scale in clip.scales],
    }


def _token_clip(line: dict[str, Any], codes: np.ndarray, where: str) -> TokenClip:
    index, num_samples, scales = line.pop("index"), line.pop("num_samples"), line.pop("scales")
    start, num_frames = line.pop("start_frame"), line.pop("num_frames")
    if start + num_frames > len(codes):
        raise ValueError(f"{where}: frames {start} to {start + num_frames} of {len(codes)}; the shard is damaged")
    return TokenClip(
        index,
        from_fields(line, where),
        np.ascontiguousarray(codes[start : start + num_frames].T, np.int32),
        num_samples,
        None if scales is None else np.array(scales, np.float32),
    )


def _failed_line(clip: FailedClip) -> dict[str, Any]:
    return {"index": clip.index, **to_fields(clip.utterance), "error": clip.error}


def _failed_clip(line: dict[str, Any], where: str) -> FailedClip:
    fields = {name: value for name, value in line.items() if name not in ("index", "error")}
    return FailedClip(line["index"], from_fields(fields, where), line["error"])


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
