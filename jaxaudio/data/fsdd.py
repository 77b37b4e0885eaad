"""Free Spoken Digit Dataset: 3000 recordings of ten English digits by six speakers, and sentences made of them.

github.com/Jakobovski/free-spoken-digit-dataset, `recordings.zip` here: `{digit}_{speaker}_{take}.wav`, mono, 8 kHz. Its
own split: takes 0 to 4 of each digit and speaker are the test set. Of the others we hold out take 5 for validation.
"""

import dataclasses
import io
import os
import pathlib
import re
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from jaxaudio.data.audio import SAMPLE_RATE
from jaxaudio.data.manifests import TimedText
from jaxaudio.data.whisper_examples import TICK_S, Window, token_row, window_tokens
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HOP_LENGTH = 160
NUM_CLIPS = {"train": 2640, "valid": 60, "test": 300}


class FsddError(ValueError):
    """The recordings are missing or not those of the data set; the message says what was expected."""


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """One spoken digit; waveform (A,) float32 at 16 kHz."""

    digit: int
    speaker: str
    take: int
    waveform: np.ndarray


@dataclasses.dataclass(frozen=True)
class SentenceConfig:
    """How training sentences are made of clips; pairs are ranges of uniform draws.

    Attributes:
      window_s: length of the window, which cuts longer sentences.
      num_digits: of a sentence.
      overflow_rate: sentences that go on until the window cuts them.
      empty_rate: windows without speech.
      abrupt_rate: sentences that that begin with the audio, and that end with it, to 20 ms; for the others that takes a
        `lead_s`.
      same_speaker_rate: sentences of one speaker.
      lead_s, pause_s: before the first digit and after the last one, and between digits.
      speed: factors that resample each digit.
      gain_db: of each digit.
      noise_rate: sentences with noise, `noise_db` over the loudest sample of the speech.
      fill_rate: sentences whose audio goes on to the window's end; for the others the window is filled with silence.
      zeroed_rate: of those, how many are filled with zeros in the features, as `transcribe` does, not in the samples.
    """

    window_s: float = 6.0
    num_digits: tuple[int, int] = (1, 6)
    overflow_rate: float = 0.15
    empty_rate: float = 0.04
    abrupt_rate: float = 0.4
    same_speaker_rate: float = 0.5
    lead_s: tuple[float, float] = (0.0, 0.9)
    pause_s: tuple[float, float] = (0.04, 0.7)
    speed: tuple[float, float] = (0.9, 1.12)
    gain_db: tuple[float, float] = (-8.0, 8.0)
    noise_rate: float = 0.6
    noise_db: tuple[float, float] = (-70.0, -25.0)
    fill_rate: float = 0.3
    zeroed_rate: float = 0.7


@dataclasses.dataclass(frozen=True)
class Stage:
    """Some steps of a training: how many, of how many rows of how many tokens, and of which sentences."""

    num_steps: int
    batch_size: int
    text_length: int
    sentences: SentenceConfig


class Sentence(NamedTuple):
    """A training window: (A,) float32 samples, what is said, and the number of frames before those set to zero."""

    waveform: np.ndarray
    window: Window
    num_frames: int


def load_fsdd(data_dir: str | os.PathLike) -> dict[str, tuple[Clip, ...]]:
    """The clips of "train", "valid" and "test", by name, resampled to 16 kHz.

    Args:
      data_dir: folder of recordings.zip, or of a folder fsdd that has it.
    Raises:
      FsddError: no recordings.zip there, or not the recordings of the data set.
    """
    folder = pathlib.Path(data_dir).expanduser()
    path = next((p for p in (folder / "recordings.zip", folder / "fsdd" / "recordings.zip") if p.exists()), None)
    if path is None:
        raise FsddError(f"no recordings.zip in {folder} nor in {folder / 'fsdd'}; pack the data set's recordings/*.wav")
    splits: dict[str, list[Clip]] = {name: [] for name in NUM_CLIPS}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            match = re.fullmatch(r"(?:.*/)?(\d)_(\w+)_(\d+)\.wav", name)
            if match:
                digit, speaker, take = int(match[1]), match[2], int(match[3])
                split = "test" if take < 5 else "valid" if take == 5 else "train"
                splits[split].append(Clip(digit, speaker, take, _read_wav(archive.read(name))))
    found = {split: len(clips) for split, clips in splits.items()}
    if found != NUM_CLIPS:
        raise FsddError(f"{path} has {found} clips, expected {NUM_CLIPS}")
    return {split: tuple(clips) for split, clips in splits.items()}


