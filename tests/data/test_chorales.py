import mido
import numpy as np
import pytest

from jaxaudio.data import chorales
from jaxaudio.data.chorales import REST, ChoraleError
from jaxaudio.data.midi import Note, write_midi


def _random_grid(seed=0, num_steps=40):
    """Held notes, repeated pitches, voice crossings and rests, sounding in the last step."""
    rng = np.random.default_rng(seed)
    grid = np.repeat(rng.integers(36, 82, (num_steps // 4, 4)), 4, axis=0)
    grid[rng.random(grid.shape) < 0.2] = REST
    grid[-1] = [81, 60, 48, 36]
    return grid.astype(np.int32)


def test_ids_are_those_of_the_interface():
    grid = np.array([[81, 60, REST, 36], [74, 70, 65, 58]])
    np.testing.assert_array_equal(chorales.encode_grid(grid), [47, 26, 1, 2, 40, 36, 31, 24])
    assert chorales.encode_grid(grid).dtype == np.int32
    assert (chorales.VOCAB_SIZE, chorales.PAD_TOKEN, chorales.REST_TOKEN) == (48, 0, 1)


def test_tokens_round_trip():
    grid = _random_grid()
    np.testing.assert_array_equal(chorales.decode_tokens(chorales.encode_grid(grid)), grid)
    every_symbol = np.r_[np.arange(1, 48), 1]
    np.testing.assert_array_equal(chorales.encode_grid(chorales.decode_tokens(every_symbol)), every_symbol)


def test_grid_round_trips_through_midi(tmp_path):
    grid = _random_grid()
    for tempo in (80.0, 93.0):
        chorales.write_chorale_midi(grid, tmp_path / "chorale.mid", tempo=tempo)
        np.testing.assert_array_equal(chorales.read_chorale_midi(tmp_path / "chorale.mid"), grid)


def test_equal_pitches_join_into_one_note():
    grid = np.array([[60, 52, 48, 40], [60, 52, REST, 40], [62, 52, 48, 41], [60, 52, 48, 41]])
    notes = chorales.grid_to_notes(grid, tempo=60.0)
    assert notes == (
        Note(0.0, 0.5, 60, 80, 0),
        Note(0.0, 1.0, 52, 80, 1),
        Note(0.0, 0.25, 48, 80, 2),
        Note(0.0, 0.5, 40, 80, 3),
        Note(0.5, 0.75, 62, 80, 0),
        Note(0.5, 1.0, 48, 80, 2),
        Note(0.5, 1.0, 41, 80, 3),
        Note(0.75, 1.0, 60, 80, 0),
    )


def test_reads_foreign_midi_with_tempo_changes_and_channels_in_one_track(tmp_path):
    """A type 0 file; a ritardando in it must not move notes on the grid."""
    track = mido.MidiTrack(
        [mido.Message("note_on", note=p, velocity=64, channel=c) for c, p in enumerate((72, 64, 55, 48))]
    )
    track.append(mido.MetaMessage("set_tempo", tempo=900_000, time=48))
    track += [
        mido.Message("note_on", note=p, velocity=0, channel=c, time=48 * (c == 0))
        for c, p in enumerate((72, 64, 55, 48))
    ]
    file = mido.MidiFile(type=0, ticks_per_beat=96)
    file.tracks.append(track)
    file.save(tmp_path / "foreign.mid")
    np.testing.assert_array_equal(chorales.read_chorale_midi(tmp_path / "foreign.mid"), [[72, 64, 55, 48]] * 4)


@pytest.mark.parametrize(
    ("num_voices", "message"), [(3, "fewer voices than 4: found 3"), (5, "more voices than 4: found 5")]
)
def test_wrong_number_of_voices(tmp_path, num_voices, message):
    write_midi([Note(0.0, 1.0, 60, 80, voice) for voice in range(num_voices)], tmp_path / "voices.mid")
    with pytest.raises(ChoraleError, match=rf"voices\.mid: .*{message}"):
        chorales.read_chorale_midi(tmp_path / "voices.mid")


def test_notes_that_are_no_chorale():
    bass = [Note(0.0, 1.0, 50, 80, voice) for voice in (1, 2, 3)]
    with pytest.raises(ChoraleError, match=r"soprano sounds pitches 60 and 62 at once at step 3"):
        chorales.notes_to_grid([Note(0.0, 1.0, 60, 80, 0), Note(0.75, 1.0, 62, 80, 0), *bass], tempo=60.0)
    with pytest.raises(ChoraleError, match=r"pitch 60 at 1\.000 s lasts 0\.050 s"):
        chorales.notes_to_grid([Note(1.0, 1.05, 60, 80, 0), *bass], tempo=60.0)
    with pytest.raises(ChoraleError, match=r"Pitch 90 of the soprano at step 0"):
        chorales.notes_to_grid([Note(0.0, 1.0, 90, 80, 0), *bass], tempo=60.0)


@pytest.mark.parametrize("pitch", [35, 82, -2])
def test_pitch_outside_the_vocabulary(pitch):
    grid = _random_grid()
    grid[7, 2] = pitch
    with pytest.raises(ChoraleError, match=rf"Pitch {pitch} of the tenor at step 7 lies outside 36\.\.81"):
        chorales.encode_grid(grid)


def test_grid_of_wrong_shape_or_dtype():
    with pytest.raises(ChoraleError, match=r"shape \(5, 3\)"):
        chorales.encode_grid(np.zeros((5, 3), int))
    with pytest.raises(ChoraleError, match="float64"):
        chorales.encode_grid(np.full((5, 4), 60.0))


@pytest.mark.parametrize("token", [0, 48, -1])
def test_token_that_is_no_symbol(token):
    with pytest.raises(ChoraleError, match=rf"Token {token} at position 5"):
        chorales.decode_tokens([1, 2, 3, 4, 5, token, 7, 8])


def test_tokens_that_are_no_whole_steps():
    with pytest.raises(ChoraleError, match="7 tokens are no whole number of steps"):
        chorales.decode_tokens([1] * 7)
    with pytest.raises(ChoraleError, match=r"shape \(1, 4\)"):
        chorales.decode_tokens(np.ones((1, 4), int))
