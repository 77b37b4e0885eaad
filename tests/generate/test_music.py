"""Music of any length: by seconds and by events, of exact seeds, with every note closed."""

import collections

import jax
import jax.numpy as jnp
import mido
import numpy as np
import pytest
from flax import linen as nn

from jaxaudio.data.events import END_OF_SEQUENCE, MAGENTA, decode_events
from jaxaudio.data.midi import write_midi
from jaxaudio.generate import music
from jaxaudio.models.music_transformer import (
    AccompanimentConfig,
    AccompanimentTransformer,
    MusicTransformer,
    MusicTransformerConfig,
)
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.sampling import make_sampling

SIZES = {"num_layers": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8}
STACK = TransformerConfig(**SIZES, positions="relative", max_distance=12)
MODEL = MusicTransformer(MusicTransformerConfig(MAGENTA.size, STACK))
MELODIC = AccompanimentTransformer(
    AccompanimentConfig(
        92,
        TransformerConfig(**SIZES, attention="full"),
        MusicTransformerConfig(
            MAGENTA.size,
            TransformerConfig(**SIZES, positions="relative", max_distance=12, cross_attention=True),
        ),
    )
)
CONTEXT = 24
ON, OFF, SHIFT, VELOCITY = (r.start for r in (MAGENTA.note_on, MAGENTA.note_off, MAGENTA.time_shift, MAGENTA.velocity))
PRIME = np.array([VELOCITY + 20, ON + 40, ON + 44, SHIFT + 49, OFF + 40, ON + 47, SHIFT + 9], np.int32)  # 0.6 s


def random_params(model, *inputs):
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), nn.meta.unbox(abstract))
    decoder = params.get("decoder", params)
    decoder["logits"]["kernel"][0] = np.where(np.arange(MAGENTA.size) == END_OF_SEQUENCE, -9, 0)  # it never ends
    decoder["transformer"]["norm"]["layer"]["scale"][0], decoder["transformer"]["norm"]["layer"]["bias"][0] = 0, 9
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, jnp.zeros((1, 2), jnp.int32))


def write(params, primes=(PRIME, PRIME), seed=0, **options):
    return music.continue_performance(MODEL, params, MAGENTA, primes, jax.random.key(seed), context=CONTEXT, **options)


def slow_first_seconds(tokens, seconds):
    """One step of 10 ms after the other."""
    left, kept = round(100 * seconds), []
    for token in tokens:
        if left == 0:
            break
        steps = token - SHIFT + 1 if SHIFT <= token < VELOCITY else 0
        kept.append(SHIFT + min(steps, left) - 1 if steps else token)
        left -= min(steps, left)
    return kept


def test_the_first_seconds_equal_a_loop():
    rng = np.random.default_rng(0)
    for seconds in (0.0, 0.01, 0.55, 0.6, 1.7, 60.0):
        tokens = rng.choice([ON + 3, OFF + 3, VELOCITY, SHIFT, SHIFT + 7, SHIFT + 99], 40)
        np.testing.assert_array_equal(
            music.first_seconds(tokens, MAGENTA, seconds), slow_first_seconds(tokens, seconds)
        )
        for limit in (1, 7, 39):
            fit = music.seconds_that_fit(tokens, MAGENTA, limit)
            assert len(slow_first_seconds(tokens, fit)) <= limit
            assert len(slow_first_seconds(tokens, fit + 0.01)) > limit


def test_notes_are_closed_as_often_as_they_sound():
    tokens = np.array([ON + 5, ON + 7, SHIFT, OFF + 9, ON + 5, OFF + 7, ON + 7, SHIFT, OFF + 7])
    closed = music.close_notes(tokens, MAGENTA)
    assert closed[len(tokens) :].tolist() == [OFF + 5, OFF + 5]
    assert decode_events(closed, MAGENTA) == decode_events(tokens, MAGENTA)


def sounding_at_the_end(path):
    """Pitches of a MIDI file with more ons than offs, and its last time in seconds, message by message."""
    sounding, seconds = collections.Counter(), 0.0
    for message in mido.MidiFile(path):
        seconds += message.time
        if message.type in ("note_on", "note_off"):
            sounding[message.note] += 1 if message.type == "note_on" and message.velocity else -1
    return +sounding, seconds


