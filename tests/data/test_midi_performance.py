import contextlib

import mido
import numpy as np
import pytest

from jaxaudio.data.events import array_to_notes
from jaxaudio.data.midi import MidiError, Note, read_midi, write_midi
from jaxaudio.data.midi_performance import read_performance


def _save(path, *tracks, ticks_per_beat=100, kind=1):
    file = mido.MidiFile(type=kind, ticks_per_beat=ticks_per_beat)
    file.tracks += [mido.MidiTrack(track) for track in tracks]
    file.save(path)
    return path


def _on(pitch, at=0, velocity=64, channel=0):
    return mido.Message("note_on", note=pitch, velocity=velocity, time=at, channel=channel)


def _off(pitch, at=0, channel=0):
    return mido.Message("note_off", note=pitch, time=at, channel=channel)


def _pedal(value, at=0, channel=0, control=64):
    return mido.Message("control_change", control=control, value=value, time=at, channel=channel)


def _notes(path):
    return array_to_notes(read_performance(path).notes)


def test_equals_the_reader_of_scores(tmp_path):
    """Two parsers, ours here and mido's there, on notes of which no two of one pitch overlap."""
    rng = np.random.default_rng(0)
    notes = [
        Note(start / 1000, (start + length) / 1000, pitch, velocity, pitch % 3)
        for start, length, pitch, velocity in zip(
            rng.integers(0, 5000, 60).tolist(),
            rng.integers(10, 900, 60).tolist(),
            rng.permutation(np.arange(30, 90)).tolist(),
            rng.integers(1, 128, 60).tolist(),
            strict=True,
        )
    ]
    path = tmp_path / "notes.mid"
    write_midi(notes, path, tempo=90.0)
    performance = read_performance(path)
    expected = sorted(read_midi(path), key=lambda n: (n.start_s, n.pitch))
    found = [
        note._replace(voice=part)
        for note, part in zip(array_to_notes(performance.notes), performance.part.tolist(), strict=True)
    ]
    assert [n[2:4] for n in found] == [n[2:4] for n in expected]
    np.testing.assert_allclose([n[:2] for n in found], [n[:2] for n in expected], rtol=1e-12)
    voices = {note.voice: other.voice for note, other in zip(found, expected, strict=True)}
    assert [voices[note.voice] for note in found] == [note.voice for note in expected]
    assert sorted(voices) == sorted(voices.values()) == [0, 1, 2]
    assert performance.num_dropped == 0
    assert array_to_notes(read_performance(path.read_bytes()).notes) == array_to_notes(performance.notes)


def test_tempo_changes_run_over_all_tracks(tmp_path):
    """120 quarters per minute for one beat, then 60 for one beat, then 240; the last change stands in another track."""
    first = [mido.MetaMessage("set_tempo", tempo=1_000_000, time=100)]
    notes = [mido.MetaMessage("track_name", name="piano"), _on(60, 50), _on(60, 100, velocity=0), _on(62)]
    notes += [mido.MetaMessage("set_tempo", tempo=250_000, time=50), _off(62, 200)]
    path = _save(tmp_path / "tempo.mid", first, notes)
    assert _notes(path) == (Note(0.25, 1.0, 60, 64, 0), Note(1.0, 2.0, 62, 64, 0))
    path = _save(tmp_path / "start.mid", [mido.MetaMessage("set_tempo", tempo=250_000)], [_on(60), _off(60, 100)])
    assert _notes(path) == (Note(0.0, 0.25, 60, 64, 0),)


def test_a_key_up_ends_all_earlier_notes_of_its_key(tmp_path):
    track = [_on(60, velocity=10), _on(60, 100, velocity=20), _on(61), _on(60, velocity=0, at=100), _off(60, 50)]
    track += [_off(61, 50)]
    performance = read_performance(_save(tmp_path / "all.mid", track))
    assert array_to_notes(performance.notes) == (
        Note(0.0, 1.0, 60, 10, 0),
        Note(0.5, 1.0, 60, 20, 0),
        Note(0.5, 1.5, 61, 64, 0),
    )
    assert performance.num_dropped == 0


def test_key_down_before_key_up_at_one_tick(tmp_path):
    """Struck again before it is let go, at one tick: the second goes on, and so does the third."""
    track = [_on(60, velocity=1), _on(60, 100, velocity=2), _off(60), _on(60, 100, velocity=3), _off(60), _off(60, 100)]
    assert _notes(_save(tmp_path / "again.mid", track)) == (
        Note(0.0, 0.5, 60, 1, 0),
        Note(0.5, 1.0, 60, 2, 0),
        Note(1.0, 1.5, 60, 3, 0),
    )


def test_notes_without_length_or_release_are_dropped_and_counted(tmp_path):
    track = [_on(60), _off(60), _off(61, 10), _on(62), _off(62, 90), _on(63), _on(63, 50), _on(64, channel=1)]
    performance = read_performance(_save(tmp_path / "dropped.mid", track))
    assert array_to_notes(performance.notes) == (Note(0.05, 0.5, 62, 64, 0),)
    assert performance.num_dropped == 4


