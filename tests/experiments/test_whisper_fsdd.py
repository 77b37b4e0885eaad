"""The experiment on spoken digits, small: from clips to a model folder, word errors and a page; what is counted."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from experiments import digit_report, whisper_fsdd
from jaxaudio import config as configs
from jaxaudio.convert.whisper import load_whisper
from jaxaudio.data.fsdd import WORDS, Clip, SentenceConfig, Stage
from jaxaudio.data.manifests import TimedText
from jaxaudio.data.transcripts import Segment, Transcription


def make_clips(count, take):
    rng = np.random.default_rng(take)
    return tuple(
        Clip(i % 10, "ann", take, rng.uniform(-0.3, 0.3, 3200 + 160 * i).astype(np.float32)) for i in range(count)
    )


STAGES = (
    Stage(1, 4, 16, SentenceConfig(window_s=1.2, num_digits=(1, 2), overflow_rate=0.0)),
    Stage(1, 4, 32, SentenceConfig(window_s=2.0, num_digits=(1, 4))),
)


def tiny_config():
    default = whisper_fsdd.Config()
    sizes = {"embed_dim": 16, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    model = dataclasses.replace(default.model, vocab_size=401, num_frames=200, text_length=32, num_mels=32, **sizes)
    return dataclasses.replace(
        default,
        model=model,
        stages=STAGES,
        optimizer=dataclasses.replace(default.optimizer, num_steps=2, warmup_steps=1),
        log_every=1,
        mesh="data:4,fsdp:2",
        test_rounds=1,
    )


@pytest.mark.slow
def test_from_clips_to_a_model_and_a_page(monkeypatch, tmp_path, capsys):
    splits = {"train": make_clips(20, 7), "valid": make_clips(3, 5), "test": make_clips(4, 0)}
    monkeypatch.setattr(whisper_fsdd, "load_fsdd", lambda _: splits)
    config = tiny_config()
    config = dataclasses.replace(config, stages=tuple(dataclasses.replace(s, batch_size=8) for s in STAGES))
    whisper_fsdd.main(config, tmp_path)
    assert re.search(
        r"Word error rate [\d.]+ % on 4 single test digits and [\d.]+ % on 1 sentences", capsys.readouterr().out
    )
    # The config survives the folder, and the model in it is that of the config.
    assert configs.from_json(whisper_fsdd.Config, (tmp_path / "config.json").read_text()) == config
    checkpoint = load_whisper(tmp_path / "model")
    assert checkpoint.config == config.model
    assert checkpoint.tokenizer == whisper_fsdd.make_tokenizer(config)
    # Short windows train with the first rows of the table of sinusoids, of which none moves.
    positions, channels = np.arange(100)[:, None], np.exp(-np.log(1e4) / 7 * np.arange(8))[None]
    table = np.concatenate([np.sin(positions * channels), np.cos(positions * channels)], axis=1)
    np.testing.assert_allclose(checkpoint.params["encoder"]["position_embedding"], table, atol=1e-5)
    page = (tmp_path / "report.html").read_text()
    assert "reached" in page.lower()
    assert page.count("<svg") >= 2


def test_features_behind_the_audio_are_zero():
    config = tiny_config()
    waveform = np.random.default_rng(0).standard_normal((2, 32000)).astype(np.float32)
    batch = {"waveform": jax.numpy.asarray(waveform), "num_frames": jax.numpy.asarray([200, 120], jax.numpy.int32)}
    mel = np.asarray(whisper_fsdd.features(config, batch))
    assert mel.shape == (2, 200, 32)
    assert not mel[1, 120:].any()
    assert np.all(mel[0] != 0)
    assert np.all(mel[1, :120] != 0)


def heard(*segments):
    pieces = tuple(
        Segment(i, 0, start, end, f" {text}", (), 0.0, -0.1, 1.0, 0.0) for i, (start, end, text) in enumerate(segments)
    )
    return Transcription("".join(piece.text for piece in pieces), pieces, "en", 2.0, (), ())


def test_scores_by_hand(monkeypatch):
    """Three sentences: one right, one with a wrong word, one with its two digits in one segment."""
    said = [
        ((0.0, 0.5, "one"), (0.7, 1.0, "two")),
        ((0.0, 0.5, "one"), (0.7, 1.0, "two")),
        ((0.0, 0.5, "three"), (0.7, 1.0, "four")),
    ]
    results = [
        heard((0.02, 0.44, "one"), (0.7, 1.1, "two")),
        heard((0.0, 0.5, "one"), (0.7, 1.0, "ten")),
        heard((0.0, 1.0, "three four")),
    ]
    utterances = [
        digit_report.Utterance(np.zeros(10, np.float32), tuple(TimedText(*span) for span in spans)) for spans in said
    ]

    def transcribe_many(model, params, files, **options):
        assert options["language"] == "en"
        assert options["temperature"] == 0.5
        yield from [(files[i], results[i]) for i in (2, 0, 1)]  # as they are finished

    monkeypatch.setattr(digit_report, "transcribe_many", transcribe_many)
    score = digit_report.score(None, {}, None, utterances, temperature=0.5)
    assert score.wer == pytest.approx(1 / 6)
    assert score.num_words == 6
    assert score.num_timed == 1
    assert score.boundary_s == pytest.approx(0.04)  # of 0.02, 0.06, 0.0 and 0.1 the median
    assert score.transcriptions == results

    results[1:] = [results[1], OSError("no such file")]
    with pytest.raises(OSError, match="no such file"):
        digit_report.score(None, {}, None, utterances, temperature=0.5)
    results[:] = [results[1]] * 3
    assert math.isnan(digit_report.score(None, {}, None, utterances, temperature=0.5).boundary_s)


def test_vocabulary_of_ten_words_and_its_times():
    tokenizer = whisper_fsdd.make_tokenizer(whisper_fsdd.Config())
    assert [len(tokenizer.encode(f" {word}")) for word in WORDS] == [1] * 10
    assert tokenizer.num_timestamps == 301
    with pytest.raises(ValueError, match="model.vocab_size is 601, the tokenizer's 600"):
        whisper_fsdd.make_tokenizer(dataclasses.replace(whisper_fsdd.Config(), num_merges=34))


def test_fields_that_do_not_fit():
    with pytest.raises(ValueError, match="optimizer.num_steps is 6000, but the stages have 2"):
        dataclasses.replace(whisper_fsdd.Config(), stages=STAGES)
    with pytest.raises(ValueError, match="model.num_frames is 200, but the last stage's window 1.2 s"):
        dataclasses.replace(tiny_config(), stages=(STAGES[1], STAGES[0]))