def test_music_goes_on_far_beyond_the_context_and_ends_where_it_is_told(params, tmp_path):
    heard = []
    pieces = write(params, seconds=9.5, on_progress=heard.append)
    for piece in pieces:
        assert piece.ended == "seconds"
        assert piece.num_new > 2 * CONTEXT
        np.testing.assert_array_equal(piece.tokens[: len(PRIME)], PRIME)
        assert piece.seconds == pytest.approx(9.5, abs=1e-9)
        write_midi(decode_events(piece.tokens, MAGENTA), tmp_path / "a.mid")
        sounding, seconds = sounding_at_the_end(tmp_path / "a.mid")
        assert not sounding
        assert seconds == pytest.approx(0.6 + 9.5, abs=2e-3)  # a tick of write_midi is 1 ms
    assert pieces[0].tokens.tolist() != pieces[1].tokens.tolist()
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(9.5)


def test_a_piece_depends_on_its_prime_its_request_and_the_key_alone(params):
    other = np.array([ON + 30, SHIFT + 20], np.int32)
    first, second = write(params, (PRIME, other), num_tokens=40)
    assert [piece.ended for piece in (first, second)] == ["tokens", "tokens"]
    assert first.num_new == 40
    swapped = write(params, (other, PRIME), num_tokens=40, requests=[1, 0])
    np.testing.assert_array_equal(swapped[1].tokens, first.tokens)
    np.testing.assert_array_equal(swapped[0].tokens, second.tokens)
    again = write(params, (PRIME, other), num_tokens=40, seed=1)
    assert again[0].tokens.tolist() != first.tokens.tolist()


def test_the_end_of_sequence_and_a_standstill_end_the_piece(params, monkeypatch):
    silent = jax.tree.map(jnp.zeros_like, params)  # all events are equally likely, so the first allowed id is drawn
    for piece in write(silent, seconds=5.0, sampling=make_sampling(2, temperature=0.0)):
        assert (piece.ended, piece.num_new, piece.seconds) == ("end", 0, 0.0)
        assert END_OF_SEQUENCE not in piece.tokens
        assert piece.tokens.tolist() == [*PRIME, OFF + 44, OFF + 47]
    monkeypatch.setattr(music, "MAX_EVENTS_PER_SECOND", 1)
    assert [(piece.ended, piece.num_new) for piece in write(params, seconds=30.0)] == [("tokens", 30)] * 2


def test_an_accompaniment_equals_rerunning_the_whole_model():
    melodies = [np.array([43, 2, 2, 3, 50], np.int32), np.array([60, 2, 3], np.int32)]
    params, num_tokens = random_params(MELODIC, *[jnp.zeros((1, 2), jnp.int32)] * 2), 10
    greedy = make_sampling(2, temperature=0.0)
    options = {"context": CONTEXT, "num_tokens": num_tokens, "sampling": greedy}
    pieces = music.accompany(MELODIC, params, MAGENTA, melodies, jax.random.key(0), **options)
    forward = jax.jit(lambda melody, tokens: MELODIC.apply({"params": params}, melody, tokens))
    for melody, piece in zip(melodies, pieces, strict=True):
        tokens = np.zeros(num_tokens + 1, np.int32)
        padded = np.zeros((1, 6), np.int32)
        padded[0, : len(melody)] = melody
        for t in range(num_tokens):
            logits = np.asarray(forward(padded, tokens[None, :num_tokens]))[0, t]
            tokens[t + 1] = 1 + np.argmax(logits[1:])
            if tokens[t + 1] == END_OF_SEQUENCE:
                break
        assert piece.tokens[: piece.num_new].tolist() == tokens[1 : 1 + piece.num_new].tolist()
        assert piece.num_new > 4
    assert pieces[0].tokens.tolist() != pieces[1].tokens.tolist()


def test_errors(params):
    long = np.tile(PRIME, 4)
    with pytest.raises(ValueError, match=r"prime 1 has 28 events, more than the 24 .* first 1\.80 s would fit"):
        write(params, (PRIME, long), seconds=1.0)
    with pytest.raises(ValueError, match=r"either seconds or num_tokens, got 1\.0 and 3"):
        write(params, seconds=1.0, num_tokens=3)
    with pytest.raises(ValueError, match="got None and None"):
        write(params)
    with pytest.raises(ValueError, match=r"more than 0 seconds, got -1\.0"):
        write(params, seconds=-1.0)
    empty = [np.zeros(0, np.int32)]
    with pytest.raises(ValueError, match="melody 0 has no tokens"):
        music.accompany(MELODIC, {}, MAGENTA, empty, jax.random.key(0), context=CONTEXT, seconds=1.0)
