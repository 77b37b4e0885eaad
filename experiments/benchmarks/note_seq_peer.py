"""note-seq, the package behind the public event models, as the peer of our reader and code of performances.

Install it without its dependencies, of which only a few are needed here:
    pip install --no-deps note-seq==0.0.5 pretty_midi && pip install absl-py attrs importlib_resources mido protobuf six
"""

import importlib.util
import os
import sys
import types

from jaxaudio.data.events import STEPS_PER_SECOND, EventVocabulary


def load(*names: str) -> list[types.ModuleType]:
    """Modules of note-seq by name, without its `__init__`, which imports bokeh, librosa, IPython and more.

    Raises:
        ModuleNotFoundError: note-seq is not installed; says how to install it.
    """
    if "note_seq" not in sys.modules:
        spec = importlib.util.find_spec("note_seq")
        if spec is None:
            raise ModuleNotFoundError("note-seq is not installed: pip install --no-deps note-seq==0.0.5 pretty_midi")
        package = types.ModuleType("note_seq")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["note_seq"] = package
    return [importlib.import_module(f"note_seq.{name}") for name in names]


def read_sequence(path: str | os.PathLike):
    """A MIDI file as a note sequence with the pedal applied."""
    midi_io, sequences_lib = load("midi_io", "sequences_lib")
    return sequences_lib.apply_sustain_control_changes(midi_io.midi_file_to_note_sequence(str(path)))


def events(sequence, vocabulary: EventVocabulary):
    """A note sequence as note-seq's events, with the vocabulary's velocities and shifts."""
    performance_lib, sequences_lib = load("performance_lib", "sequences_lib")
    return performance_lib.Performance(
        sequences_lib.quantize_note_sequence_absolute(sequence, STEPS_PER_SECOND),
        num_velocity_bins=vocabulary.num_velocity_bins,
        max_shift_steps=vocabulary.max_shift_steps,
    )


def ids(performance, vocabulary: EventVocabulary) -> list[int]:
    """Of note-seq's events, from our first id after the reserved ones."""
    codec = encoding(vocabulary)
    return [codec.encode_event(event) + vocabulary.num_reserved for event in performance]


def encoding(vocabulary: EventVocabulary):
    """note-seq's map between events and ids, which knows no reserved ids."""
    (encoder_decoder,) = load("performance_encoder_decoder")
    return encoder_decoder.PerformanceOneHotEncoding(
        vocabulary.num_velocity_bins, vocabulary.max_shift_steps, vocabulary.min_pitch, vocabulary.max_pitch
    )
