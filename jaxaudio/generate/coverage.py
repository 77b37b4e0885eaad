"""Which seconds of an audio were heard, and which were skipped by which rule."""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxaudio.data.transcripts import Span
from jaxaudio.models.whisper import FRAME_RATE

_PENDING, _HEARD = 0, 1
_HEARD_RULE = "heard"


class Coverage:
    """One mark for each mel frame of an audio, made while it is transcribed.

    Args:
      num_frames: frames of the audio.
      duration_s: its exact duration; the last span takes the part of a frame that the frames leave over.
    """

    def __init__(self, num_frames: int, duration_s: float):
        self.duration_s = duration_s
        self._marks = np.full(num_frames, _PENDING, np.uint8)
        self._rules = ["", _HEARD_RULE]  # by mark

    def hear(self, start: int, end: int):
        """Marks frames whose transcription was kept."""
        self._marks[start:end] = _HEARD

    def skip(self, start: int, end: int, rule: str):
        """Marks frames that `rule` leaves out, where they have no mark yet."""
        marks = self._marks[start:end]
        marks[marks == _PENDING] = self._mark(rule)

    def skip_outside(self, clips: Sequence[tuple[int, int]], rule: str):
        """Marks what lies outside all clips (start, end), where it has no mark yet."""
        is_left_out = self._marks == _PENDING
        for start, end in clips:
            is_left_out[start:end] = False
        self._marks[is_left_out] = self._mark(rule)

    def _mark(self, rule: str) -> int:
        if rule not in self._rules:
            self._rules.append(rule)
        return self._rules.index(rule)

    @property
    def done_s(self) -> float:
        """Seconds that are heard or skipped so far."""
        done = np.count_nonzero(self._marks)
        return self.duration_s if done == len(self._marks) else done / FRAME_RATE

    def spans(self) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """(heard, skipped), each in order; together they tile 0..duration_s.

        Raises:
          RuntimeError: frames that nothing has marked yet, with the first.
        """
        marks = self._marks
        if not len(marks):  # the model's frames are 10 ms; there is not one to listen to
            return (), (Span(0.0, self.duration_s, "shorter_than_a_frame"),)
        if not marks.all():
            frame = int(np.argmin(marks != _PENDING))
            raise RuntimeError(f"frame {frame} of {len(marks)} is neither heard nor skipped")
        starts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist()]
        times = [*(start / FRAME_RATE for start in starts), self.duration_s]
        rules = [self._rules[marks[start]] for start in starts]
        spans = [Span(*ends, rule) for ends, rule in zip(itertools.pairwise(times), rules, strict=True)]
        heard = tuple(span for span in spans if span.rule == _HEARD_RULE)
        return heard, tuple(span for span in spans if span.rule != _HEARD_RULE)
