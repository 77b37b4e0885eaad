"""Crops against slices of their recordings; order, resume, shares of processes, splits; each variation by hand."""

import dataclasses

import numpy as np
import pytest
from scipy.signal import hilbert

from jaxaudio.data import audio_crops
from jaxaudio.data.audio_crops import CropConfig, SourceConfig, SplitConfig
from jaxaudio.data.recordings import Recording

PLAIN = CropConfig(num_samples=50)


def recording(name, num_samples, scale=0.5, channels=1, seed=None):
    rng = np.random.default_rng(len(name) + num_samples if seed is None else seed)
    waveform = rng.uniform(-scale, scale, (num_samples, channels)).astype(np.float32)
    return Recording(name, waveform, 8000, float(np.abs(waveform).max()))


@pytest.fixture(scope="module")
def recordings():
    return [recording(f"{'long' if n > 100 else 'short'}/{n}.wav", n) for n in (20, 50, 75, 100, 130, 260)]


def batches(recordings, crop=PLAIN, **options):
    return audio_crops.crop_batches(recordings, crop, **({"batch_size": 4, "seed": 0} | options))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def _pairs(batch):
    return zip(batch["waveform"], batch["num_samples"], strict=True)


def rows(batches):
    return [(row, int(count)) for batch in batches for row, count in _pairs(batch)]


def origin(row, count, recordings):
    """(recording, start) of a crop, by looking for it everywhere."""
    found = [
        (index, start)
        for index, source in enumerate(recordings)
        for start in range(len(source.waveform) - count + 1)
        if np.array_equal(source.waveform[start : start + count], row[:count])
    ]
    assert len(found) == 1
    return found[0]


def test_crops_are_slices_and_short_ones_are_followed_by_zeros(recordings):
    found = rows(take(batches(recordings), 12))
    starts = {}
    for row, count in found:
        index, start = origin(row, count, recordings)
        assert count == min(50, len(recordings[index].waveform))
        assert not row[count:].any()
        starts.setdefault(index, set()).add(start)
    assert starts[0] == {0}
    assert starts[1] == {0}
    assert len(starts[5]) > 4  # drawn, not the same ones


def test_an_epoch_has_a_crop_for_each_started_length(recordings):
    found = rows(take(batches(recordings, batch_size=1), 15))  # 1 + 1 + 2 + 2 + 3 + 6
    counts = np.bincount([origin(*row, recordings)[0] for row in found])
    assert counts.tolist() == [1, 1, 2, 2, 3, 6]


def test_the_seed_decides_everything(recordings):
    crop = dataclasses.replace(PLAIN, gain=(0.3, 1.0), mix_rates=(0.5, 0.5))
    first, again, other = (
        np.stack([batch["waveform"] for batch in take(batches(recordings, crop, seed=seed), 5)]) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[4])


def test_resumes_where_it_was(recordings):
    crop = dataclasses.replace(PLAIN, gain=(0.3, 1.0))
    sources = (SourceConfig("long", 2.0), SourceConfig("short", 1.0))
    iterator = batches(recordings, crop, sources=sources)
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 4)
    resumed = batches(recordings, crop, sources=sources)
    resumed.set_state(state)
    for ours, theirs in zip(take(resumed, 4), expected, strict=True):
        np.testing.assert_array_equal(ours["waveform"], theirs["waveform"])


def test_processes_share_the_crops(recordings):
    """Over an epoch each process draws its own crops; together they are those of one epoch."""
    shares = [
        rows(take(batches(recordings, batch_size=1, process_index=index, process_count=3), 5)) for index in range(3)
    ]
    counts = np.bincount([origin(*row, recordings)[0] for share in shares for row in share])
    assert counts.tolist() == [1, 1, 2, 2, 3, 6]
    places = {(origin(*row, recordings), row[1]) for share in shares for row in share if row[1] == 50}
    assert len(places) > 10


def test_sources_share_the_rows_by_weight(recordings):
    sources = (SourceConfig("long", 3.0), SourceConfig("short", 1.0))
    found = rows(take(batches(recordings, sources=sources), 20))
    long = sum(origin(*row, recordings)[0] >= 4 for row in found)
    assert long == 60


