"""A folder of tiny MIDI files for the experiments on performances."""

import pathlib

import numpy as np

from jaxaudio.data.audio_crops import split_recordings
from jaxaudio.data.midi import Note, write_midi
from jaxaudio.data.performances import TENTHS


def write_performances(folder: pathlib.Path, num_notes: int = 60) -> pathlib.Path:
    """Eight performances for training, three for validation and three for the test: a tune above broken chords."""
    names = split_recordings([f"piece_{number}" for number in range(200)], TENTHS)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in (*names["train"][:8], *names["valid"][:3], *names["test"][:3]):
        start, notes = 0.0, []
        for number in range(num_notes):
            pitch = 72 + int(rng.integers(12)) if number % 3 == 0 else 40 + int(rng.integers(20))
            notes.append(Note(start, start + 0.4, pitch, int(rng.integers(40, 100)), 0))
            start += int(rng.integers(10, 40)) / 100
        write_midi(notes, folder / f"{name}.mid")
    return folder
