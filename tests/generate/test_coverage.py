import pytest

from jaxaudio.data.transcripts import Span
from jaxaudio.generate.coverage import Coverage


def test_spans_tile_the_audio_and_keep_the_first_mark_but_hearing_wins():
    coverage = Coverage(1000, 10.004)
    coverage.skip_outside([(100, 400), (300, 900)], "clip_timestamps")
    assert coverage.done_s == 2.0
    coverage.skip(50, 200, "no_speech")  # the first half second of it was never asked for
    coverage.hear(200, 600)
    coverage.skip(500, 700, "hallucination_silence")
    with pytest.raises(RuntimeError, match="frame 700 of 1000"):
        coverage.spans()
    coverage.hear(700, 900)
    coverage.hear(150, 160)
    heard, skipped = coverage.spans()
    assert heard == (Span(1.5, 1.6, "heard"), Span(2.0, 6.0, "heard"), Span(7.0, 9.0, "heard"))
    assert skipped == (
        Span(0.0, 1.0, "clip_timestamps"), Span(1.0, 1.5, "no_speech"), Span(1.6, 2.0, "no_speech"),
        Span(6.0, 7.0, "hallucination_silence"), Span(9.0, 10.004, "clip_timestamps"),
    )  # fmt: skip
    assert coverage.done_s == 10.004


def test_an_audio_without_a_frame():
    assert Coverage(0, 0.005).spans() == ((), (Span(0.0, 0.005, "shorter_than_a_frame"),))
    assert Coverage(0, 0.005).done_s == 0.005