def test_levels(recordings):
    def drawn(**fields):
        return rows(take(batches(recordings, CropConfig(num_samples=50, **fields)), 6))

    for row, _ in drawn(level="peak", level_db=-6.0):
        assert np.abs(row).max() == pytest.approx(10**-0.3, rel=1e-5)
    for row, count in drawn(level="rms", level_db=-24.0):
        assert np.sqrt(np.mean(row[:count] ** 2)) == pytest.approx(10**-1.2, rel=1e-5)
    for (row, count), (plain, _) in zip(drawn(level="recording_peak", level_db=-6.0), drawn(), strict=True):
        index, _ = origin(plain, count, recordings)
        np.testing.assert_allclose(row, plain * (10**-0.3 / recordings[index].peak), rtol=1e-5)


def test_gains(recordings):
    plain = rows(take(batches(recordings), 10))
    for field, low, high in (("gain", 0.3, 1.0), ("gain_db", 10**-0.5, 10**0.3)):
        crop = CropConfig(num_samples=50, **{field: (0.3, 1.0) if field == "gain" else (-10.0, 6.0)})
        factors = []
        for (row, _), (expected, _) in zip(rows(take(batches(recordings, crop), 10)), plain, strict=True):
            factors.append(np.abs(row).max() / np.abs(expected).max())
            np.testing.assert_allclose(row, factors[-1] * expected, rtol=1e-5, atol=1e-7)
        assert low <= min(factors) < low + 0.2
        assert high - 0.4 < max(factors) <= high


def test_gains_that_would_clip_are_not_drawn():
    loud = [recording("loud.wav", 500, scale=0.9)]
    drawn = [np.abs(row).max() for row, _ in rows(take(batches(loud, CropConfig(50, gain_db=(-1.0, 20.0))), 10))]
    assert 0.95 < max(drawn) <= 1 + 1e-6


def test_digital_silence_stays():
    silence = [Recording("silence.wav", np.zeros((80, 1), np.float32), 8000, 0.0)]
    for level in ("peak", "rms", "recording_peak"):
        crop = CropConfig(50, level=level, gain_db=(-3.0, 3.0), shift_phase=True)
        assert not next(batches(silence, crop))["waveform"].any()


def test_phases_are_turned_by_one_angle():
    """The crop is in the plane of the slice and its Hilbert transform, at unit length but for the mean."""
    sources = [recording("a.wav", 51)]
    crop = CropConfig(51, shift_phase=True)
    row = next(batches(sources, crop, batch_size=1))["waveform"][0, :, 0]
    slice_ = sources[0].waveform[:, 0] - sources[0].waveform.mean()
    analytic = hilbert(slice_)
    plane = np.stack([analytic.real, -analytic.imag], axis=1)
    weights, residual, *_ = np.linalg.lstsq(plane, row - row.mean(), rcond=None)
    assert residual < 1e-8
    assert np.linalg.norm(weights) == pytest.approx(1, abs=1e-5)


def test_sums_of_two_crops():
    """With recordings that are constants, a row's sum says which were mixed."""
    constants = [Recording(f"{v}.wav", np.full((60, 1), v, np.float32), 8000, v) for v in (0.1, 0.3)]
    crop = CropConfig(50, mix_rates=(0.5, 0.5))
    values = [round(float(row[0, 0]), 3) for row, _ in rows(take(batches(constants, crop), 20))]
    assert set(values) == {0.1, 0.3, 0.2, 0.4, 0.6}
    loud = [Recording("loud.wav", np.full((60, 1), 0.8, np.float32), 8000, 0.8)]
    assert next(batches(loud, CropConfig(50, mix_rates=(0.0, 1.0))))["waveform"].max() == 1.0


