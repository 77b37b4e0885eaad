"""Crops of codes: what stands where, that nothing is lost or read twice, and that a seed repeats them."""

import numpy as np
import pytest

from jaxaudio.data.code_crops import code_batches, code_crop, evaluation_code_batches
from jaxaudio.data.manifests import Utterance
from jaxaudio.data.token_dataset import TokenClip

Q, T = 3, 8


def make_clips(*lengths):
    """Code 100 * clip + frame in the first codebook, 1 more in each other."""
    return [
        TokenClip(i, Utterance(f"{i}.wav"), 100 * i + np.arange(n, dtype=np.int32)[None] + np.arange(Q)[:, None], n)
        for i, n in enumerate(lengths)
    ]


def test_a_row_by_hand():
    row = code_crop(np.array([[5, 6, 7], [1, 2, 3]]), 4, 1, 9)
    np.testing.assert_array_equal(row["inputs"], [[0, 6, 7, 0], [0, 2, 3, 0]])
    np.testing.assert_array_equal(row["targets"], [[5, 6, 7, 0], [1, 2, 3, 0]])
    np.testing.assert_array_equal(row["mask"], [[True, True, True, False], [False] * 4])
    assert (row["num_levels"], row["offset"]) == (1, 9)
    assert {name: array.dtype for name, array in row.items() if name != "mask"} == dict.fromkeys(
        ("inputs", "targets", "num_levels", "offset"), np.int32
    )


def test_training_crops():
    clips = make_clips(30, 5, 8, 60)
    arguments = {"num_frames": T, "levels": (1, Q), "max_offset": 4, "batch_size": 2}
    batches = code_batches(clips, seed=0, **arguments)
    seen, levels, offsets = [], set(), set()
    for _ in range(40):
        batch = next(batches)
        for row in range(2):
            targets, inputs, mask = (batch[name][row] for name in ("targets", "inputs", "mask"))
            length, first = int(mask[0].sum()), int(targets[0, 0])
            clip = first // 100
            assert length == min(T, clips[clip].codes.shape[1])
            np.testing.assert_array_equal(targets[0, :length], first + np.arange(length))
            np.testing.assert_array_equal(inputs[:, 1:length], targets[:, : length - 1] + 1)
            assert not inputs[:, 0].any()
            assert mask[: batch["num_levels"][row], :length].all()
            assert mask.sum() == batch["num_levels"][row] * length
            seen.append((clip, first % 100))
            levels.add(int(batch["num_levels"][row]))
            offsets.add(int(batch["offset"][row]))
    assert sorted(clip for clip, _ in seen) == sorted([0, 1, 2, 3] * 20)  # each once an epoch
    assert {start for clip, start in seen if clip == 1} == {0}
    assert max(start for clip, start in seen if clip == 3) > 40
    assert (levels, offsets) == ({1, Q}, {0, 1, 2, 3, 4})
    again, other = (next(code_batches(clips, seed=seed, **arguments)) for seed in (0, 1))
    first = next(code_batches(clips, seed=0, **arguments))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_processes_share_the_clips():
    clips = make_clips(8, 8, 8, 8)
    found = []
    for process in range(2):
        arguments = {"num_frames": T, "levels": (Q,), "max_offset": 0, "batch_size": 2, "process_count": 2}
        batch = next(code_batches(clips, seed=3, process_index=process, **arguments))
        found += (batch["targets"][:, 0, 0] // 100).tolist()
    assert sorted(found) == [0, 1, 2, 3]


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_reads_everything_once(process_count):
    clips = make_clips(30, 5, 16)
    codes, sizes = [], set()
    for process in range(process_count):
        arguments = {"num_levels": 2, "batch_size": 2, "process_index": process, "process_count": process_count}
        for batch in evaluation_code_batches(clips, num_frames=T, **arguments):
            assert batch["targets"].shape == (2, 2, T)
            codes += batch["targets"][:, 0][batch["mask"][:, 0]].tolist()
        sizes.add(len(list(evaluation_code_batches(clips, num_frames=T, **arguments))))
    assert sorted(codes) == sorted(np.concatenate([clip.codes[0] for clip in clips]).tolist())
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": []}, "there are no clips"),
        ({"num_frames": 0}, "num_frames is 0 and batch_size 2"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"levels": (2, 4)}, r"levels are \(2, 4\); the clips have 1 to 3"),
        ({"levels": ()}, r"levels are \(\)"),
        ({"max_offset": -1}, "max_offset is -1"),
        ({"process_count": 3, "process_index": 2}, "process 2 of 3 cannot read a share of 2 clips"),
    ],
)
def test_refused_arguments(changes, message):
    arguments = {"num_frames": T, "levels": (1,), "max_offset": 0, "batch_size": 2, "seed": 0}
    with pytest.raises(ValueError, match=message):
        code_batches(**({"clips": make_clips(5, 9)} | arguments | changes))
