"""Segments of performances with their melodies: against notes selected one by one, shortened, resumed, refused."""

import numpy as np
import pytest

from jaxaudio.data import melody_segments
from jaxaudio.data.audio_crops import SplitConfig
from jaxaudio.data.event_dataset import EventDatasetError, write_event_dataset
from jaxaudio.data.events import MAGENTA, decode_events, encode_events, notes_to_array
from jaxaudio.data.melody import MELODY, decode_melody, infer_melody
from jaxaudio.data.melody_segments import (
    MelodyDataset,
    SegmentConfig,
    cut_notes,
    evaluation_segment_batches,
    segment_batches,
)
from jaxaudio.data.midi import Note, write_midi
from jaxaudio.data.performances import list_folder_or_zip

CONFIG = SegmentConfig(min_s=1.0, max_s=3.0, evaluation_s=2.0, length=64)


def performance(seed, num_notes=40):
    """Notes on steps of 10 ms, no two of one pitch at once, with gaps of more than a second."""
    rng = np.random.default_rng(seed)
    free, start, notes = np.zeros(128, int), 0, []
    for _ in range(num_notes):
        pitch = int(rng.choice([p for p in range(40, 80) if free[p] <= start]))
        free[pitch] = start + int(rng.integers(5, 150))
        notes.append(Note(start / 100, free[pitch] / 100, pitch, int(1 + 4 * rng.integers(32)), 0))
        start += int(rng.choice([0, 3, 20, 30, 130], p=[0.2, 0.2, 0.3, 0.25, 0.05]))
    return notes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("segments")
    for seed, name in enumerate(["a", "b", "c", "d", "valid"]):
        (root / "midi" / name).mkdir(parents=True)
        write_midi(performance(seed), root / "midi" / name / "0.mid")
    source = list_folder_or_zip(root / "midi", split=SplitConfig(("^valid$",), (), 0.0, 0.0))
    write_event_dataset(source, root / "tokens", MAGENTA, (1.0, 1.1), num_workers=1)
    return root / "tokens"


@pytest.fixture(scope="module")
def dataset(folder):
    return MelodyDataset(folder)


def by_start_and_pitch(notes):
    return sorted(notes, key=lambda note: (note.start_s, note.pitch))


@pytest.mark.parametrize("seed", range(3))
def test_notes_of_a_segment_equal_those_selected_one_by_one(seed):
    notes = performance(seed, 80)
    tokens = encode_events(notes_to_array(notes), MAGENTA).astype(np.int16)
    end = round(max(note.end_s for note in notes) * 100)
    for start, stop in [(0, end), (0, 100), (57, 390), (250, 251), (end - 40, end), (end, end + 10)]:
        expected = [
            (round(note.start_s * 100) - start, min(round(note.end_s * 100), stop) - start, note.pitch, note.velocity)
            for note in by_start_and_pitch(notes)
            if start <= round(note.start_s * 100) < stop
        ]
        found = cut_notes(tokens, start, stop, MAGENTA)
        columns = (found.start_s * 100, found.end_s * 100, found.pitch, found.velocity)
        assert [tuple(np.round(row).astype(int)) for row in zip(*columns, strict=True)] == expected


def test_melodies_are_inferred_once(folder, dataset, monkeypatch):
    for split, number in (("train", 4), ("valid", 1)):
        for piece in range(number):
            tokens = np.asarray(dataset.events.tokens(split, piece))
            expected = infer_melody(notes_to_array(decode_events(tokens, MAGENTA)))
            found = dataset.melody(split, piece)
            assert len(found)
            np.testing.assert_array_equal(found.start_s, expected.start_s)
            np.testing.assert_array_equal(found.end_s, expected.end_s)
            np.testing.assert_array_equal(found.pitch, expected.pitch)
    monkeypatch.setattr(melody_segments, "infer_melody", None)
    MelodyDataset(folder)


def test_a_row_has_the_segment_its_end_and_its_melody(dataset):
    row, stop = dataset.segment("valid", 0, 100, 250, CONFIG, semitones=2)
    assert stop == 250
    tokens = row["targets"][row["mask"]]
    assert tokens[-1] == 1
    notes = cut_notes(dataset.events.tokens("valid", 0), 100, 250, MAGENTA)
    decoded = notes_to_array(decode_events(tokens, MAGENTA))
    np.testing.assert_allclose(decoded.start_s, notes.start_s, atol=1e-9)
    np.testing.assert_array_equal(decoded.pitch, notes.pitch + 2)
    assert row["inputs"][0] == 0
    np.testing.assert_array_equal(row["inputs"][1:], row["targets"][:-1])

    assert (row["melody"] > 0).sum() == 15  # 1.5 s
    assert len(row["melody"]) == 31
    melody = dataset.melody("valid", 0)
    begins = (melody.start_s >= 1.0) & (melody.start_s < 2.5)
    heard = decode_melody(row["melody"])
    # Two notes within 100 ms are one: the later.
    steps = np.floor((melody.start_s[begins] - 1.0) * 10 + 0.5)
    kept = np.append(np.diff(steps) > 0, True)
    np.testing.assert_array_equal(heard.pitch, melody.pitch[begins][kept] + 2)
    np.testing.assert_allclose(heard.start_s, steps[kept] / 10)


