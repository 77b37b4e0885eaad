import dataclasses

import numpy as np
import pytest

from jaxaudio.data.events import (
    MAGENTA,
    PAPER,
    EventVocabulary,
    NoteArray,
    Performance,
    apply_sustain,
    array_to_notes,
    decode_events,
    encode_events,
    notes_to_array,
    pitch_range,
    stretch,
    transpose_events,
)
from jaxaudio.data.midi import Note, write_midi
from jaxaudio.data.midi_performance import read_performance

# Fig. 7 of the paper: C E G one after the other, all held by the pedal to 2 s, then F.
ARPEGGIO = [Note(0.0, 2.0, 60, 80, 0), Note(0.5, 2.0, 64, 80, 0), Note(1.0, 2.0, 67, 80, 0), Note(3.0, 3.5, 65, 100, 0)]
ARPEGGIO_PAPER = [375, 60, 305, 64, 305, 67, 355, 188, 192, 195, 355, 380, 65, 305, 193]
ARPEGGIO_MAGENTA = [297, 41, 227, 45, 227, 48, 277, 129, 133, 136, 277, 302, 46, 227, 134]


def _performance(notes, pedals=(), part=None):
    array = notes_to_array(notes)
    pedals = np.array(pedals, np.float64).reshape(-1, 3)
    return Performance(
        array,
        np.zeros(len(array), np.int32) if part is None else part,
        pedals[:, 0],
        pedals[:, 1].astype(bool),
        pedals[:, 2].astype(np.int32),
    )


def _random_notes(rng, num_notes, *, grid, num_pitches=6):
    """Notes on a coarse grid, so that many times and pitches are equal."""
    start = rng.integers(0, 40, num_notes)
    end = start + rng.integers(1, 15, num_notes)
    pitch, velocity = rng.integers(60, 60 + num_pitches, num_notes), rng.integers(1, 128, num_notes)
    return [
        Note(s * grid, e * grid, p, v, 0)
        for s, e, p, v in zip(start.tolist(), end.tolist(), pitch.tolist(), velocity.tolist(), strict=True)
    ]


def test_sizes_and_ranges():
    assert (PAPER.size, MAGENTA.size) == (388, 310)
    assert [r.start for r in (PAPER.note_on, PAPER.note_off, PAPER.time_shift, PAPER.velocity)] == [0, 128, 256, 356]
    assert [r.start for r in (MAGENTA.note_on, MAGENTA.note_off, MAGENTA.time_shift, MAGENTA.velocity)] == [
        2,
        90,
        178,
        278,
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_pitch": 60, "max_pitch": 59}, r"Pitches 60\.\.59"),
        ({"max_pitch": 128}, r"21\.\.128 must be a range within 0\.\.127"),
        ({"num_velocity_bins": 0}, r"1\.\.127, got 0"),
        ({"max_shift_steps": 0}, "at least 1, got 0"),
        ({"num_reserved": 3}, "got 3"),
    ],
)
def test_fields_that_make_no_vocabulary(fields, message):
    with pytest.raises(ValueError, match=message):
        EventVocabulary(**fields)


@pytest.mark.parametrize(("vocabulary", "expected"), [(PAPER, ARPEGGIO_PAPER), (MAGENTA, ARPEGGIO_MAGENTA)])
def test_worked_example_of_the_paper(vocabulary, expected):
    played = [note._replace(end_s=note.start_s + 0.4) for note in ARPEGGIO[:3]] + ARPEGGIO[3:]
    sustained = apply_sustain(_performance(played, [(0.0, True, 0), (2.0, False, 0)]))
    assert array_to_notes(sustained) == tuple(ARPEGGIO)
    tokens = encode_events(sustained, vocabulary)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == expected
    softest = [77, 77, 77, 97]  # of the bins of 80 and 100
    assert decode_events(tokens, vocabulary) == tuple(
        note._replace(velocity=velocity)
        for note, velocity in zip(sorted(ARPEGGIO, key=lambda n: n.start_s), softest, strict=True)
    )


