"""Batches of event tokens: every row against all rows there can be, epochs, processes, resuming, evaluation."""

import collections

import numpy as np
import pytest

from jaxaudio.data.audio_crops import SplitConfig
from jaxaudio.data.event_batches import evaluation_event_batches, event_batches
from jaxaudio.data.event_dataset import EventDataset, EventDatasetError, write_event_dataset
from jaxaudio.data.events import MAGENTA, PAPER, encode_events, notes_to_array, stretch
from jaxaudio.data.midi import Note, write_midi
from jaxaudio.data.performances import list_folder_or_zip

STRETCHES = (0.9, 1.0, 1.1)
LENGTH = 16


@pytest.fixture(scope="module")
def performances():
    """Notes by file: three of many notes, one of almost the whole keyboard, one shorter than a row."""
    rng = np.random.default_rng(0)
    pieces = {}
    for name, num_notes in {"a/0": 30, "b/0": 12, "b/1": 25, "wide/0": 20, "short/0": 2, "valid/0": 18}.items():
        starts = np.cumsum(rng.integers(5, 60, num_notes)) / 96  # of a second: whole ticks
        pieces[name] = [
            Note(s, s + int(rng.integers(10, 40)) / 96, int(rng.integers(40, 80)), int(rng.integers(1, 128)), 0)
            for s in starts
        ]
    pieces["wide/0"] += [Note(0.0, 0.25, 22, 64, 0), Note(0.5, 0.75, 106, 64, 0)]
    return pieces


@pytest.fixture(scope="module")
def folder(performances, tmp_path_factory):
    root = tmp_path_factory.mktemp("performances")
    for name, notes in performances.items():
        (root / "midi" / name).parent.mkdir(parents=True, exist_ok=True)
        write_midi(notes, root / "midi" / f"{name}.mid")
    source = list_folder_or_zip(root / "midi", split=SplitConfig(("^valid$",), (), 0.0, 0.0))
    for vocabulary in ("MAGENTA", "PAPER"):
        write_event_dataset(source, root / vocabulary, {"MAGENTA": MAGENTA, "PAPER": PAPER}[vocabulary], STRETCHES, 1)
    return root


@pytest.fixture(scope="module")
def dataset(folder):
    return EventDataset(folder / "MAGENTA")


@pytest.fixture(scope="module")
def rows(performances):
    """Name, stretch, shift and start of every row there can be: of notes that are moved one by one, then encoded."""
    found = {}
    for name, notes in performances.items():
        for factor in STRETCHES:
            for shift in range(-3, 4):
                moved = [note._replace(pitch=note.pitch + shift) for note in notes]
                if all(21 <= note.pitch <= 108 for note in moved):
                    tokens = encode_events(stretch(notes_to_array(moved), factor), MAGENTA)
                    for start in range(max(0, len(tokens) - LENGTH) + 1):
                        found[tuple(tokens[start : start + LENGTH].tolist())] = name, factor, shift, start
    return found


def batches(dataset, **changes):
    return event_batches(dataset, **{"length": LENGTH, "batch_size": 5, "seed": 1} | changes)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def targets(found):
    return [
        tuple(row[mask].tolist()) for batch in found for row, mask in zip(batch["targets"], batch["mask"], strict=True)
    ]


def equal(left, right):
    return all(np.array_equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in a)


def test_every_row_is_a_crop_of_a_moved_and_stretched_performance(dataset, rows):
    found = take(batches(dataset), 120)
    for batch in found:
        inputs, mask = batch["inputs"], batch["mask"]
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            "inputs": ((5, LENGTH), np.int32),
            "targets": ((5, LENGTH), np.int32),
            "mask": ((5, LENGTH), bool),
        }
        np.testing.assert_array_equal(inputs[:, 0], 0)
        np.testing.assert_array_equal(inputs[:, 1:], batch["targets"][:, :-1])
        np.testing.assert_array_equal(batch["targets"] > 0, mask)
        assert (np.diff(mask.astype(int)) <= 0).all()
    drawn = [rows[row] for row in targets(found)]
    for epoch in range(120):  # of five performances, five rows each
        assert len({name for name, *_ in drawn[5 * epoch : 5 * epoch + 5]}) == 5
    assert len({tuple(name for name, *_ in drawn[5 * e : 5 * e + 5]) for e in range(120)}) > 50
    by_name = collections.defaultdict(list)
    for name, factor, shift, start in drawn:
        by_name[name].append((factor, shift, start))
    for name, draws in by_name.items():
        shifts = {shift for _, shift, _ in draws}
        # What would leave the keyboard is drawn anew among what does not: from 22 one down, from 106 two up.
        assert shifts == (set(range(-1, 3)) if name == "wide/0" else set(range(-3, 4)))
        assert min(collections.Counter(shift for _, shift, _ in draws).values()) >= 5
        assert min(collections.Counter(factor for factor, *_ in draws).values()) >= 20
    last = {name: max(start for found, *_, start in rows.values() if found == name) for name in by_name}
    assert max(start for *_, start in by_name["b/0"]) >= last["b/0"] - 3
    assert min(start for *_, start in by_name["b/0"]) <= 3
    assert {start for *_, start in by_name["short/0"]} == {0}