def test_without_melody_nothing_of_it_is_left(dataset):
    config = SegmentConfig(1.0, 3.0, 2.0, 64, has_melody=False)
    row, _ = dataset.segment("valid", 0, 100, 250, config)
    assert row["melody"].tolist() == [MELODY.NO_EVENT] + [0] * 30


def test_a_segment_with_too_many_events_is_shortened_until_it_fits(dataset):
    config = SegmentConfig(1.0, 3.0, 2.0, length=16)
    row, stop = dataset.segment("valid", 0, 0, 400, config)
    assert stop < 400
    expected = encode_events(cut_notes(dataset.events.tokens("valid", 0), 0, stop, MAGENTA), MAGENTA)
    np.testing.assert_array_equal(row["targets"][row["mask"]], [*expected, 1])
    with pytest.raises(EventDatasetError, match=r"valid/0.mid: step 0 has \d+ events, more than length 2"):
        dataset.segment("valid", 0, 0, 400, SegmentConfig(1.0, 3.0, 2.0, length=2))


@pytest.mark.parametrize(("length", "process_count"), [(64, 1), (24, 2)])
def test_evaluation_hears_every_note_once(dataset, length, process_count):
    config = SegmentConfig(1.0, 3.0, 2.0, length=length)
    rows = [
        list(
            evaluation_segment_batches(
                dataset, "train", config, batch_size=3, process_index=index, process_count=process_count
            )
        )
        for index in range(process_count)
    ]
    assert len({len(batches) for batches in rows}) == 1
    tokens = [row for batches in zip(*rows, strict=True) for batch in batches for row in batch["targets"]]
    heard = [note.pitch for row in tokens for note in decode_events(row, MAGENTA)]
    played = [
        note.pitch
        for piece in range(4)
        for note in decode_events(np.asarray(dataset.events.tokens("train", piece)), MAGENTA)
    ]
    assert heard == played
    assert all((batch["melody"] > 0).any(axis=1).all() for batches in rows for batch in batches)


def test_some_segments_stand_for_all(dataset):
    count = sum(-(-dataset.num_steps("train", piece) // 200) for piece in range(4))
    config = SegmentConfig(1.0, 3.0, 2.0, length=200)
    batches = list(evaluation_segment_batches(dataset, "train", config, batch_size=1, max_segments=5))
    every = list(evaluation_segment_batches(dataset, "train", config, batch_size=1))
    assert len(every) == count
    np.testing.assert_array_equal(
        [batch["targets"] for batch in batches], [batch["targets"] for batch in every[:: -(-count // 5)]]
    )


def test_training_segments_are_drawn_by_key_and_resume(dataset):
    def rows(iterator, number):
        return [next(iterator) for _ in range(number)]

    first = segment_batches(dataset, CONFIG, batch_size=2, seed=1)
    found = rows(first, 2)
    state = first.get_state()
    after = rows(first, 2)
    again = segment_batches(dataset, CONFIG, batch_size=2, seed=1)
    for one, other in zip([*found, *after], rows(again, 4), strict=True):
        assert all((one[name] == other[name]).all() for name in one)
    again.set_state(state)
    resumed = next(again)
    assert all((resumed[name] == array).all() for name, array in after[0].items())
    another = rows(segment_batches(dataset, CONFIG, batch_size=2, seed=2), 2)
    assert any((one["targets"] != other["targets"]).any() for one, other in zip(found, another, strict=True))
    lengths = [(row > 0).sum() for batch in [*found, *after] for row in batch["melody"]]
    assert all(10 <= length <= 31 for length in lengths)
    assert len(set(lengths)) > 1


def test_errors(dataset):
    with pytest.raises(EventDatasetError, match="max_segments is 0"):
        evaluation_segment_batches(dataset, "valid", CONFIG, batch_size=1, max_segments=0)
    with pytest.raises(EventDatasetError, match="test has no performances"):
        evaluation_segment_batches(dataset, "test", CONFIG, batch_size=1)
    with pytest.raises(EventDatasetError, match=r"transpose is \(1, 2\)"):
        segment_batches(dataset, CONFIG, batch_size=1, seed=0, transpose=(1, 2))
    with pytest.raises(EventDatasetError, match="4 performances of train cannot be shared by 5 processes"):
        segment_batches(dataset, CONFIG, batch_size=1, seed=0, process_count=5)
    with pytest.raises(ValueError, match="min_s=4.0, max_s=3.0"):
        SegmentConfig(min_s=4.0, max_s=3.0)