def test_long_shifts_and_velocity_bins():
    """Gaps of exactly 100 and 200 steps, of 201, and of none; 5 is the first velocity of bin 2, 127 of bin 32."""
    notes = [
        Note(1.0, 3.0, 60, 1, 0),
        Note(5.01, 5.02, 61, 4, 0),
        Note(5.02, 5.021, 62, 5, 0),
        Note(5.02, 5.03, 63, 127, 0),
    ]
    shift, velocity = PAPER.time_shift.start - 1, PAPER.velocity.start - 1
    expected = [shift + 100, velocity + 1, 60, shift + 100, shift + 100, 188]
    expected += [shift + 100, shift + 100, shift + 1, 61, shift + 1, 189, velocity + 2, 62, velocity + 32, 63]
    expected += [shift + 1, 190, 191]
    assert encode_events(notes_to_array(notes), PAPER).tolist() == expected
    assert encode_events(notes_to_array([]), PAPER).tolist() == []


def _slow_events(notes, vocabulary):
    """The rules read off one by one."""
    notes = sorted(notes, key=lambda n: (n.start_s, n.pitch))
    events = []
    for index, note in enumerate(notes):
        start, end = int(note.start_s * 100 + 0.5), int(note.end_s * 100 + 0.5)
        events += [(start, index, 0), (end + (start == end), index, 1)]
    tokens, now, last_bin = [], 0, 0
    for step, index, is_off in sorted(events):
        while step > now:
            jump = min(step - now, vocabulary.max_shift_steps)
            tokens.append(vocabulary.time_shift[jump - 1])
            now += jump
        velocity_bin = (notes[index].velocity - 1) // vocabulary.velocity_bin_size + 1
        if not is_off and velocity_bin != last_bin:
            tokens.append(vocabulary.velocity[velocity_bin - 1])
            last_bin = velocity_bin
        tokens.append(
            (vocabulary.note_off if is_off else vocabulary.note_on)[notes[index].pitch - vocabulary.min_pitch]
        )
    return tokens


@pytest.mark.parametrize("vocabulary", [PAPER, MAGENTA, EventVocabulary(40, 90, 10, 7, 0)])
def test_encoding_equals_a_slow_loop(vocabulary):
    rng = np.random.default_rng(0)
    for grid in (0.0051, 0.01, 0.3) * 3:
        notes = _random_notes(rng, 50, grid=grid)
        assert encode_events(notes_to_array(notes), vocabulary).tolist() == _slow_events(notes, vocabulary)


def _slow_sustain(notes, pedals):
    """One part's events in time: pedal down, pedal up, key down, key up. Ends by position, None where it vanishes."""
    events = [(time, 1 - down, down) for time, down, _ in pedals]
    for index, note in enumerate(notes):
        events += [(note.start_s, 2, index), (note.end_s, 3, index)]
    ends, active, is_down, time = [note.end_s for note in notes], [], False, 0.0
    for time, kind, index in sorted(events, key=lambda event: event[:2]):
        if kind < 2:
            is_down = kind == 0
            if kind == 1:
                for held in [i for i in active if ends[i] < time]:
                    ends[held] = time
                    active.remove(held)
        elif kind == 2:
            if is_down:
                for again in [i for i in active if notes[i].pitch == notes[index].pitch]:
                    ends[again] = time if notes[again].start_s < time else None
                    active.remove(again)
            active.append(index)
        elif not is_down and index in active:
            active.remove(index)
    for held in active:
        ends[held] = time
    return [note._replace(end_s=end) for note, end in zip(notes, ends, strict=True) if end is not None]


