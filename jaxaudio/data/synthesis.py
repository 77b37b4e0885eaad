"""Notes to sound: a small additive synthesiser, and wav files.

It lets one hear generated notes without a sound font; it is no model of an instrument.
"""

import os
from collections.abc import Sequence

import numpy as np

from jaxaudio.data.files import atomic_path
from jaxaudio.data.midi import Note

HARMONICS = (1.0, 0.45, 0.25, 0.12, 0.06, 0.03)  # amplitudes, the fundamental first: a soft organ pipe
ATTACK_S = 0.02
DECAY_S = 0.15
SUSTAIN = 0.7
RELEASE_S = 0.12
PEAK = 0.9


def synthesize(notes: Sequence[Note], sample_rate: int = 44100) -> np.ndarray:
    """Adds up the harmonics of every note under an attack-decay-sustain-release envelope.

    Pitches are equally tempered with A4 = 440 Hz. Harmonics above half the sample rate are left out, for they would
    fold back. Notes start and end in silence, so nothing clicks; a release rings 0.12 s beyond the end of its note.

    Args:
        notes: In any order. Velocity 127 is full amplitude.
        sample_rate: In Hz.

    Returns:
        Waveform (A,) float32, with the loudest sample at 0.9.

    Raises:
        ValueError: There are no notes, or one has no duration (has the note).
    """
    if not notes:
        raise ValueError("There are no notes to synthesize.")
    for note in notes:
        if not 0 <= note.start_s < note.end_s:
            raise ValueError(f"{note} needs 0 <= start_s < end_s.")
    num_samples = int(np.ceil((max(note.end_s for note in notes) + RELEASE_S) * sample_rate)) + 1
    waveform = np.zeros(num_samples, np.float64)
    for note in notes:
        start = round(note.start_s * sample_rate)
        sound = _tone(note, sample_rate)
        waveform[start : start + len(sound)] += sound[: num_samples - start]
    return (waveform * (PEAK / np.abs(waveform).max())).astype(np.float32)


def write_wav(path: str | os.PathLike, waveform: np.ndarray, sample_rate: int) -> None:
    """Writes a waveform (A,) or (A, channels) in -1..1 as 16-bit PCM; the file appears whole or not at all.

    Raises:
        ValueError: The waveform is empty, not finite, or louder than 1, which would clip (has the peak).
    """
    import soundfile

    if waveform.ndim not in (1, 2) or not waveform.size:
        raise ValueError(f"{path}: a waveform is (samples,) or (samples, channels); got shape {waveform.shape}.")
    peak = float(np.abs(waveform).max())
    if not peak <= 1.0:
        raise ValueError(f"{path}: the waveform peaks at {peak:g}; scale it to -1..1, or it would clip.")
    with atomic_path(path) as temporary:
        soundfile.write(temporary, waveform, sample_rate, subtype="PCM_16", format="WAV")


def _tone(note: Note, sample_rate: int) -> np.ndarray:
    held_s = note.end_s - note.start_s
    time_s = np.arange(round((held_s + RELEASE_S) * sample_rate)) / sample_rate
    frequency = 440.0 * 2.0 ** ((note.pitch - 69) / 12)
    tone = np.zeros_like(time_s)
    for number, amplitude in enumerate(HARMONICS, start=1):
        if number * frequency < sample_rate / 2:
            tone += amplitude * np.sin(2 * np.pi * number * frequency * time_s)
    return tone * _envelope(time_s, held_s) * (note.velocity / 127)


def _envelope(time_s: np.ndarray, held_s: float) -> np.ndarray:
    """Straight lines through 0, 1, the sustain level and 0; a note that ends in its attack is released from there."""
    held = np.interp(np.minimum(time_s, held_s), [0.0, ATTACK_S, ATTACK_S + DECAY_S], [0.0, 1.0, SUSTAIN])
    return held * np.interp(time_s, [held_s, held_s + RELEASE_S], [1.0, 0.0])