def test_nothing_is_moved_when_nothing_is_asked_for(dataset, rows):
    found = targets(take(batches(dataset, transpose=(0, 0), stretches=(1.0,)), 10))
    assert {rows[row][1:3] for row in found} == {(1.0, 0)}


def test_a_seed_decides_everything_and_a_state_resumes_it(dataset):
    iterator = batches(dataset)
    first = take(iterator, 7)
    state = iterator.get_state()
    second = take(iterator, 9)
    resumed = batches(dataset)
    resumed.set_state(state)
    assert equal(take(resumed, 9), second)
    assert equal(take(batches(dataset), 7), first)
    assert not equal(take(batches(dataset, seed=2), 7), first)


def test_processes_share_an_epoch_without_changing_it(dataset):
    whole = targets(batches(dataset, batch_size=1, num_epochs=1))
    shares = [
        targets(batches(dataset, batch_size=1, num_epochs=1, process_index=index, process_count=2))
        for index in range(2)
    ]
    assert len(whole) == 5
    assert shares == [whole[::2], whole[1::2]]


def test_short_performances_are_padded_or_dropped(dataset, performances):
    names = [piece.name for piece in dataset.pieces["train"]]
    kept = batches(dataset, drop_short=True, batch_size=1, num_epochs=1)
    assert len(list(kept)) == len(names) - 1
    (longest,) = {max(len(encode_events(stretch(notes_to_array(performances["a/0"]), f), MAGENTA)) for f in STRETCHES)}
    with pytest.raises(EventDatasetError, match=f"0 of 5 performances of train .length {longest + 1}, drop_short True"):
        batches(dataset, drop_short=True, length=longest + 1)


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_reads_every_token_once(dataset, performances, process_count):
    expected = []
    for piece in dataset.pieces["train"]:
        tokens = encode_events(notes_to_array(performances[piece.name.removesuffix(".mid")]), MAGENTA).tolist()
        while tokens:
            expected.append(tuple(tokens[:LENGTH]))
            tokens = tokens[LENGTH:]
    shares = []
    for index in range(process_count):
        arguments = {"length": LENGTH, "batch_size": 4, "process_index": index, "process_count": process_count}
        found = list(evaluation_event_batches(dataset, "train", **arguments))
        assert all(batch["targets"].shape == (4, LENGTH) for batch in found)
        assert all(np.array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1]) for batch in found)
        shares.append(found)
    assert len({len(share) for share in shares}) == 1
    rows = targets(batch for together in zip(*shares, strict=True) for batch in together)
    assert rows[: len(expected)] == expected
    assert set(rows[len(expected) :]) <= {()}


def test_some_rows_stand_for_all(dataset):
    every = [batch["targets"] for batch in evaluation_event_batches(dataset, "train", length=LENGTH, batch_size=1)]
    step = -(-len(every) // 5)
    assert step > 1
    some = evaluation_event_batches(dataset, "train", length=LENGTH, batch_size=1, max_rows=5)
    np.testing.assert_array_equal([batch["targets"] for batch in some], every[::step])


def test_errors(dataset, folder):
    for changes, match in (
        ({"split": "dev"}, "split is 'dev'; expected one of train, valid, test"),
        ({"split": "test"}, "test has no performances"),
        ({"length": 0}, "length is 0 and batch_size 5"),
        ({"batch_size": 0}, "length is 16 and batch_size 0"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of process_count 2"),
        ({"process_count": 6}, "5 of 5 performances of train .* cannot be shared by 6 processes"),
        ({"transpose": (1, 3)}, r"transpose is \(1, 3\)"),
        ({"stretches": (1.2,)}, r"stretches are \(1.2,\); train has 0.9, 1.0, 1.1"),
    ):
        with pytest.raises(EventDatasetError, match=match):
            batches(dataset, **changes)
    with pytest.raises(EventDatasetError, match="max_rows is 0"):
        evaluation_event_batches(dataset, batch_size=1, max_rows=0)
    with pytest.raises(EventDatasetError, match="num_reserved=0.* has no id for start and padding"):
        evaluation_event_batches(EventDataset(folder / "PAPER"), batch_size=1)
