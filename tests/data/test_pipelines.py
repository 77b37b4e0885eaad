import grain
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxaudio.data import pipelines


def _sequences(count=5, seed=0):
    """Pieces of different lengths, a fifth of them rests, with room for three semitones up and down."""
    rng = np.random.default_rng(seed)
    return [
        rng.choice([1, *range(5, 45)], 4 * int(rng.integers(5, 40)), p=[0.2] + [0.02] * 40).astype(np.int32)
        for _ in range(count)
    ]


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def _equal(left, right):
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def _batches(sequences, **changes):
    arguments = {"length": 32, "batch_size": 3, "seed": 1, "transpose": (-3, 3)}
    return pipelines.chorale_batches(sequences, **(arguments | changes))


def test_window_by_hand():
    row = pipelines.token_window(np.array([5, 6, 7, 8]), 6)
    np.testing.assert_array_equal(row["inputs"], [0, 5, 6, 7, 8, 0])
    np.testing.assert_array_equal(row["targets"], [5, 6, 7, 8, 0, 0])
    np.testing.assert_array_equal(row["mask"], [True] * 4 + [False] * 2)
    with pytest.raises(ValueError, match="window of 3 tokens cannot hold 4"):
        pipelines.token_window(np.array([5, 6, 7, 8]), 3)


def test_training_rows_are_transposed_crops_that_start_on_a_beat():
    sequences = _sequences()
    starts, shifts = set(), set()
    for batch in _take(_batches(sequences), 40):
        assert batch["inputs"].shape == batch["targets"].shape == batch["mask"].shape == (3, 32)
        assert (batch["inputs"].dtype, batch["targets"].dtype, batch["mask"].dtype) == (np.int32, np.int32, bool)
        for inputs, targets, mask in zip(batch["inputs"], batch["targets"], batch["mask"], strict=True):
            crop = targets[mask]
            assert mask[: len(crop)].all()
            np.testing.assert_array_equal(targets[len(crop) :], 0)
            np.testing.assert_array_equal(inputs, np.r_[0, targets[:-1]])
            found = [
                (index, start, shift)
                for index, tokens in enumerate(sequences)
                for start in range(0, len(tokens), 16)
                for shift in range(-3, 4)
                if np.array_equal(np.where(tokens > 1, tokens + shift, tokens)[start : start + 32], crop)
            ]
            assert len(found) == 1
            starts.add(found[0][:2])
            shifts.add(found[0][2])
    assert shifts == set(range(-3, 4))
    # Every crop that reaches the end of its piece, or fills the row, is drawn sooner or later.
    expected = {(i, s) for i, t in enumerate(sequences) for s in range(0, max(1, len(t) - 32 + 16), 16)}
    assert starts == expected


def test_transposition_stays_in_range_and_keeps_rests():
    narrow = np.array([2, 1, 4, 45] * 4, np.int32)
    shifts = {
        tuple(row[:4].tolist())
        for batch in _take(_batches([narrow], length=16, transpose=(-5, 5)), 60)
        for row in batch["targets"]
    }
    assert shifts == {(2 + s, 1, 4 + s, 45 + s) for s in (0, 1, 2)}
    np.testing.assert_array_equal(pipelines.transpose_tokens(narrow[:4], 2), [4, 1, 6, 47])
    with pytest.raises(ValueError, match=r"shift of -1 semitones .* allows 0\.\.2"):
        pipelines.transpose_tokens(narrow, -1)


def test_seed_decides_everything():
    sequences = _sequences()
    first = _take(_batches(sequences), 6)
    assert _equal(first, _take(_batches(sequences), 6))
    assert not _equal(first, _take(_batches(sequences, seed=2), 6))


def test_epochs_see_every_sequence_once_in_another_order():
    sequences = [np.full(16, index + 1, np.int32) for index in range(12)]
    rows = [row[0] for batch in _take(_batches(sequences, transpose=None), 12) for row in batch["targets"].tolist()]
    epochs = [rows[i : i + 12] for i in range(0, 36, 12)]
    assert all(sorted(epoch) == list(range(1, 13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_processes_read_disjoint_shards_that_cover_the_epoch():
    sequences = [np.full(16, index + 1, np.int32) for index in range(12)]
    shards = [
        [
            row[0]
            for batch in _batches(sequences, transpose=None, num_epochs=1, process_index=index, process_count=4)
            for row in batch["targets"].tolist()
        ]
        for index in range(4)
    ]
    assert [len(shard) for shard in shards] == [3] * 4
    assert sorted(sum(shards, [])) == list(range(1, 13))


def test_iterator_is_an_orbax_checkpointable(tmp_path):
    sequences = _sequences()
    iterator = _batches(sequences)
    assert isinstance(iterator, grain.DatasetIterator)
    _take(iterator, 4)
    with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save_checkpointables(4, {"data": iterator})
        expected = _take(iterator, 5)
        restored = _batches(sequences)
        checkpointer.load_checkpointables(4, {"data": restored})
    assert _equal(expected, _take(restored, 5))


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_counts_every_token_once(process_count):
    sequences = [*_sequences(7), np.arange(1, 33, dtype=np.int32), np.arange(1, 34, dtype=np.int32)]
    shards = [
        list(
            pipelines.evaluation_batches(
                sequences, length=32, batch_size=3, process_index=index, process_count=process_count
            )
        )
        for index in range(process_count)
    ]
    assert len({len(shard) for shard in shards}) == 1
    rows = [
        (batch["inputs"][i], batch["targets"][i], batch["mask"][i])
        for step in zip(*shards, strict=True)
        for batch in step
        for i in range(3)
    ]
    seen = np.concatenate([targets[mask] for _, targets, mask in rows])
    np.testing.assert_array_equal(seen, np.concatenate(sequences))
    assert all(inputs[0] == 0 and np.array_equal(inputs[1:], targets[:-1]) for inputs, targets, _ in rows)
    assert all((targets[~mask] == 0).all() for _, targets, mask in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 20}, "length=20 must be a positive multiple of 16"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, r"process_index=2 must lie in 0\.\.1"),
        ({"process_count": 9}, "5 sequences cannot be shared by 9 processes"),
        ({"transpose": (1, 3)}, r"transpose=\(1, 3\)"),
    ],
)
def test_unusable_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        _batches(_sequences(), **changes)


def test_unusable_sequences():
    with pytest.raises(ValueError, match="There are no sequences"):
        _batches([])
    with pytest.raises(ValueError, match=r"Sequence 1 .* ids 0\.\.60"):
        pipelines.evaluation_batches([np.array([3, 4]), np.array([0, 60])], length=16, batch_size=1)
    with pytest.raises(ValueError, match=r"Sequence 0 .* shape \(0,\)"):
        _batches([np.zeros(0, np.int32)])