def test_sustain_equals_a_slow_loop():
    rng = np.random.default_rng(1)
    lengthened = vanished = 0
    for _ in range(100):
        notes = sorted(_random_notes(rng, 40, grid=0.25, num_pitches=3), key=lambda n: (n.start_s, n.pitch))
        pedals = [(0.25 * rng.integers(0, 50), bool(rng.integers(2)), 0) for _ in range(12)]
        expected = _slow_sustain(notes, pedals)
        assert array_to_notes(apply_sustain(_performance(notes, pedals))) == tuple(expected)
        vanished += len(notes) - len(expected)
        lengthened += sum(note.end_s > before.end_s for note, before in zip(expected, notes, strict=False))
    assert lengthened > 100
    assert vanished > 10


def test_each_part_has_its_own_pedal():
    notes = [Note(0.0, 1.0, 60, 80, 0), Note(0.0, 1.0, 62, 80, 0), Note(5.0, 6.0, 64, 80, 0)]
    parts = np.array([0, 1, 0], np.int32)
    ends = apply_sustain(_performance(notes, [(0.5, True, 1), (3.0, False, 1), (5.5, True, 0)], parts)).end_s
    assert ends.tolist() == [1.0, 3.0, 6.0]
    ends = apply_sustain(_performance(notes, [(0.5, True, 1)], parts)).end_s  # never up: to the last event
    assert ends.tolist() == [1.0, 6.0, 6.0]
    assert apply_sustain(_performance(notes)).end_s.tolist() == [1.0, 1.0, 6.0]
    elsewhere = [(0.5, True, 7), (9.0, False, 7)]  # a part without notes
    assert apply_sustain(_performance(notes, elsewhere)).end_s.tolist() == [1.0, 1.0, 6.0]
    assert len(apply_sustain(_performance([], elsewhere))) == 0


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (Note(0.0, 1.0, 20, 80, 0), r"1 of 2 notes need a pitch in 21\.\.108.*pitch=20"),
        (Note(0.0, 1.0, 109, 80, 0), "pitch=109"),
        (Note(0.0, 1.0, 60, 0, 0), r"a velocity in 1\.\.127.*velocity=0"),
        (Note(0.0, 1.0, 60, 128, 0), "velocity=128"),
        (Note(-0.5, 1.0, 60, 80, 0), r"0 <= start_s <= end_s.*start_s=-0\.5"),
        (Note(0.5, 0.25, 60, 80, 0), r"end_s=0\.25"),
        (Note(0.5, np.inf, 60, 80, 0), "end_s=inf"),
        (Note(np.nan, 1.0, 60, 80, 0), "start_s=nan"),
    ],
)
def test_notes_that_have_no_code(note, message):
    with pytest.raises(ValueError, match=message):
        encode_events(notes_to_array([Note(0.0, 1.0, 60, 80, 0), note]), MAGENTA)


def _tokens(*events, vocabulary=MAGENTA):
    """("on", pitch), ("off", pitch), ("shift", steps), ("velocity", bin)."""
    ids = {
        "on": lambda pitch: vocabulary.note_on[pitch - vocabulary.min_pitch],
        "off": lambda pitch: vocabulary.note_off[pitch - vocabulary.min_pitch],
        "shift": lambda steps: vocabulary.time_shift[steps - 1],
        "velocity": lambda velocity_bin: vocabulary.velocity[velocity_bin - 1],
    }
    return np.array([ids[kind](value) for kind, value in events], np.int32)


def test_decoding_pairs_first_in_first_out():
    tokens = _tokens(
        ("off", 60),  # nothing sounds
        ("on", 60),  # before any velocity: 100
        ("velocity", 25),
        ("shift", 100),
        ("on", 60),
        ("on", 61),
        ("off", 61),  # no length
        ("shift", 50),
        ("off", 60),
        ("shift", 25),
        ("off", 60),
        ("on", 64),  # never ended
        ("shift", 25),
        ("on", 65),  # never ended, and no length
    )
    assert decode_events(tokens, MAGENTA) == (
        Note(0.0, 1.5, 60, 100, 0),
        Note(1.0, 1.75, 60, 97, 0),
        Note(1.75, 2.0, 64, 97, 0),
    )


