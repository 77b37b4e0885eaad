"""`jaxaudio music`: files that are whole and end where they should, and one line for each thing that fails."""

import collections

import jax
import jax.numpy as jnp
import mido
import numpy as np
import pytest
import soundfile
from flax import linen as nn

from jaxaudio import cli
from jaxaudio.convert.music import write_music_model
from jaxaudio.data.events import END_OF_SEQUENCE, MAGENTA
from jaxaudio.data.midi import Note, read_midi, write_midi
from jaxaudio.models.music_transformer import (
    AccompanimentConfig,
    AccompanimentTransformer,
    MusicTransformer,
    MusicTransformerConfig,
)
from jaxaudio.nn.transformer_config import TransformerConfig

SIZES = {"num_layers": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8, "max_distance": 8}
CONTEXT = 16
PRIME = [Note(0.0, 0.5, 60, 77, 0), Note(0.5, 0.9, 64, 97, 0), Note(0.5, 1.4, 67, 97, 0)]  # 12 events


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny random models, by kind."""
    folder, tokens = tmp_path_factory.mktemp("models"), jnp.zeros((1, 2), jnp.int32)
    decoder = TransformerConfig(**SIZES, positions="relative")
    melodic = TransformerConfig(**SIZES, positions="relative", cross_attention=True)
    piano = MusicTransformerConfig(MAGENTA.size, decoder)
    accompaniment = AccompanimentConfig(
        92, TransformerConfig(**SIZES, attention="full"), MusicTransformerConfig(MAGENTA.size, melodic)
    )
    for name, config, model, inputs in (
        ("piano", piano, MusicTransformer(piano), [tokens]),
        ("accompaniment", accompaniment, AccompanimentTransformer(accompaniment), [tokens, tokens]),
    ):
        rng = np.random.default_rng(0)
        abstract = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
        params = jax.tree.map(lambda leaf, rng=rng: 0.3 * rng.standard_normal(leaf.shape, np.float32), abstract)
        last = params.get("decoder", params)
        last["logits"]["kernel"][0] = np.where(np.arange(MAGENTA.size) == END_OF_SEQUENCE, -9, 0)  # it never ends
        last["transformer"]["norm"]["layer"]["scale"][0], last["transformer"]["norm"]["layer"]["bias"][0] = 0, 9
        write_music_model(folder / name, config, params, MAGENTA, context=CONTEXT)
    return folder


@pytest.fixture
def prime(tmp_path):
    write_midi(PRIME, tmp_path / "prime.mid")
    return tmp_path / "prime.mid"


def run(models, *arguments, model="piano"):
    line = ["music", *map(str, arguments), "--model", str(models / model), "--compilation_cache", "None"]
    return cli.main(line)


def spans(path):
    return [(round(note.start_s, 2), round(note.end_s, 2), note.pitch, note.velocity) for note in read_midi(path)]


def test_a_prime_is_continued_for_so_many_seconds(models, prime, tmp_path, capsys):
    out = tmp_path / "out.mid"
    assert run(models, "continue", prime, "-o", out, "--seconds", 6, "--seed", 3) == 0
    assert "out.mid: " in (printed := capsys.readouterr().out)
    assert "6.00 s and " in printed
    assert set(spans(out)) >= {note[:4] for note in PRIME}
    sounding, seconds = collections.Counter(), 0.0
    for message in mido.MidiFile(out):
        seconds += message.time
        if message.type in ("note_on", "note_off"):
            sounding[message.note] += 1 if message.type == "note_on" and message.velocity else -1
    assert not +sounding
    assert seconds == pytest.approx(1.4 + 6.0, abs=2e-3)

    content = out.read_bytes()
    assert run(models, "continue", prime, "-o", out, "--seconds", 6, "--seed", 3) == 1
    assert "out.mid exists; choose another name, or add --overwrite" in capsys.readouterr().err
    assert run(models, "continue", prime, "-o", out, "--seconds", 6, "--seed", 3, "--overwrite") == 0
    assert out.read_bytes() == content
    assert run(models, "continue", prime, "-o", out, "--seconds", 6, "--seed", 4, "--overwrite") == 0
    assert out.read_bytes() != content


def test_sound_has_the_length_and_the_loudness_of_the_notes(models, prime, tmp_path):
    for name in ("a.mid", "a.wav"):
        assert run(models, "continue", prime, "-o", tmp_path / name, "--seconds", 2, "--seed", 3) == 0
    waveform, rate = soundfile.read(tmp_path / "a.wav")
    assert len(waveform) / rate == pytest.approx(
        max(end for _, end, _, _ in spans(tmp_path / "a.mid")) + 0.12, abs=0.01
    )
    soft, loud = (np.abs(waveform[int(start * rate) : int((start + 0.4) * rate)]).max() for start in (0.05, 0.5))
    assert 0.1 < soft < loud


def test_samples_are_numbered_and_differ(models, tmp_path, capsys):
    assert run(models, "sample", "-o", tmp_path / "a.mid", "--seconds", 3, "--count", 2) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.mid", "a-2.mid"]
    assert spans(tmp_path / "a-1.mid") != spans(tmp_path / "a-2.mid")
    assert capsys.readouterr().out.count("3.00 s and ") == 2


def test_a_melody_is_accompanied_as_long_as_it_is(models, tmp_path, capsys):
    write_midi([Note(2.0 * i, 2.0 * i + 1.9, 60 + i, 80, 0) for i in range(4)], tmp_path / "melody.mid")
    assert run(models, "accompany", tmp_path / "melody.mid", "-o", tmp_path / "out.mid", model="accompaniment") == 0
    assert "7.90 s and " in capsys.readouterr().out
    assert max(end for _, end, _, _ in spans(tmp_path / "out.mid")) <= 7.9
    command = ["accompany", tmp_path / "melody.mid", "-o", tmp_path / "none.mid", "--seconds", 0.01]
    assert run(models, *command, model="accompaniment") == 1
    assert "none.mid: not written, for the 0.01 s have no note; try another --seed" in capsys.readouterr().err


def test_a_longer_prime_is_refused_or_cut(models, tmp_path, capsys):
    write_midi([Note(0.5 * i, 0.5 * i + 0.4, 60 + i, 77, 0) for i in range(8)], tmp_path / "long.mid")
    command = ["continue", tmp_path / "long.mid", "-o", tmp_path / "out.mid", "--seconds", 1]
    assert run(models, *command) == 1
    assert (
        "long.mid has 32 events, and the model sees 16 at once; its first 1.90 s would fit: --prime_seconds 1.90"
        in (capsys.readouterr().err)
    )
    assert run(models, *command, "--prime_seconds", "1.90") == 0
    assert spans(tmp_path / "out.mid")[:3] == [(0.5 * i, 0.5 * i + 0.4, 60 + i, 77) for i in range(3)]


def test_what_the_model_does_not_know_is_said(models, tmp_path, capsys):
    write_midi([*PRIME, Note(0.1, 0.2, 12, 80, 0)], tmp_path / "low.mid")
    assert run(models, "continue", tmp_path / "low.mid", "-o", tmp_path / "out.mid", "--seconds", 1) == 0
    assert "low.mid: left out 1 of 4 notes, outside the model's pitches 21 to 108" in capsys.readouterr().err
    write_midi([Note(0.1, 0.2, 12, 80, 0)], tmp_path / "low.mid")
    assert run(models, "continue", tmp_path / "low.mid", "-o", tmp_path / "new.mid") == 1
    assert "low.mid: none of its 1 notes has a pitch that the model knows" in capsys.readouterr().err


def test_errors_are_one_line_with_the_name(models, prime, tmp_path, capsys):
    mido.MidiFile(tracks=[mido.MidiTrack([mido.MetaMessage("set_tempo")])]).save(tmp_path / "empty.mid")
    (tmp_path / "broken.mid").write_bytes(prime.read_bytes()[:50])
    (tmp_path / "text.mid").write_text("no music")
    out = ["-o", tmp_path / "out.mid"]
    for arguments, model, part in [
        (["continue", tmp_path / "empty.mid", *out], "piano", "empty.mid is a MIDI file without complete notes"),
        (["continue", tmp_path / "broken.mid", *out], "piano", "broken.mid"),
        (["accompany", tmp_path / "text.mid", *out], "accompaniment", "text.mid"),
        (["continue", tmp_path / "none.mid", *out], "piano", "none.mid"),
        (["continue", prime, *out], "accompaniment", "accompaniment holds a model that accompanies melodies"),
        (["accompany", prime, *out], "piano", "piano holds a model that accompanies no melodies"),
        (["sample", *out], "nowhere", "there is no model in"),
        (["sample", *out], "..", "config.json cannot be read"),
        (["sample", "-o", tmp_path / "out.mp3"], "piano", "out.mp3: expected a name that ends in .mid, .midi, .wav"),
        (["sample", *out, "--seconds", 0], "piano", "--seconds 0.0: expected more than 0 s"),
        (["sample", *out, "--count", 0], "piano", "--count 0: expected at least 1"),
        (["sample", *out, "--temperature", -1], "piano", "temperature must be at least 0, got -1.0"),
        (["continue", prime, *out, "--prime_seconds", 0], "piano", "prime.mid begins at 0.00 s"),
    ]:
        assert run(models, *arguments, model=model) == 1, arguments
        error = capsys.readouterr().err
        assert error.startswith("jaxaudio music: ")
        assert error.count("\n") == 1
        assert part in error
    assert not (tmp_path / "out.mid").exists()
