"""Melodies: inference against all state sequences, by hand, and note-seq's; tokens by hand and note-seq's parts."""

import itertools
import math
import os
import pathlib
import zipfile

import numpy as np
import pytest

from experiments.benchmarks import note_seq_peer
from jaxaudio.data.events import NoteArray, apply_sustain, array_to_notes, notes_to_array
from jaxaudio.data.melody import MELODY, MelodyVocabulary, decode_melody, encode_melody, infer_melody
from jaxaudio.data.midi import Note
from jaxaudio.data.midi_performance import read_performance

ASAP = pathlib.Path(os.environ.get("JAXAUDIO_DATA", "")) / "asap" / "performances.zip"


def _notes(*rows) -> NoteArray:
    return notes_to_array([Note(*row, 80, 0) for row in rows])


def _rows(notes: NoteArray) -> list[tuple]:
    assert set(notes.velocity.tolist()) <= {127}
    return [note[:3] for note in array_to_notes(notes)]


def test_a_higher_note_is_the_melody_if_it_lasts():
    # Over the held 60 a 72 from 0.5 s on. Following 60 costs ln 1e-15 = -34.5 for each second of the 72; going to 72
    # costs ln(0.9 w(12) / sum of w) = -5.6 with w(d) = 1 / (1 + d^2 / 4), and -34.5 for each second after its end: it
    # cannot go back to 60, which is struck no more, nor rest while 60 sounds.
    assert _rows(infer_melody(_notes((0.0, 2.0, 60), (0.5, 1.9, 72)))) == [(0.0, 0.5, 60), (0.5, 2.0, 72)]
    assert _rows(infer_melody(_notes((0.0, 2.0, 60), (0.5, 1.0, 72)))) == [(0.0, 2.0, 60)]


def test_a_gap_is_a_rest_if_it_lasts():
    # A rest costs ln 0.1 and then ln 1/128, -7.2; sustaining through the gap -34.5 a second and -2.5 for the interval.
    assert _rows(infer_melody(_notes((0.0, 1.0, 60), (1.5, 2.0, 62)))) == [(0.0, 1.0, 60), (1.5, 2.0, 62)]
    assert _rows(infer_melody(_notes((0.0, 1.0, 60), (1.05, 2.0, 62)))) == [(0.0, 1.05, 60), (1.05, 2.0, 62)]


def test_silence_after_the_last_note_is_a_rest_if_it_lasts():
    notes = _notes((0.5, 1.0, 60))
    assert _rows(infer_melody(notes)) == [(0.5, 1.0, 60)]
    assert _rows(infer_melody(notes, duration_s=1.5)) == [(0.5, 1.0, 60)]
    assert _rows(infer_melody(notes, duration_s=1.05)) == [(0.5, 1.05, 60)]
    with pytest.raises(ValueError, match=r"duration_s=0\.9 .* 1\.0 s"):
        infer_melody(notes, duration_s=0.9)


def _log(prob):
    return math.log(prob) if prob > 0 else -math.inf


def _best_of_all(notes: NoteArray) -> list[tuple]:
    """The melody of the best of all state sequences: None for a rest, (pitch, whether struck) else."""
    rows = list(zip(notes.start_s.tolist(), notes.end_s.tolist(), notes.pitch.tolist(), strict=True))
    times = sorted({0.0, *(row[0] for row in rows), *(row[1] for row in rows)})
    frames = list(itertools.pairwise(times))
    states = [None, *itertools.product(sorted({row[2] for row in rows}), (True, False))]

    def frame_score(frame, state):
        begin, end = frame
        sounding = {pitch for start, stop, pitch in rows if start <= begin and stop >= end}
        if state is None:
            return 0.0 if not sounding else -math.inf
        pitch, is_struck = state
        if is_struck != any((start, p) == (begin, pitch) for start, _, p in rows):
            return -math.inf
        prob = 1e-15 if any(p > pitch for p in sounding) else 1 - 1e-15
        return (end - begin) * _log(prob * (1.0 if is_struck else 1 - 1e-15 if pitch in sounding else 1e-15))

    def step_prob(last, state):
        if state is None:
            return 1.0 if last is None else 0.1
        pitch, is_struck = state
        if not is_struck:
            return float(last is not None and last[0] == pitch)
        if last is None:
            return 1 / 128
        weights = [1 / (1 + ((p - last[0]) / 2) ** 2) for p in range(128)]
        return 0.9 * weights[pitch] / sum(weights)

    frame_scores = [{state: frame_score(frame, state) for state in states} for frame in frames]
    step_scores = {pair: _log(step_prob(*pair)) for pair in itertools.product(states, states)}

    def score(path):
        steps = zip([None, *path], path, strict=False)
        return sum(scores[s] for scores, s in zip(frame_scores, path, strict=True)) + sum(step_scores[p] for p in steps)

    best = max(itertools.product(states, repeat=len(frames)), key=score)
    melody = []
    for (begin, end), state in zip(frames, best, strict=True):
        if state and state[1]:
            melody.append((begin, end, state[0]))
        elif state:
            melody[-1] = (melody[-1][0], end, state[0])
    return melody


@pytest.mark.parametrize("seed", range(12))
def test_no_state_sequence_is_better(seed):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.choice([0.03, 0.2, 0.6], 6) * rng.uniform(0.9, 1.1, 6))
    spans = [sorted(rng.choice(6, 2, replace=False)) for _ in range(4)]
    notes = _notes(*((times[i], times[j], int(rng.choice([60, 63]))) for i, j in spans))
    assert _rows(infer_melody(notes)) == _best_of_all(notes)


