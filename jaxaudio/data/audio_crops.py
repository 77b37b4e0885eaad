"""Random crops of recordings, for the training of codecs: split by file, cropped, varied, batched.

A batch is a dict of arrays:

    waveform     (B, A, channels) float32   what the model hears
    num_samples  (B,) int32                 how many instants of a row are of a recording; the others are zeros after it

and for denoising also

    target       (B, A, channels) float32   what it shall say: without the noise where `denoise`, else the waveform
    denoise      (B,) bool
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import grain
import numpy as np

from jaxaudio.data.recordings import Recording

Batch = dict[str, np.ndarray]

SPLITS = ("train", "valid", "test")
_SILENCE_RMS_DB = -70.0  # quieter crops stay as they are: a gain would make their rounding noise a sound


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Which recordings are held out: by name, and of the others by a hash of the name.

    Attributes:
      valid, test: regular expressions; a recording in whose name one is found is in that split, test before valid.
      valid_rate, test_rate: shares of the other recordings, drawn by name, so that a recording stays where it is when
        others come or go.
      exclude: regular expressions of recordings that are in no split.
    """

    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    valid_rate: float = 0.05
    test_rate: float = 0.05
    exclude: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A part of the training recordings, those in whose name `pattern` is found, and its share of the crops."""

    pattern: str
    weight: float


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """How training crops are drawn and varied; pairs are ranges of uniform draws.

    Attributes:
      num_samples: of a crop. Shorter recordings are followed by zeros.
      level: what is brought to `level_db` before the gains: the "peak" or the "rms" of the crop, or the peak of the
        whole recording ("recording_peak"); "none" changes nothing. Crops quieter than -70 dB stay as they are.
      level_db: over full scale. Root mean squares are of the samples as they are, not weighted by ear as LUFS are.
      gain: factors.
      gain_db: gains, where they clip no sample; the range ends at the gain that would.
      mix_rates: shares of the rows that are the sum of 1, 2, 3, ... crops of random recordings, each with a level and
        gains of its own; a sum beyond full scale is scaled down to it.
      denoise_rate: share of the rows whose target has no noise; None adds no noise and gives no target.
      noise_db: gains of the noise, whose level is `level_db` as the speech's.
      shift_phase: all frequencies are turned by one angle of a uniform draw (DAC's augmentation).
    """

    num_samples: int
    level: Literal["none", "peak", "rms", "recording_peak"] = "none"
    level_db: float = 0.0
    gain: tuple[float, float] = (1.0, 1.0)
    gain_db: tuple[float, float] = (0.0, 0.0)
    mix_rates: tuple[float, ...] = (1.0,)
    denoise_rate: float | None = None
    noise_db: tuple[float, float] = (-30.0, 0.0)
    shift_phase: bool = False

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}; a crop has at least one sample")
        for name in ("gain", "gain_db", "noise_db"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}={low, high}; expected (low, high)")
        if not math.isclose(sum(self.mix_rates), 1.0) or min(self.mix_rates) < 0:
            raise ValueError(f"mix_rates={self.mix_rates}; expected shares that sum to 1")
        if self.denoise_rate is not None and not 0 <= self.denoise_rate <= 1:
            raise ValueError(f"denoise_rate={self.denoise_rate}; expected a share from 0 to 1, or None")


SOUNDSTREAM_CROPS = CropConfig(num_samples=8640, level="peak", level_db=20 * math.log10(0.95), gain=(0.3, 1.0))
"""SoundStream, section 4.1: 360 ms at 24 kHz, peak 0.95, gain 0.3 to 1."""
ENCODEC_CROPS = CropConfig(
    num_samples=24_000, level="recording_peak", gain_db=(-10.0, 6.0), mix_rates=(0.64, 0.24, 0.12)
)
"""EnCodec, section 4.1, without its reverberation: 1 s at 24 kHz; gains that would clip are not drawn."""
DAC_CROPS = CropConfig(num_samples=16_758, level="rms", level_db=-24.0, shift_phase=True)
"""DAC, section 4: 0.38 s at 44.1 kHz, -24 dB (of RMS where the paper has LUFS), and the phases turned."""


def split_recordings(names: Sequence[str], config: SplitConfig) -> dict[str, list[str]]:
    """The names of "train", "valid" and "test", each in the order given.

    Raises:
      ValueError: a rate outside 0 to 1, or a pattern of which no name is (has the pattern).
    """
    if not (min(config.valid_rate, config.test_rate) >= 0 and config.valid_rate + config.test_rate <= 1):
        raise ValueError(f"valid_rate={config.valid_rate}, test_rate={config.test_rate}; expected shares of 1")
    for field in ("valid", "test", "exclude"):
        for pattern in getattr(config, field):
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(f"{field}: {pattern!r} is found in none of {len(names)} names, such as {names[:3]}")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        if not any(re.search(pattern, name) for pattern in config.exclude):
            splits[_split_of(name, config)].append(name)
    return splits


def _split_of(name: str, config: SplitConfig) -> str:
    for split, patterns in (("test", config.test), ("valid", config.valid)):
        if any(re.search(pattern, name) for pattern in patterns):
            return split
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "test" if draw < config.test_rate else "valid" if draw < config.test_rate + config.valid_rate else "train"


def check_no_leak(splits: Mapping[str, Sequence[Recording]]) -> None:
    """Refuses recordings of equal samples in two splits, such as a file that is there twice under two names.

    Raises:
      ValueError: has both names and splits.
    """
    found: dict[str, tuple[str, str]] = {}
    for split, recordings in splits.items():
        for recording in recordings:
            digest = hashlib.sha256(np.ascontiguousarray(recording.waveform)).hexdigest()
            other_split, other = found.setdefault(digest, (split, recording.name))
            if other_split != split:
                raise ValueError(
                    f"{recording.name} of {split} has the samples of {other} of {other_split}; exclude one of them, or "
                    "put both into one split"
                )


def crop_batches(
    recordings: Sequence[Recording],
    crop: CropConfig,
    *,
    batch_size: int,
    seed: int,
    sources: Sequence[SourceConfig] = (SourceConfig("", 1.0),),
    noises: Sequence[Recording] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Training batches without end: shuffled, sharded by process, cropped and varied at random, prefetched.

    In an epoch of a source each of its recordings gives one crop for each started `crop.num_samples` of its length,
    from places drawn uniformly. `seed` decides order, places and all variations. The iterator is an Orbax
    checkpointable; a state needs the same arguments again.

    Args:
      recordings: of the training split.
      crop: see there.
      batch_size: rows of this process.
      seed: of everything.
      sources: parts of the recordings that share the rows by their weights; a recording may be in several.
      noises: what is added if crop.denoise_rate is set.
      process_index, process_count: which of how many shares of the crops to read.
    Raises:
      ValueError: a source without recordings or with fewer crops than processes, noises without `denoise_rate` or the
        other way round, or recordings that differ in channels or sample rate; has the value.
    """
    if batch_size < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"batch_size={batch_size}, process_index={process_index} of {process_count}; cannot be read")
    if (crop.denoise_rate is None) == bool(noises):
        raise ValueError(f"denoise_rate={crop.denoise_rate} with {len(noises)} noises; it takes both or neither")
    if len({(recording.waveform.shape[1], recording.sample_rate) for recording in [*recordings, *noises]}) > 1:
        raise ValueError("the recordings differ in channels or sample rate; load all of them alike")
    datasets = []
    for number, source in enumerate(sources):
        slots = [
            index
            for index, recording in enumerate(recordings)
            if re.search(source.pattern, recording.name)
            for _ in range(math.ceil(len(recording.waveform) / crop.num_samples))
        ]
        if len(slots) < process_count:
            raise ValueError(
                f"source {source.pattern!r} has {len(slots)} crops of {len(recordings)} recordings, fewer than the "
                f"{process_count} processes that share them"
            )
        dataset = grain.MapDataset.source(slots).seed(seed + number).shuffle()
        datasets.append(dataset[process_index::process_count].repeat(None))
    weights = [source.weight for source in sources]
    # Processes draw from different keys: a place in the mixed data set is not the same crop on two of them.
    mixed = grain.MapDataset.mix(datasets, weights).seed(seed * process_count + process_index)
    mixed = mixed.random_map(_RandomCrop(list(recordings), list(noises), crop))
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
    return iter(mixed.to_iter_dataset(read).batch(batch_size, drop_remainder=True))


