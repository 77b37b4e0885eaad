"""Reader and code of performances beside note-seq, on real performances and on files full of coincidences."""

import importlib.util
import os
import pathlib
import zipfile

import mido
import numpy as np
import pytest

from experiments.benchmarks import events as benchmark
from experiments.benchmarks import note_seq_peer
from jaxaudio.data.events import (
    MAGENTA,
    PAPER,
    EventVocabulary,
    apply_sustain,
    array_to_notes,
    decode_events,
    encode_events,
    notes_to_array,
    stretch,
)
from jaxaudio.data.midi import Note
from jaxaudio.data.midi_performance import read_performance

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("note_seq") and importlib.util.find_spec("pretty_midi")),
    reason="note-seq is not installed: pip install --no-deps note-seq==0.0.5 pretty_midi importlib_resources",
)
needs_asap = pytest.mark.skipif("JAXAUDIO_DATA" not in os.environ, reason="JAXAUDIO_DATA names no folder with ASAP")


@pytest.fixture(scope="module")
def shortest(tmp_path_factory):
    """Paths of the 200 smallest performances of ASAP."""
    folder = tmp_path_factory.mktemp("asap")
    with zipfile.ZipFile(pathlib.Path(os.environ["JAXAUDIO_DATA"]) / "asap" / "performances.zip") as archive:
        files = [info for info in archive.infolist() if info.filename.lower().endswith(".mid")]
        return [archive.extract(info, folder) for info in sorted(files, key=lambda info: info.file_size)[:200]]


@needs_asap
@pytest.mark.slow
def test_real_performances_give_the_events_of_note_seq(shortest):
    assert len(shortest) == 200
    num_events = 0
    for path in shortest:
        notes = apply_sustain(read_performance(path))
        performance = note_seq_peer.events(note_seq_peer.read_sequence(path), MAGENTA)  # PAPER differs in ids alone
        for vocabulary in (PAPER, MAGENTA):
            tokens = encode_events(notes, vocabulary)
            assert tokens.tolist() == note_seq_peer.ids(performance, vocabulary), path
        num_events += len(tokens)
    assert num_events > 500_000


@needs_asap
def test_stretched_performances_give_the_events_of_note_seq(shortest):
    (sequences_lib,) = note_seq_peer.load("sequences_lib")
    for path in shortest[:3]:
        notes, sequence = apply_sustain(read_performance(path)), note_seq_peer.read_sequence(path)
        for factor in (0.95, 0.975, 1.025, 1.05):
            expected = note_seq_peer.events(sequences_lib.stretch_note_sequence(sequence, factor), MAGENTA)
            assert encode_events(stretch(notes, factor), MAGENTA).tolist() == note_seq_peer.ids(expected, MAGENTA)


@pytest.mark.parametrize("vocabulary", [PAPER, MAGENTA, EventVocabulary(30, 90, 20, 40, 0)])
def test_any_ids_decode_to_the_notes_of_note_seq(vocabulary):
    (performance_lib,) = note_seq_peer.load("performance_lib")
    rng = np.random.default_rng(0)
    # Few pitches, so that notes overlap, are struck together, and are let go without sounding.
    ids = [vocabulary.note_on[40:44], vocabulary.note_off[40:44], vocabulary.time_shift[:3], vocabulary.velocity]
    tokens = np.array([rng.choice(ids[kind]) for kind in rng.integers(0, 4, 2000)], np.int32)
    performance = performance_lib.Performance(
        steps_per_second=100,
        num_velocity_bins=vocabulary.num_velocity_bins,
        max_shift_steps=vocabulary.max_shift_steps,
    )
    encoding = note_seq_peer.encoding(vocabulary)
    for token in tokens:
        performance.append(encoding.decode_event(int(token) - vocabulary.num_reserved))
    expected = [Note(n.start_time, n.end_time, n.pitch, n.velocity, 0) for n in performance.to_sequence().notes]
    found = decode_events(tokens, vocabulary)
    assert len(found) == len(expected) > 300
    for note, other in zip(sorted(found), sorted(expected), strict=True):
        assert note[2:] == other[2:]
        assert note[:2] == pytest.approx(other[:2], abs=1e-9)


def _random_file(rng, path):
    """Keys and pedals of three channels in two tracks on few ticks, in any order within a tick, tempo changes above."""
    file = mido.MidiFile(ticks_per_beat=97)
    tempos = [mido.MetaMessage("set_tempo", tempo=int(rng.integers(200_000, 900_000)), time=t) for t in (0, 9, 0, 30)]
    file.tracks.append(mido.MidiTrack(tempos))
    for channels in ((0, 3), (0,)):
        track = mido.MidiTrack()
        for _ in range(150):
            channel, time = int(rng.choice(channels)), int(rng.choice([0, 0, 1, 7]))
            kind = rng.integers(5)
            if kind == 0:
                value = int(rng.choice([0, 63, 64, 127]))
                track.append(mido.Message("control_change", control=64, value=value, channel=channel, time=time))
            else:
                pitch, velocity = int(rng.integers(60, 63)), int(rng.integers(1, 128)) if kind < 3 else 0
                track.append(mido.Message("note_on", note=pitch, velocity=velocity, channel=channel, time=time))
        file.tracks.append(track)
    file.save(path)


def test_coincidences_are_resolved_as_by_note_seq(tmp_path):
    midi_io, sequences_lib = note_seq_peer.load("midi_io", "sequences_lib")
    path = tmp_path / "random.mid"
    rng = np.random.default_rng(0)
    num_dropped = 0
    for _ in range(25):
        _random_file(rng, path)
        performance, sequence = read_performance(path), midi_io.midi_file_to_note_sequence(str(path))
        num_dropped += performance.num_dropped
        keys = [Note(n.start_time, n.end_time, n.pitch, n.velocity, n.instrument) for n in sequence.notes]
        found = zip(array_to_notes(performance.notes), performance.part.tolist(), strict=True)
        # Times are equal to the last bit. Which of equal ones comes first decides the order of events.
        assert [n._replace(voice=part) for n, part in found] == sorted(keys, key=lambda n: (n.start_s, n.pitch))

        sequence = sequences_lib.apply_sustain_control_changes(sequence)
        sustained = [Note(n.start_time, n.end_time, n.pitch, n.velocity, 0) for n in sequence.notes]
        notes = apply_sustain(performance)
        assert array_to_notes(notes) == array_to_notes(notes_to_array(sustained))
        assert encode_events(notes, PAPER).tolist() == note_seq_peer.ids(note_seq_peer.events(sequence, PAPER), PAPER)
    assert num_dropped > 60


def test_benchmark(tmp_path, capsys):
    rng = np.random.default_rng(1)
    for index in range(4):
        _random_file(rng, tmp_path / f"{index}.mid")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for index in range(4):
            archive.write(tmp_path / f"{index}.mid", f"folder/{index}.mid")
    found = benchmark.main(benchmark.parse([str(tmp_path / "all.zip"), "--num_files=2", "--repeats=1"]))
    assert (
        benchmark.main(benchmark.parse([str(tmp_path), "--num_files=2", "--repeats=1"])).num_events == found.num_events
    )
    assert found.num_events > 100
    assert f"2 files, {found.num_events} events, the same from both" in capsys.readouterr().out
    with pytest.raises(ValueError, match="5 files cannot be taken from the 4 MIDI files"):
        benchmark.choose(tmp_path, 5)
