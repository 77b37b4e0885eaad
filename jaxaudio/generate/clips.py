"""The parts of an audio that are transcribed, in mel frames: what is asked for, and where somebody speaks in it."""

import math
from collections.abc import Callable, Sequence

from jaxaudio.data.voice_activity import merge_spans
from jaxaudio.models.whisper import FRAME_RATE

Clips = list[tuple[int, int]]


def requested_clips(points_s: Sequence[float], num_frames: int) -> Clips:
    """Clips (start, end) of an audio from start, end, start, ... in seconds; the last end is the audio's if missing.

    A clip that ends after the audio ends with it. Frames are rounded as in openai-whisper.

    Raises:
      ValueError: a clip that starts at or after the end of the audio; has both seconds.
    """
    points = [round(point * FRAME_RATE) for point in points_s] or [0]
    if len(points) % 2:
        points.append(num_frames)
    clips = list(zip(points[::2], points[1::2], strict=True))
    for start, _ in clips:
        if start and start >= num_frames:
            raise ValueError(
                f"clip_timestamps has a clip that starts at {start / FRAME_RATE} s, where the audio, of "
                f"{num_frames / FRAME_RATE} s, has ended"
            )
    return [(start, min(end, num_frames)) for start, end in clips if start < num_frames]


def speech_clips(
    clips: Clips, speech: Sequence[tuple[float, float]], window_frames: int, *, keep_cuts: bool = True
) -> Clips:
    """Parts of `clips` that hold the speech, each no longer than a window, as few as possible.

    Args:
      clips: (start, end) frames.
      speech: (start_s, end_s); its ends are rounded outwards, so that no part of a frame is lost.
      window_frames: frames of the model's window.
      keep_cuts: False joins the clips of a longer speech again, where windows follow one another.
    """
    found: Clips = []
    for first, last in clips:
        frames = [(max(_frame(s, math.floor), first), min(_frame(e, math.ceil), last)) for s, e in speech]
        spans = [(start / FRAME_RATE, end / FRAME_RATE) for start, end in frames if start < end]
        parts: Clips = []
        for start_s, end_s in merge_spans(spans, window_frames / FRAME_RATE):
            start, end = round(start_s * FRAME_RATE), round(end_s * FRAME_RATE)
            if parts and parts[-1][1] == start and not keep_cuts:
                start = parts.pop()[0]
            if start < end:
                parts.append((start, end))
        found += parts
    return found


def _frame(seconds: float, rounded: Callable[[float], int]) -> int:
    return rounded(round(seconds * FRAME_RATE, 6))  # 0.07 * 100 is a little more than 7