def evaluation_crops(recordings: Sequence[Recording], num_samples: int, batch_size: int) -> Iterator[Batch]:
    """Consecutive crops of all recordings in order, nothing varied, every sample once; the last rows may be empty."""
    rows = [
        _place(recording.waveform[start : start + num_samples], num_samples)
        for recording in recordings
        for start in range(0, len(recording.waveform), num_samples)
    ]
    if rows:
        rows += [(np.zeros_like(rows[0][0]), 0)] * (-len(rows) % batch_size)
    for first in range(0, len(rows), batch_size):
        waveforms, counts = zip(*rows[first : first + batch_size], strict=True)
        yield {"waveform": np.stack(waveforms), "num_samples": np.array(counts, np.int32)}


class _RandomCrop(grain.transforms.RandomMap):
    """A row by the random generator that Grain keys to each record."""

    def __init__(self, recordings: list[Recording], noises: list[Recording], config: CropConfig):
        self.recordings, self.noises, self.config = recordings, noises, config

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        config = self.config
        waveform, num_samples = _varied(rng, self.recordings[element], config)
        num_mixed = int(rng.choice(len(config.mix_rates), p=config.mix_rates))
        for _ in range(num_mixed):
            other, count = _varied(rng, self.recordings[int(rng.integers(len(self.recordings)))], config)
            waveform, num_samples = waveform + other, max(num_samples, count)
        if num_mixed:
            waveform = waveform / max(1.0, float(np.abs(waveform).max()))
        row = {"waveform": waveform, "num_samples": np.int32(num_samples)}
        if config.denoise_rate is not None:
            noise, _ = _varied(rng, self.noises[int(rng.integers(len(self.noises)))], config)
            noisy = waveform + noise * _factor(rng.uniform(*config.noise_db))
            # Both are scaled alike, so that what is to be said is in what is heard.
            scale = 1 / max(1.0, float(np.abs(noisy).max()))
            denoise = bool(rng.random() < config.denoise_rate)
            row |= {"waveform": noisy * scale, "denoise": np.bool_(denoise), "num_samples": np.int32(len(noisy))}
            row["target"] = waveform * scale if denoise else row["waveform"]
        return {name: np.asarray(part, np.float32) if np.ndim(part) else part for name, part in row.items()}