def _read_wav(data: bytes) -> np.ndarray:
    import soundfile
    import soxr

    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return soxr.resample(samples, rate, SAMPLE_RATE, quality="VHQ").astype(np.float32)  # as data.audio does


def training_sentence(rng: np.random.Generator, clips: Sequence[Clip], config: SentenceConfig) -> Sentence:
    """A random window of random clips; a segment for each digit."""
    size = round(config.window_s * SAMPLE_RATE)
    waveform = np.zeros(size, np.float32)
    if rng.random() < config.empty_rate:
        return Sentence(_add_noise(rng, waveform, config), Window(0.0, ()), size // HOP_LENGTH)
    count = int(rng.integers(*config.num_digits, endpoint=True))
    overflow = rng.random() < config.overflow_rate
    clip = clips[int(rng.integers(len(clips)))]
    pool = [c for c in clips if c.speaker == clip.speaker] if rng.random() < config.same_speaker_rate else clips
    position = _abrupt_or(rng, config.lead_s, config)
    segments: list[TimedText] = []
    cut_start_s, heard = None, size
    while position < size and (overflow or len(segments) < count):
        sound = _vary(rng, clip.waveform, config)
        end = position + len(sound)
        waveform[position:end] = sound[: size - position]
        if end > size:
            cut_start_s, heard = _to_tick(position), size
            break
        segments.append(TimedText(_to_tick(position), _to_tick(end), WORDS[clip.digit]))
        heard = min(end + _abrupt_or(rng, config.lead_s, config), size)
        position = end + round(rng.uniform(*config.pause_s) * SAMPLE_RATE)
        clip = pool[int(rng.integers(len(pool)))]
    is_whole = rng.random() < config.fill_rate
    waveform[: size if is_whole else heard] = _add_noise(rng, waveform[: size if is_whole else heard], config)
    is_zeroed = not is_whole and rng.random() < config.zeroed_rate
    window = Window(0.0, tuple(segments), cut_start_s)
    return Sentence(waveform, window, (heard if is_zeroed else size) // HOP_LENGTH)


def sentence_batches(
    clips: Sequence[Clip],
    tokenizer: WhisperTokenizer,
    stages: Sequence[Stage],
    *,
    seed: int,
    timestamps_rate: float = 0.85,
    previous_rate: float = 0.5,
) -> grain.DatasetIterator:
    """Batches of training sentences of random clips: those of the first stage, then those of the next, to the end.

    Args:
      clips: of the training split.
      tokenizer: whose timestamps reach over the longest window.
      stages: one or more.
      seed: decides all of it.
      timestamps_rate: rows that write times.
      previous_rate: rows with a previous text of random digits, with times where the row writes times, as `transcribe`
        gives it.
    Returns:
      A Grain iterator of dicts: "waveform" (B, A) float32, "num_frames" (B,) int32 (mel frames from there on are to be
      zero), and "inputs", "targets", "mask" (B, L) of `whisper_examples.token_row`.
    """
    dataset = grain.MapDataset.range(sum(stage.num_steps for stage in stages)).seed(seed)
    dataset = dataset.random_map(_MakeBatch(clips, tokenizer, stages, timestamps_rate, previous_rate))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


class _MakeBatch(grain.transforms.RandomMap):
    """The batch of a step, by the random generator that Grain keys to each step."""

    def __init__(self, clips, tokenizer, stages, timestamps_rate, previous_rate):
        self.clips, self.tokenizer, self.stages = clips, tokenizer, tuple(stages)
        self.timestamps_rate, self.previous_rate = timestamps_rate, previous_rate

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        ends = np.cumsum([stage.num_steps for stage in self.stages])
        stage = self.stages[int(np.searchsorted(ends, element, side="right"))]
        rows = [self._row(rng, stage) for _ in range(stage.batch_size)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, rng: np.random.Generator, stage: Stage) -> dict[str, np.ndarray]:
        waveform, window, num_frames = training_sentence(rng, self.clips, stage.sentences)
        timestamps = bool(rng.random() < self.timestamps_rate)
        tokens = window_tokens(self.tokenizer, window, language="en", timestamps=timestamps)
        heard = window.num_samples(timestamps, SAMPLE_RATE, stage.sentences.window_s)
        waveform[heard:] = 0
        previous = self._previous(rng, timestamps) if rng.random() < self.previous_rate else ()
        return {
            "waveform": waveform,
            "num_frames": np.int32(num_frames),
            **token_row(self.tokenizer, tokens, text_length=stage.text_length, previous=previous),
        }

    def _previous(self, rng: np.random.Generator, timestamps: bool) -> list[int]:
        tokens, tick = [], int(rng.integers(self.tokenizer.num_timestamps))
        for digit in rng.integers(len(WORDS), size=rng.integers(1, 13)):
            first = tick + int(rng.integers(2, 35))
            tick = first + int(rng.integers(10, 40))
            if tick >= self.tokenizer.num_timestamps:  # the next window begins
                first, tick = int(rng.integers(35)), int(rng.integers(45, 75))
            text = self.tokenizer.encode(" " + WORDS[digit])
            times = (self.tokenizer.timestamp_begin + first, self.tokenizer.timestamp_begin + tick)
            tokens += [times[0], *text, times[1]] if timestamps else text
        return tokens


def joined_sentences(
    clips: Sequence[Clip],
    *,
    seed: int,
    num_rounds: int,
    num_digits: tuple[int, int] = (3, 6),
    pause_s: tuple[float, float] = (0.1, 0.6),
) -> list[tuple[np.ndarray, tuple[TimedText, ...]]]:
    """Sentences for evaluation: in every round each clip once, in random order and as it is.

    Returns:
      For each sentence (waveform (A,), a segment for each digit).
    """
    rng = np.random.default_rng(seed)
    sentences = []
    for _ in range(num_rounds):
        order = rng.permutation(len(clips))
        while len(order):
            count = min(int(rng.integers(*num_digits, endpoint=True)), len(order))
            if 0 < len(order) - count < num_digits[0]:  # too few would be left for one more
                count = len(order) if len(order) <= num_digits[1] else len(order) - num_digits[0]
            pauses_s = [0.0, *rng.uniform(*pause_s, count)]
            sentences.append(concatenate([clips[index] for index in order[:count]], pauses_s))
            order = order[count:]
    return sentences


def concatenate(clips: Sequence[Clip], pauses_s: Sequence[float]) -> tuple[np.ndarray, tuple[TimedText, ...]]:
    """The clips one after the other as they are, with `pauses_s` of silence before each and after the last.

    Returns:
      (waveform (A,), a segment for each clip with its exact times).
    Raises:
      ValueError: the number of pauses is not that of clips plus one.
    """
    if len(pauses_s) != len(clips) + 1:
        raise ValueError(f"{len(clips)} clips need {len(clips) + 1} pauses, got {len(pauses_s)}")
    pieces, segments, position = [], [], 0
    for clip, pause_s in zip(clips, pauses_s, strict=False):
        silence = np.zeros(round(pause_s * SAMPLE_RATE), np.float32)
        start = position + len(silence)
        position = start + len(clip.waveform)
        pieces += [silence, clip.waveform]
        segments.append(TimedText(start / SAMPLE_RATE, position / SAMPLE_RATE, WORDS[clip.digit]))
    pieces.append(np.zeros(round(pauses_s[-1] * SAMPLE_RATE), np.float32))
    return np.concatenate(pieces), tuple(segments)


def _to_tick(sample: int) -> float:
    return round(round(sample / SAMPLE_RATE / TICK_S) * TICK_S, 2)


def _abrupt_or(rng: np.random.Generator, seconds: tuple[float, float], config: SentenceConfig) -> int:
    """Samples of a pause at the outer end of a sentence."""
    return round(rng.uniform(*((0.0, TICK_S) if rng.random() < config.abrupt_rate else seconds)) * SAMPLE_RATE)


def _vary(rng: np.random.Generator, waveform: np.ndarray, config: SentenceConfig) -> np.ndarray:
    """Another speed and loudness; linear interpolation, as the recordings end at 4 kHz."""
    count = round(len(waveform) / rng.uniform(*config.speed))
    gain = 10 ** (rng.uniform(*config.gain_db) / 20)
    where = np.linspace(0, len(waveform) - 1, count, dtype=np.float32)
    return (gain * np.interp(where, np.arange(len(waveform)), waveform)).astype(np.float32)


def _add_noise(rng: np.random.Generator, waveform: np.ndarray, config: SentenceConfig) -> np.ndarray:
    """White or low-pass noise over the whole audio; audio without speech always has some."""
    peak = float(np.max(np.abs(waveform), initial=0.0))
    if peak and rng.random() >= config.noise_rate:
        return waveform
    noise = rng.standard_normal(len(waveform), np.float32)
    if rng.random() < 0.5:
        noise = np.convolve(noise, np.full(8, 8**-0.5, np.float32), mode="same")
    return waveform + np.float32((peak or 1.0) * 10 ** (rng.uniform(*config.noise_db) / 20)) * noise