def test_a_long_single_voice_is_its_own_melody():
    rng = np.random.default_rng(0)
    pitch = rng.integers(21, 109, 5001)  # with the gaps 10 002 frames, more than note-seq takes
    notes = _notes(*((0.5 + 1.5 * i, 1.5 + 1.5 * i, p) for i, p in enumerate(pitch.tolist())))
    assert _rows(infer_melody(notes)) == [note[:3] for note in array_to_notes(notes)]


def test_no_notes_have_no_melody():
    assert len(infer_melody(_notes())) == 0
    assert encode_melody(_notes(), 0.3).tolist() == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", ["Bach/Prelude/bwv_858/Zhang01M.mid", "Chopin/Sonata_3/2nd/GarritsonL09.mid"])
def test_real_performances_have_note_seqs_melody_and_tokens(name):
    if not ASAP.is_file():
        pytest.skip("no ASAP performances: set JAXAUDIO_DATA to a folder with asap/performances.zip")
    try:
        inference, music, sequences, encoder = note_seq_peer.load(
            "melody_inference", "protobuf.music_pb2", "sequences_lib", "melody_encoder_decoder"
        )
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(ASAP) as file:
        notes = apply_sustain(read_performance(file.read(name)))

    sequence = music.NoteSequence(total_time=notes.end_s.max())
    for start_s, end_s, pitch, velocity, _ in array_to_notes(notes):
        sequence.notes.add(start_time=start_s, end_time=end_s, pitch=pitch, velocity=velocity)
    instrument = inference.infer_melody_for_sequence(sequence)
    for note in [note for note in sequence.notes if note.instrument != instrument]:
        sequence.notes.remove(note)
    melody = infer_melody(notes)
    assert _rows(melody) == [(note.start_time, note.end_time, note.pitch) for note in sequence.notes]

    quantized = sequences.quantize_note_sequence_absolute(sequence, 10)
    events = [-2] * quantized.total_quantized_steps  # -2: nothing happens, -1: the note ends
    for note in quantized.notes:
        events[note.quantized_start_step] = note.pitch
        if note.quantized_end_step < len(events):
            events[note.quantized_end_step] = -1
    one_hot = encoder.MelodyOneHotEncoding(21, 109)
    tokens = encode_melody(melody, float(notes.end_s.max()))
    assert tokens.tolist() == [2 + one_hot.encode_event(event) for event in events]
    assert one_hot.num_classes + 2 == MELODY.size


# The second note begins at 0.26 s, in step 3; the third, of 20 ms, in step 8, lasts one; the fourth follows it at once.
TUNE = _notes((0.0, 0.2, 60), (0.26, 0.5, 21), (0.8, 0.82, 108), (0.9, 1.2, 64))
TUNE_TOKENS = [43, 2, 3, 4, 2, 3, 2, 2, 91, 47, 2, 2]


def test_tokens_by_hand():
    assert (MELODY.size, MELODY.note_on) == (92, range(4, 92))
    tokens = encode_melody(TUNE, 1.0)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == TUNE_TOKENS  # the last note ends with the last step
    assert encode_melody(TUNE, 1.44).tolist() == [*TUNE_TOKENS, 3, 2]
    assert encode_melody(TUNE, 1.45).tolist() == [*TUNE_TOKENS, 3, 2, 2]


def test_a_note_overwritten_in_its_first_step_still_ends():
    grace = _notes((0.0, 0.03, 60), (0.03, 0.4, 62))
    assert encode_melody(grace, 0.4).tolist() == [45, 3, 2, 2]


def test_notes_of_tokens():
    expected = [(0.0, 0.2, 60), (0.3, 0.5, 21), (0.8, 0.9, 108), (0.9, 1.2, 64)]
    assert _rows(decode_melody(np.array(TUNE_TOKENS))) == expected
    assert _rows(decode_melody(np.array([2, 3, *TUNE_TOKENS, 3]))) == [
        (pytest.approx(start + 0.2), pytest.approx(end + 0.2), pitch) for start, end, pitch in expected
    ]
    for end in (0, 1):  # padding and end
        assert _rows(decode_melody(np.array([*TUNE_TOKENS, end, 50, 2]))) == expected
    assert len(decode_melody(np.array([], np.int32))) == 0


def test_tokens_of_any_melody_on_the_grid_give_it_back():
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.integers(1, 9, 400)) / 10
    notes = _notes(*((times[i], times[i + 1], int(rng.integers(30, 50))) for i in range(0, 398, 2)))
    low = MelodyVocabulary(min_pitch=30, max_pitch=49)
    assert low.size == 24
    back = decode_melody(encode_melody(notes, float(times[-1]), low), low)
    assert _rows(back) == [note[:3] for note in array_to_notes(notes)]


def test_errors_have_the_value():
    with pytest.raises(ValueError, match=r"two at 0\.500 s"):
        encode_melody(_notes((0.0, 0.6, 60), (0.5, 1.0, 62)), 1.0)
    with pytest.raises(ValueError, match=r"pitch 20 .* 21\.\.108"):
        encode_melody(_notes((0.0, 0.6, 20)), 1.0)
    for token in (-1, 92):
        with pytest.raises(ValueError, match=rf"melody id {token} .* 0\.\.91"):
            decode_melody(np.array([4, token]))
    with pytest.raises(ValueError, match=r"60\.\.50"):
        MelodyVocabulary(min_pitch=60, max_pitch=50)
    with pytest.raises(ValueError, match="got 0"):
        MelodyVocabulary(steps_per_second=0)