def _varied(rng: np.random.Generator, recording: Recording, config: CropConfig) -> tuple[np.ndarray, int]:
    """A crop (A, channels) with its level, phase and gains, and the number of its samples that are the recording's."""
    start = int(rng.integers(max(0, len(recording.waveform) - config.num_samples) + 1))
    waveform, count = _place(recording.waveform[start : start + config.num_samples], config.num_samples)
    if config.shift_phase:
        waveform = _turn(waveform, rng.uniform(-math.pi, math.pi))
    level = {
        "none": 0.0,
        "peak": np.abs(waveform).max(),
        "rms": math.sqrt(np.mean(np.square(waveform[:count], dtype=np.float64))),
        "recording_peak": recording.peak,
    }[config.level]
    if level > _factor(_SILENCE_RMS_DB):
        waveform = waveform * (_factor(config.level_db) / level)
    waveform = waveform * rng.uniform(*config.gain)
    low, high = config.gain_db
    if low < high:
        headroom_db = -20 * math.log10(max(float(np.abs(waveform).max()), 1e-9))
        waveform = waveform * _factor(rng.uniform(low, max(low, min(high, headroom_db))))
    return waveform, count


def _place(waveform: np.ndarray, num_samples: int) -> tuple[np.ndarray, int]:
    row = np.zeros((num_samples, waveform.shape[1]), np.float32)
    row[: len(waveform)] = waveform
    return row, len(waveform)


def _turn(waveform: np.ndarray, angle: float) -> np.ndarray:
    """Every frequency's phase plus `angle`: cos(angle) x - sin(angle) H(x), with the Hilbert transform of the crop."""
    spectrum = np.fft.rfft(waveform, axis=0)
    return np.fft.irfft(spectrum * np.exp(1j * angle), n=len(waveform), axis=0)


def _factor(db: float) -> float:
    return 10 ** (db / 20)
