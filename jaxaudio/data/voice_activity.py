"""Where somebody speaks: detectors over blocks of 16 kHz audio, and clips made of what they find.

A detector is a callable that takes an iterable of mono float32 blocks (A,) at 16 kHz, of any lengths (such as
`jaxaudio.data.audio.read_blocks` gives), and returns a list of (start_s, end_s), sorted and apart. It keeps a number
per hop of audio, never the audio, and what it finds does not depend on the lengths of the blocks.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxaudio.data.audio import SAMPLE_RATE

if TYPE_CHECKING:
    import onnxruntime

Spans = list[tuple[float, float]]

_ENERGY_HOP = 160  # 10 ms
_SILERO_HOP, _SILERO_CONTEXT = 512, 64  # fixed by the model: 32 ms, preceded by the last 4 ms of the window before
_CUTTING_SILENCE = round(0.098 * SAMPLE_RATE)  # a silence longer than this is where too long a stretch is cut


@dataclasses.dataclass(frozen=True)
class EnergyDetector:
    """Speech as what is loud for its recording. Needs no model, and takes music and noise that stand out for speech.

    The level of a hop of 10 ms is the mean power of the 30 ms around it, in dB below full scale, at least `floor_db`.
    The recording's noise is the 10th percentile of its levels and its speech the 99th. Speech starts where the level
    reaches noise + threshold * (speech - noise) and ends where it falls below noise + silence_threshold * (speech -
    noise). A recording whose speech is less than `min_range_db` above its noise has no pauses to find: all of it that
    is louder than `floor_db` is speech, so that nothing is lost.

    Attributes:
      threshold: Share of the way from noise to speech at which speech starts.
      silence_threshold: Share below which it ends.
      floor_db: What is quieter is silence, whatever the rest is like.
      min_range_db: Distance from noise to speech below which the two are not told apart.
      min_speech_s: Stretches that are not longer are dropped.
      min_silence_s: Shorter silences do not end a stretch.
      pad_s: Added before and after every stretch; where two would overlap they meet in the middle.
      max_speech_s: Longer stretches, padding included, are cut: where the last silence of 0.1 s began, or else hard.

    Raises:
      ValueError: A threshold or duration that makes no sense; has it.
    """

    threshold: float = 0.3
    silence_threshold: float = 0.2
    floor_db: float = -80.0
    min_range_db: float = 6.0
    min_speech_s: float = 0.1
    min_silence_s: float = 0.5
    pad_s: float = 0.2
    max_speech_s: float = 30.0

    def __post_init__(self):
        _check_rules(self)

    def __call__(self, blocks: Iterable[np.ndarray]) -> Spans:
        """Finds speech; see the class."""
        energies, num_samples = [np.zeros(0)], 0
        for piece in _whole_hops(blocks, _ENERGY_HOP):
            num_samples += len(piece)
            if len(piece):
                hops = piece.reshape(-1, min(len(piece), _ENERGY_HOP)).astype(np.float64)
                energies.append(np.square(hops).sum(axis=1))
        if not num_samples:
            return []
        levels = self._levels_db(np.concatenate(energies), num_samples)
        noise, speech = np.percentile(levels, [10, 99])
        starts_at = noise + self.threshold * (speech - noise)
        ends_below = noise + self.silence_threshold * (speech - noise)
        if speech - noise < self.min_range_db:
            starts_at = ends_below = np.nextafter(self.floor_db, math.inf)
        return _stretches(levels, _ENERGY_HOP, num_samples, starts_at, ends_below, self)

    def _levels_db(self, energies: np.ndarray, num_samples: int) -> np.ndarray:
        """Mean power of each hop and its neighbours in dB; the first and the last hop have one neighbour."""
        sizes = np.full(len(energies), _ENERGY_HOP)
        sizes[-1] = num_samples - _ENERGY_HOP * (len(energies) - 1)
        power = np.convolve(energies, np.ones(3))[1:-1] / np.convolve(sizes, np.ones(3))[1:-1]
        return np.maximum(10 * np.log10(np.maximum(power, 1e-20)), self.floor_db)


@dataclasses.dataclass(frozen=True)
class SileroDetector:
    """Speech as found by Silero VAD (https://github.com/snakers4/silero-vad), versions 5 and 6, from its ONNX file.

    The model gives one probability per 32 ms. The rules that make stretches of them are those of faster-whisper's
    `get_speech_timestamps`, which has other names for some of them (in parentheses).

    Attributes:
      path: The file. Either layout: inputs `input`, `state` and perhaps `sr` (silero_vad.onnx), one window at a time;
        or `input`, `h` and `c`, a sequence of windows at once, which is about twice as fast.
      threshold: Probability at which speech starts.
      silence_threshold: Probability below which it ends (neg_threshold).
      min_speech_s: Stretches that are not longer are dropped.
      min_silence_s: Shorter silences do not end a stretch.
      pad_s: Added before and after every stretch; where two would overlap they meet in the middle (speech_pad_ms).
      max_speech_s: Longer stretches, padding included, are cut: where the last silence of 0.1 s began, or else hard.

    Raises:
      ValueError: There is no such file, or it is not such a model (has its inputs); a threshold or duration that
        makes no sense (has it).
      ImportError: onnxruntime is not installed.
    """

    path: str | os.PathLike
    threshold: float = 0.5
    silence_threshold: float = 0.35
    min_speech_s: float = 0.0
    min_silence_s: float = 2.0
    pad_s: float = 0.4
    max_speech_s: float = 30.0

    def __post_init__(self):
        _check_rules(self)
        _silero_session(os.fspath(self.path))  # a wrong file is reported before hours of audio are decoded

    def __call__(self, blocks: Iterable[np.ndarray]) -> Spans:
        """Finds speech; see the class."""
        num_samples = 0

        def counted() -> Iterator[np.ndarray]:
            nonlocal num_samples
            for block in blocks:
                num_samples += len(block)
                yield block

        session = _silero_session(os.fspath(self.path))
        scores = np.concatenate(list(_probabilities(session, _silero_windows(counted()))))
        if not num_samples:
            return []
        return _stretches(scores, _SILERO_HOP, num_samples, self.threshold, self.silence_threshold, self)


def merge_spans(spans: Sequence[tuple[float, float]], max_s: float) -> Spans:
    """Joins spans to clips no longer than `max_s`, from the first on; nothing of a span is lost.

    A clip begins where a span begins and takes in the next spans, and the pauses between, while it is short enough.
    A span longer than `max_s` is cut every `max_s` seconds, and what is left of it joins the spans after it.

    Args:
      spans: (start_s, end_s), sorted by start. Where one overlaps the one before, only what is new counts.
      max_s: Seconds of the longest clip.

    Returns:
      (start_s, end_s) of the clips, sorted and apart.

    Raises:
      ValueError: `max_s` is not positive, or a span is empty, starts before 0 or before its predecessor (has it).
    """
    if not max_s > 0:
        raise ValueError(f"max_s={max_s}; expected a positive number of seconds.")
    clips, previous_start = [], 0.0
    for start, end in spans:
        if not previous_start <= start < end:
            raise ValueError(
                f"The span {(start, end)} is empty or not sorted; expected {previous_start} <= start < end. Sort them."
            )
        previous_start = start
        if clips and start < clips[-1][1]:
            start = clips[-1][1]
        if clips and start < end and end - clips[-1][0] <= max_s:
            clips[-1] = (clips[-1][0], end)
            continue
        while end - start > max_s:
            clips.append((start, start + max_s))
            start += max_s
        if start < end:
            clips.append((start, end))
    return clips


def _check_rules(detector: EnergyDetector | SileroDetector) -> None:
    name = type(detector).__name__
    if not 0 <= detector.silence_threshold <= detector.threshold <= 1:
        raise ValueError(
            f"{name}: threshold={detector.threshold} and silence_threshold={detector.silence_threshold}; expected "
            "0 <= silence_threshold <= threshold <= 1."
        )
    for field in ("min_speech_s", "min_silence_s", "pad_s"):
        if not getattr(detector, field) >= 0:
            raise ValueError(f"{name}: {field}={getattr(detector, field)}; expected a number of seconds, 0 or more.")
    if not detector.max_speech_s > 2 * detector.pad_s + 0.1:
        raise ValueError(
            f"{name}: max_speech_s={detector.max_speech_s} leaves no room for speech between the padding; expected "
            f"more than 2 * pad_s + 0.1 = {2 * detector.pad_s + 0.1}."
        )


def _whole_hops(blocks: Iterable[np.ndarray], hop: int) -> Iterator[np.ndarray]:
    """The same samples in pieces of whole hops; after them a last piece, shorter than a hop and perhaps empty."""
    rest = np.zeros(0, np.float32)
    for block in blocks:
        joined = np.concatenate([rest, block])
        whole = len(joined) // hop * hop
        if whole:
            yield joined[:whole]
        rest = joined[whole:]
    yield rest


def _stretches(
    scores: np.ndarray,
    hop: int,
    num_samples: int,
    starts_at: float,
    ends_below: float,
    rules: EnergyDetector | SileroDetector,
) -> Spans:
    """Stretches of speech from a score per hop, padded, in seconds; `rules` has the durations."""
    min_speech, min_silence, pad = (
        round(seconds * SAMPLE_RATE) for seconds in (rules.min_speech_s, rules.min_silence_s, rules.pad_s)
    )
    longest = rules.max_speech_s * SAMPLE_RATE - hop - 2 * pad
    found = []
    # Where the stretch began; where the silence that may end it began; where it can be cut, that is where its last
    # silence of some length began, and where speech went on after that.
    start = silence = cut = resumption = None
    for index, score in enumerate(scores.tolist()):
        at = index * hop
        if score >= starts_at:
            if silence is not None:
                silence = None
                if cut is not None and resumption is None:
                    resumption = at
            if start is None:
                start = at
                continue
        if start is None:
            continue
        if at - start > longest:
            found.append((start, at if cut is None else cut))
            start, silence, cut, resumption = resumption, None, None, None
            if start is None:
                continue
        if score < ends_below:
            silence = at if silence is None else silence
            if at - silence > _CUTTING_SILENCE and cut != silence:
                cut, resumption = silence, None
            if at - silence >= min_silence:
                if silence - start > min_speech:
                    found.append((start, silence))
                start = silence = cut = resumption = None
    if start is not None and num_samples - start > min_speech:
        found.append((start, num_samples))
    return [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in _padded(found, pad, num_samples)]


def _padded(found: list[tuple[int, int]], pad: int, num_samples: int) -> list[tuple[int, int]]:
    """Stretches grown by `pad` samples on both sides; neighbours with less than that between them share the gap."""
    starts = [start for start, _ in found]
    ends = [end for _, end in found]
    for i, (end, start) in enumerate(zip(ends[:-1], starts[1:], strict=True)):
        grown = pad if start - end >= 2 * pad else (start - end) // 2
        ends[i], starts[i + 1] = end + grown, start - grown
    if found:
        starts[0], ends[-1] = max(0, starts[0] - pad), min(num_samples, ends[-1] + pad)
    return list(zip(starts, ends, strict=True))


@functools.lru_cache(maxsize=4)
def _silero_session(path: str) -> "onnxruntime.InferenceSession":
    """The model; it holds no state, so one serves every file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("SileroDetector needs the package onnxruntime: pip install 'jaxaudio[vad]'.") from error
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file; expected Silero's ONNX model, such as silero_vad.onnx.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the model is too small for more
    options.log_severity_level = 3  # without warnings about how the file was exported
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, which have no common base
        raise ValueError(f"{path}: onnxruntime cannot load it ({error}); expected Silero's ONNX model.") from error
    names = {entry.name for entry in session.get_inputs()}
    if names - {"sr"} != {"input", "state"} and names != {"input", "h", "c"}:
        raise ValueError(
            f"{path}: the model's inputs are {', '.join(sorted(names))}; expected input, state (and sr), or input, h, "
            "c: Silero VAD of version 5 or 6."
        )
    return session


def _silero_windows(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Batches (W, 64 + 512) of windows, each after the last samples of the one before.

    The rest is filled up with zeros to a last window; it is one of zeros where nothing is left, as in faster-whisper.
    """
    context = np.zeros(_SILERO_CONTEXT, np.float32)
    for piece in _whole_hops(blocks, _SILERO_HOP):
        missing = _SILERO_HOP - len(piece) if len(piece) < _SILERO_HOP else 0
        windows = np.pad(piece, (0, missing)).reshape(-1, _SILERO_HOP)
        contexts = np.concatenate([context[None], windows[:-1, -_SILERO_CONTEXT:]])
        context = windows[-1, -_SILERO_CONTEXT:]
        yield np.concatenate([contexts, windows], axis=1)


def _probabilities(session: "onnxruntime.InferenceSession", batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Probabilities of speech (W,) of each batch of windows, or of each window of it."""
    names = {entry.name for entry in session.get_inputs()}
    if "h" in names:
        h = c = np.zeros((1, 1, 128), np.float32)
        for batch in batches:
            scores, h, c = session.run(None, {"input": batch, "h": h, "c": c})
            yield scores.reshape(-1)
        return
    rate = {"sr": np.array(SAMPLE_RATE)} if "sr" in names else {}
    state = np.zeros((2, 1, 128), np.float32)
    for batch in batches:
        for window in batch:
            score, state = session.run(None, {"input": window[None], "state": state, **rate})
            yield score.reshape(-1)
