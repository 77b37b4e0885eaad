import pytest

from jaxaudio.generate.clips import requested_clips, speech_clips


@pytest.mark.parametrize(
    ("points", "clips"),
    [
        ((), [(0, 1000)]),
        ((0.0,), [(0, 1000)]),
        ((2.5,), [(250, 1000)]),
        ((1.0, 2.0, 3.0), [(100, 200), (300, 1000)]),
        ((1.0, 20.0), [(100, 1000)]),
        ((1.125, 1.135), [(112, 114)]),  # as Python rounds 112.5 and 113.5
    ],
)
def test_requested_clips(points, clips):
    assert requested_clips(points, 1000) == clips


def test_a_clip_behind_the_end():
    with pytest.raises(ValueError, match=r"starts at 10.0 s.* 10.0 s"):
        requested_clips((1.0, 2.0, 10.0), 1000)
    assert requested_clips((0.0,), 0) == []


def test_speech_clips():
    whole = [(0, 10_000)]
    assert speech_clips(whole, [], 3000) == []
    assert speech_clips(whole, [(0.07, 0.29)], 3000) == [(7, 29)]
    assert speech_clips(whole, [(0.071, 0.2899)], 3000) == [(7, 29)]  # outwards
    assert speech_clips(whole, [(1.0, 5.0), (8.0, 31.0), (31.5, 32.0)], 3000) == [(100, 3100), (3150, 3200)]
    assert speech_clips([(200, 900), (1000, 1100)], [(1.0, 5.0), (8.0, 31.0)], 3000) == [(200, 900), (1000, 1100)]
    assert speech_clips(whole, [(1.0, 5.0)], 100) == [(100, 200), (200, 300), (300, 400), (400, 500)]
    assert speech_clips(whole, [(1.0, 5.0), (7.0, 8.0)], 100, keep_cuts=False) == [(100, 500), (700, 800)]
    adjacent = speech_clips([(0, 200), (200, 500)], [(1.0, 5.0)], 3000, keep_cuts=False)
    assert adjacent == [(100, 200), (200, 500)]  # what was asked for apart stays apart