def test_pedals_of_each_part(tmp_path):
    one = [_pedal(64, 10), _on(60, 10), _off(60, 20), _pedal(63, 10), _pedal(100, 0, control=67)]
    one += [_pedal(127, channel=2)]  # no notes in this channel
    two = [_on(50, 5, channel=9), _pedal(127, 5, channel=9), _off(50, 5, channel=9)]
    three = [_on(40, 10, channel=0), _off(40, 10), _pedal(127, 10)]
    performance = read_performance(_save(tmp_path / "pedals.mid", one, two, three))
    assert performance.part.tolist() == [1, 2, 0]
    np.testing.assert_allclose(performance.pedal_s, [0.05, 0.25, 0.15])
    assert performance.pedal_down.tolist() == [True, False, True]
    assert performance.pedal_part.tolist() == [0, 0, 2]


def _file(track, *, header=b"\x00\x00\x00\x01\x00\x64", before=b""):
    return b"MThd\x00\x00\x00\x06" + header + before + b"MTrk" + len(track).to_bytes(4) + track


def test_running_status_system_exclusive_and_unknown_chunks():
    track = b"\x00\x90\x3c\x40"  # note on
    track += b"\x00\xff\x01\x02hi"  # text: the running status lives on, as in mido
    track += b"\x0a\x3e\x41"
    track += b"\x81\x00\xb0\x40\x7f\x00\x40\x00"  # 128 ticks later pedal down, then up by running status
    track += b"\x00\xf0\x03\x01\x02\xf7"
    track += b"\x00\xc0\x05\x00\xd0\x06\x00\xe0\x00\x40\x00\xa0\x3c\x01"
    track += b"\x00\x80\x3c\x00\x10\x3e\x00\x00\xff\x2f\x00"
    performance = read_performance(_file(track, before=b"XYZ \x00\x00\x00\x02ab") + b"more than the tracks")
    assert performance.notes.pitch.tolist() == [60, 62]
    np.testing.assert_allclose(performance.notes.start_s, [0.0, 0.05])
    np.testing.assert_allclose(performance.notes.end_s, [0.69, 0.77])
    assert performance.pedal_down.tolist() == [True, False]


@pytest.mark.parametrize(
    ("track", "message"),
    [
        (b"\x00\x3c\x40", r"The MIDI data, track 0, is broken: no message begins with 0x00"),
        (b"\x00\xf8\x00", r"is broken: no message begins with 0xf8"),
        (b"\x00\x90\x3c\x80", r"is broken: a status byte stands among the data before byte 4"),
        (b"\xff\xff\xff\xff\x7f\x90\x3c\x40", r"is broken: the number before byte 4 has more than 28 bits"),
        (b"\x00\x90\x3c", r"track 0, is truncated: it ends inside a message"),
        (b"\x00\xff\x51\x02\x07\xa1", "is broken: a tempo of 1953 microseconds in 2 bytes"),
        (b"\xff\xff\xff\x7f\xff\x01\x00" * 9 + b"\x00\x90\x3c\x40", r"The MIDI data is broken: it lasts 2\^31 ticks"),
        (b"\x00\xff\x01\x05hi", r"track 0, is truncated: its last message is 3 bytes longer"),
        (
            b"\x00\xff\x51\x03\x00\x00\x00\x00\x90\x3c\x40\x10\x3c\x00",
            "is broken: a tempo of 0 microseconds in 3 bytes",
        ),
    ],
)
def test_broken_tracks(track, message):
    with pytest.raises(MidiError, match=message):
        read_performance(_file(track))


NOTE = b"\x00\x90\x3c\x40\x10\x3c\x00"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with b'', not with MThd"),
        (b"RIFF and so on", "begins with b'RIFF'"),
        (b"MThd\x00\x00\x00\x06\x00\x01", "is truncated: it ends inside its header"),
        (_file(NOTE)[:-1], "is truncated: it ends in track 0 of 1"),
        (_file(NOTE, header=b"\x00\x01\x00\x02\x00\x64"), "is truncated: it ends in track 1 of 2"),
        (_file(NOTE, header=b"\x00\x01\x00\x02\x00\x64") + b"MTrk", "is truncated: it ends in track 1 of 2"),
        (_file(NOTE, header=b"\x00\x02\x00\x01\x00\x64"), "is a type 2 MIDI file"),
        (_file(NOTE, header=b"\x00\x00\x00\x01\xe7\x28"), r"no ticks per beat \(0xe728"),
        (_file(NOTE, header=b"\x00\x00\x00\x01\x00\x00"), r"no ticks per beat \(0x0000"),
        (_file(NOTE[:4]), r"without complete notes \(1 tracks\)"),
    ],
)
def test_content_that_cannot_be_used(content, message):
    with pytest.raises(MidiError, match=message):
        read_performance(content)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no MIDI file .*absent\.mid"):
        read_performance(tmp_path / "absent.mid")
    (tmp_path / "broken.mid").write_bytes(_file(NOTE[:2]))
    with pytest.raises(MidiError, match=r"broken\.mid, track 0, is truncated"):
        read_performance(tmp_path / "broken.mid")


def test_altered_bytes_never_escape_as_another_error(tmp_path):
    path = tmp_path / "altered.mid"
    write_midi([Note(i / 2, i / 2 + 0.5, 60 + i, 80, i % 4) for i in range(8)], path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(1000):
        changed = bytearray(content)
        changed[rng.integers(len(content))] = rng.integers(256)
        with contextlib.suppress(MidiError):
            assert len(read_performance(bytes(changed)).notes)