def test_noise_and_its_targets(recordings):
    noises = [recording("noise.wav", 300, scale=0.1)]
    crop = CropConfig(50, denoise_rate=0.5, noise_db=(-20.0, -10.0))
    drawn = take(batches(recordings, crop, noises=noises), 10)
    denoise = np.concatenate([batch["denoise"] for batch in drawn])
    assert 0.2 < denoise.mean() < 0.8
    for batch in drawn:
        assert set(batch) == {"waveform", "target", "denoise", "num_samples"}
        noise = batch["waveform"] - batch["target"]
        assert not noise[~batch["denoise"]].any()
        for row in noise[batch["denoise"]]:
            origin_db = 20 * np.log10(np.abs(row).max() / 0.1)
            assert -21 < origin_db < -10  # of a crop whose loudest sample is a little below 0.1
        for row, is_clean in zip(batch["target"], batch["denoise"], strict=True):
            if is_clean and row[20:].any():
                origin(row, 50, recordings)


def test_evaluation_crops_are_every_sample_once(recordings):
    found = list(audio_crops.evaluation_crops(recordings, 50, 4))
    assert {batch["waveform"].shape for batch in found} == {(4, 50, 1)}
    kept = np.concatenate([row[:count] for row, count in rows(found)])
    np.testing.assert_array_equal(kept, np.concatenate([r.waveform for r in recordings]))
    assert list(audio_crops.evaluation_crops([], 50, 4)) == []


def test_splits_by_name_and_hash():
    names = [f"digits/{digit}_ann_{take}.wav" for digit in range(10) for take in range(20)] + ["x/a.wav", "x/b.wav"]
    config = SplitConfig(test=(r"_[0-4]\.wav",), valid=("_5",), valid_rate=0.1, test_rate=0.2, exclude=("x/b",))
    splits = audio_crops.split_recordings(names, config)
    assert sorted(name for split in splits.values() for name in split) == sorted(set(names) - {"x/b.wav"})
    assert {n for n in names if n[-5] in "01234" and n[-6] == "_"} <= set(splits["test"])
    rest = [n for n in names[:200] if int(n.split("_")[-1][:-4]) > 5]
    assert 0.1 < len(set(rest) & set(splits["test"])) / len(rest) < 0.3
    # What a recording is does not depend on the others.
    assert [n for n in rest if n in splits["test"]] == audio_crops.split_recordings(
        rest, dataclasses.replace(config, test=(), valid=(), exclude=())
    )["test"]


def test_a_copy_in_another_split_is_found(recordings):
    copy = dataclasses.replace(recordings[2], name="copy.wav")
    audio_crops.check_no_leak({"train": recordings, "test": []})
    audio_crops.check_no_leak({"train": [*recordings, copy], "test": []})
    with pytest.raises(ValueError, match=r"copy.wav of test has the samples of short/75.wav of train"):
        audio_crops.check_no_leak({"train": recordings, "test": [copy]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"gain": (1.0, 0.5)}, r"gain=\(1.0, 0.5\)"),
        ({"mix_rates": (0.5, 0.4)}, r"mix_rates=\(0.5, 0.4\)"),
        ({"denoise_rate": 1.5}, "denoise_rate=1.5"),
    ],
)
def test_unusable_crops(fields, message):
    with pytest.raises(ValueError, match=message):
        CropConfig(**({"num_samples": 10} | fields))


def test_unusable_arguments(recordings):
    with pytest.raises(ValueError, match="source 'piano' has 0 crops of 6 recordings"):
        batches(recordings, sources=(SourceConfig("piano", 1.0),))
    with pytest.raises(ValueError, match="has 1 crops of 1 recordings, fewer than the 2 processes"):
        batches(recordings[:1], process_count=2)
    with pytest.raises(ValueError, match="process_index=2 of 2"):
        batches(recordings, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="denoise_rate=None with 1 noises"):
        batches(recordings, noises=recordings[:1])
    with pytest.raises(ValueError, match="denoise_rate=0.5 with 0 noises"):
        batches(recordings, CropConfig(50, denoise_rate=0.5))
    with pytest.raises(ValueError, match="differ in channels"):
        batches([*recordings, recording("stereo.wav", 50, channels=2)])
    with pytest.raises(ValueError, match="valid_rate=0.7, test_rate=0.5"):
        audio_crops.split_recordings(["a"], SplitConfig(valid_rate=0.7, test_rate=0.5))
    with pytest.raises(ValueError, match="test: 'b' is found in none of 1 names"):
        audio_crops.split_recordings(["a"], SplitConfig(test=("b",)))