def test_padding_is_passed_over_and_the_end_ends():
    tokens = np.concatenate([[0], _tokens(("on", 60), ("shift", 10)), [0], _tokens(("off", 60)), [1, 2, 300]])
    assert decode_events(tokens, MAGENTA) == (Note(0.0, 0.1, 60, 100, 0),)
    assert decode_events(np.zeros(0, np.int32), MAGENTA) == ()


@pytest.mark.parametrize("bad", [-1, 310])
def test_ids_outside_of_the_vocabulary(bad):
    tokens = np.array([5, 200, bad], np.int32)
    for call in (
        lambda: decode_events(tokens, MAGENTA),
        lambda: pitch_range(tokens, MAGENTA),
        lambda: transpose_events(tokens, 1, MAGENTA),
    ):
        with pytest.raises(ValueError, match=rf"Id {bad} at position 2 .* 0\.\.309"):
            call()


@pytest.mark.parametrize("vocabulary", [PAPER, MAGENTA])
def test_round_trip_through_midi(tmp_path, vocabulary):
    """What the code keeps, MIDI keeps: 10 ms steps, bins of velocity."""
    rng = np.random.default_rng(2)
    notes = [  # each pitch once: a MIDI channel cannot tell overlapping notes of one pitch apart
        Note(s / 100, (s + d) / 100, p, v, 0)
        for s, d, p, v in zip(
            rng.integers(0, 900, 60).tolist(),
            rng.integers(1, 250, 60).tolist(),
            range(30, 90),
            rng.integers(1, 128, 60).tolist(),
            strict=True,
        )
    ]
    tokens = encode_events(notes_to_array(notes), vocabulary)
    decoded = decode_events(tokens, vocabulary)
    assert [n[:3] for n in decoded] == [n[:3] for n in sorted(notes, key=lambda n: (n.start_s, n.pitch))]
    write_midi(decoded, tmp_path / "decoded.mid")
    read = apply_sustain(read_performance(tmp_path / "decoded.mid"))
    np.testing.assert_array_equal(encode_events(read, vocabulary), tokens)


def test_transposed_events_are_the_events_of_transposed_notes():
    notes = _random_notes(np.random.default_rng(3), 80, grid=0.07)
    tokens = encode_events(notes_to_array(notes), MAGENTA)
    assert pitch_range(tokens, MAGENTA) == (60, 65)
    for semitones in (-39, -3, 0, 2, 43):
        moved = encode_events(notes_to_array([n._replace(pitch=n.pitch + semitones) for n in notes]), MAGENTA)
        transposed = transpose_events(tokens, semitones, MAGENTA)
        np.testing.assert_array_equal(transposed, moved)
        assert transposed.dtype == tokens.dtype
    for semitones in (-40, 44):
        with pytest.raises(ValueError, match=rf"60\.\.65 moved by {semitones} semitones leave .* 21\.\.108"):
            transpose_events(tokens, semitones, MAGENTA)
    no_notes = _tokens(("shift", 5), ("velocity", 3))
    assert pitch_range(no_notes, MAGENTA) is None
    np.testing.assert_array_equal(transpose_events(no_notes, 99, MAGENTA), no_notes)


def test_stretch():
    notes = notes_to_array(ARPEGGIO)
    slower = stretch(notes, 1.05)
    np.testing.assert_allclose(slower.start_s, [0.0, 0.525, 1.05, 3.15])
    np.testing.assert_allclose(slower.end_s, [2.1, 2.1, 2.1, 3.675])
    for factor in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"positive number, got {factor}"):
            stretch(notes, factor)


def test_arrays_of_notes():
    array = notes_to_array([*reversed(ARPEGGIO), Note(0.0, 1.0, 50, 9, 3)])
    assert array_to_notes(array) == (Note(0.0, 1.0, 50, 9, 0), *ARPEGGIO)
    assert array_to_notes(array[array.velocity < 80], voice=2) == (Note(0.0, 1.0, 50, 9, 2),)
    assert [getattr(array, f.name).dtype for f in dataclasses.fields(NoteArray)] == [float, float, np.int32, np.int32]
    assert len(array) == 5
