import contextlib

import mido
import numpy as np
import pytest

from jaxaudio.data.midi import MidiError, Note, read_midi, write_midi


def _save(path, *tracks, ticks_per_beat=100, kind=1):
    file = mido.MidiFile(type=kind, ticks_per_beat=ticks_per_beat)
    file.tracks += [mido.MidiTrack(track) for track in tracks]
    file.save(path)
    return path


def _on(pitch, at=0, velocity=64, channel=0):
    return mido.Message("note_on", note=pitch, velocity=velocity, time=at, channel=channel)


def test_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 5000, 60) / 1000
    notes = [
        Note(start, start + length / 1000, int(pitch), int(velocity), int(voice))
        for start, length, pitch, velocity, voice in zip(
            starts.tolist(),
            rng.integers(10, 900, 60).tolist(),
            # Different pitches: notes of one pitch that overlap in a voice are another test.
            rng.permutation(np.arange(30, 90)),
            rng.integers(1, 128, 60),
            rng.permutation(np.arange(60) % 12),  # passes the channel of the drums
            strict=True,
        )
    ]
    write_midi(notes, tmp_path / "notes.mid", tempo=90.0)
    read = read_midi(tmp_path / "notes.mid")
    expected = sorted(notes, key=lambda n: (n.start_s, n.voice, n.pitch, n.end_s))
    assert sorted(n[2:] for n in read) == sorted(n[2:] for n in expected)
    by_pitch = {note.pitch: note for note in read}
    for note in expected:  # half a tick is 0.7 ms
        assert by_pitch[note.pitch][:2] == pytest.approx(note[:2], abs=1e-3)
    assert list(read) == sorted(read, key=lambda n: (n.start_s, n.voice, n.pitch, n.end_s))
    channels = {m.channel for track in mido.MidiFile(tmp_path / "notes.mid").tracks for m in track if not m.is_meta}
    assert channels == set(range(13)) - {9}


def test_tempo_changes_run_over_all_tracks(tmp_path):
    """120 quarters per minute for one beat, then 60 for one beat, then 240."""
    tempo = [
        mido.MetaMessage("set_tempo", tempo=1_000_000, time=100),
        mido.MetaMessage("set_tempo", tempo=250_000, time=100),
    ]
    path = _save(
        tmp_path / "tempo.mid", tempo, [_on(60, 50), _on(60, 100, velocity=0), _on(62), _on(62, 250, velocity=0)]
    )
    assert read_midi(path) == (Note(0.25, 1.0, 60, 64, 0), Note(1.0, 2.0, 62, 64, 0))
    assert read_midi(path, tempo=60.0) == (Note(0.5, 1.5, 60, 64, 0), Note(1.5, 4.0, 62, 64, 0))
    messages = list(mido.MidiFile(path))  # mido's own playback clock, in seconds between messages
    clock = np.cumsum([message.time for message in messages])
    np.testing.assert_allclose(clock[[not message.is_meta for message in messages]], [0.25, 1.0, 1.0, 2.0])


def test_equal_pitches_that_overlap_end_first_in_first_out(tmp_path):
    track = [_on(60, velocity=10), _on(60, 100, velocity=20), _on(60, 100, velocity=0)]
    track.append(mido.Message("note_off", note=60, time=200))
    assert read_midi(_save(tmp_path / "fifo.mid", track)) == (Note(0.0, 1.0, 60, 10, 0), Note(0.5, 2.0, 60, 20, 0))


def test_unreleased_notes_end_with_the_track_and_lone_releases_are_no_notes(tmp_path):
    track = [_on(50, velocity=0), _on(60), mido.MetaMessage("end_of_track", time=300)]
    assert read_midi(_save(tmp_path / "open.mid", track)) == (Note(0.0, 1.5, 60, 64, 0),)


def test_voices_are_tracks_and_channels(tmp_path):
    two = [_on(70, channel=3), _on(71, channel=1), _on(70, 100, 0, channel=3), _on(71, 0, 0, channel=1)]
    one = [_on(50, channel=1), _on(50, 100, 0, channel=1)]
    notes = read_midi(_save(tmp_path / "voices.mid", [], two, one))
    assert {note.pitch: note.voice for note in notes} == {71: 0, 70: 1, 50: 2}


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "cut.mid"
    write_midi([Note(0.0, 1.0, 60 + voice, 80, voice) for voice in range(4)], path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(MidiError, match=r"cut\.mid is truncated"):
        read_midi(path)


@pytest.mark.parametrize("content", [b"", b"RIFF and so on, no MIDI at all", b"MThd\x00\x00\x00\x06\x00\x01"])
def test_broken_file(tmp_path, content):
    path = tmp_path / "broken.mid"
    path.write_bytes(content)
    with pytest.raises(MidiError, match=r"broken\.mid is (truncated|not a readable MIDI file)"):
        read_midi(path)


def test_altered_bytes_never_escape_as_another_error(tmp_path):
    path = tmp_path / "altered.mid"
    write_midi([Note(i / 2, i / 2 + 0.5, 60 + i, 80, i % 4) for i in range(8)], path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        changed[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(bytes(changed))
        with contextlib.suppress(MidiError):
            assert read_midi(path)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no MIDI file .*absent\.mid"):
        read_midi(tmp_path / "absent.mid")
    with pytest.raises(MidiError, match=r"empty\.mid is a MIDI file without notes \(2 tracks\)"):
        read_midi(_save(tmp_path / "empty.mid", [], [_on(60, velocity=0)]))
    with pytest.raises(MidiError, match=r"two\.mid is a type 2"):
        read_midi(_save(tmp_path / "two.mid", [_on(60), _on(60, 9, 0)], kind=2))
    with pytest.raises(MidiError, match=r"smpte\.mid counts time in SMPTE frames \(-6360\)"):
        read_midi(_save(tmp_path / "smpte.mid", [_on(60), _on(60, 9, 0)], ticks_per_beat=-6360))


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (Note(0.0, 1.0, 128, 80, 0), r"pitch=128.* pitch in 0\.\.127"),
        (Note(0.0, 1.0, 60, 0, 0), r"velocity=0.* velocity in 1\.\.127"),
        (Note(1.0, 1.0, 60, 80, 0), "needs 0 <= start_s < end_s"),
        (Note(0.0, 1.0, 60, 80, 15), r"voice=15.* voice in 0\.\.14"),
    ],
)
def test_notes_that_midi_cannot_hold(tmp_path, note, message):
    with pytest.raises(MidiError, match=message):
        write_midi([note], tmp_path / "note.mid")
    with pytest.raises(MidiError, match="no notes to write"):
        write_midi([], tmp_path / "note.mid")
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kept.mid"
    write_midi([Note(0.0, 1.0, 60, 80, 0)], path)
    before = path.read_bytes()

    def full(self, filename):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mido.MidiFile, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_midi([Note(0.0, 1.0, 61, 80, 0)], path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.mid"]
