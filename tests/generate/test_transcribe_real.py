"""Transcriptions by real, random weights: against openai-whisper, and in batches of any size."""

import dataclasses
import importlib
import os
import pathlib

import jax
import numpy as np
import pytest
import whisper.timing

from jaxaudio.data.audio import load_audio
from jaxaudio.data.byte_pair import BytePairEncoding
from jaxaudio.data.transcripts import to_dict
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.generate import whisper as decoding
from jaxaudio.generate.transcribe import transcribe, transcribe_many
from jaxaudio.models.whisper import Whisper
from tests.generate.test_windows import check_coverage
from tests.whisper_peers import MULTILINGUAL, from_openai, make_openai, tokenizer_file

OPENAI = importlib.import_module("whisper.transcribe")
TOKENIZER = WhisperTokenizer.from_file(tokenizer_file(MULTILINGUAL), MULTILINGUAL.vocab_size)
SEED = 7  # of weights that make several segments of different lengths in each window


@pytest.fixture(scope="module")
def recording():
    """70 s of speech."""
    if "JAXAUDIO_DATA" not in os.environ:
        pytest.skip("JAXAUDIO_DATA does not name the folder of real recordings")
    folder = pathlib.Path(os.environ["JAXAUDIO_DATA"]) / "speech"
    parts = [load_audio(path) for path in sorted([*folder.glob("*.ogg"), *folder.glob("*.flac")])]
    return np.tile(np.concatenate(parts), 2)[: 70 * 16_000 + 77]


@pytest.mark.slow
def test_real_speech_is_transcribed_as_by_openai_whisper(monkeypatch, recording):
    for name in ("dtw_cpu", "backtrace"):  # as Python: compiling them takes longer than running them
        monkeypatch.setattr(whisper.timing, name, getattr(whisper.timing, name).py_func)
    peer = make_openai(SEED)
    model, params, _ = from_openai(peer)
    params, num_frames = decoding.inference_params(params), len(recording) // 160
    for options in ({}, {"word_timestamps": True}):
        options |= {"temperature": 0.0, "sample_len": 40}
        expected = OPENAI.transcribe(peer, recording, fp16=False, **options)
        result = transcribe(model, params, recording, tokenizer=TOKENIZER, **options)
        found = to_dict(result)
        assert len(found["segments"]) > 4
        for segments in (found["segments"], expected["segments"]):
            for segment in segments:
                probabilities = [word.pop("probability") for word in segment.get("words", ())]
                segment["floats"] = [segment.pop(name) for name in ("avg_logprob", "no_speech_prob")] + probabilities
                if segment["seek"] > num_frames - 4:  # there openai-whisper aligns with 0 / 0
                    del segment["start"], segment["end"]
        floats = [[segment.pop("floats") for segment in each["segments"]] for each in (found, expected)]
        assert found == expected
        np.testing.assert_allclose(np.concatenate(floats[0]), np.concatenate(floats[1]), atol=1e-4)
        check_coverage(result)


@pytest.fixture(scope="module")
def short():
    """A model with a window of 4 s and 1200 tokens, and its tokenizer."""
    tokenizer = WhisperTokenizer.for_ranks(BytePairEncoding(TOKENIZER.bpe.tokens[:1000]), ("en", "de"), 201)
    kept = [
        *range(1000), TOKENIZER.eot, TOKENIZER.sot, *(TOKENIZER.language_ids[code] for code in tokenizer.languages),
        *range(TOKENIZER.translate, TOKENIZER.timestamp_begin + tokenizer.num_timestamps),
    ]  # fmt: skip
    config = dataclasses.replace(MULTILINGUAL, num_frames=400, text_length=64, vocab_size=tokenizer.vocab_size)
    _, params, _ = from_openai(make_openai(SEED))
    encoder, decoder = params["encoder"], params["decoder"]
    encoder["position_embedding"] = encoder["position_embedding"][: config.num_positions]
    decoder["position_embedding"] = decoder["position_embedding"][: config.text_length]
    decoder["token_embedding"] = decoder["token_embedding"][np.array(kept)]
    return Whisper(config), decoding.inference_params(params), tokenizer


def sounds(seed, seconds):
    """Tones and noise that change every few tenths of a second, with pauses."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(16_000 * seconds)) / 16_000
    steps = (3 * times).astype(int)
    levels, pitches = rng.choice([0.0, 0.05, 0.3], len(times)), rng.uniform(100, 3000, len(times))
    tones = np.sin(2 * np.pi * pitches[steps] * times) + 0.3 * rng.standard_normal(len(times))
    return (levels[steps] * tones).astype(np.float32)


def same(found, expected):
    """Equal but for rounding."""
    for segment, other in zip(found.segments, expected.segments, strict=True):
        floats = [(s.avg_logprob, s.no_speech_prob) for s in (segment, other)]
        np.testing.assert_allclose(*floats, atol=1e-5)
        assert dataclasses.replace(segment, avg_logprob=0.0, no_speech_prob=0.0) == dataclasses.replace(
            other, avg_logprob=0.0, no_speech_prob=0.0
        )
    assert dataclasses.replace(found, segments=()) == dataclasses.replace(expected, segments=())


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True])
def test_results_do_not_depend_on_the_batch_or_on_other_files(short, batched):
    model, params, tokenizer = short
    files = [sounds(seed, seconds) for seed, seconds in enumerate((9.3, 2.0, 14.0))]
    options = {
        "language": "en", "batched": batched, "temperature": (0.0, 0.7), "logprob_threshold": -2.0,
        "no_speech_threshold": None, "sample_len": 20, "key": jax.random.key(3),
    }  # fmt: skip
    alone = [transcribe(model, params, file, tokenizer=tokenizer, **options) for file in files]
    temperatures = [segment.temperature for result in alone for segment in result.segments]
    assert set(temperatures) == {0.0, 0.7}  # some rows fell back, others did not
    assert len({segment.tokens for result in alone for segment in result.segments}) > 6
    for batch_size in (3, 8):
        places = {id(file): place for place, file in enumerate(files)}
        results = transcribe_many(model, params, files[::-1], tokenizer=tokenizer, batch_size=batch_size, **options)
        for file, result in results:
            same(result, alone[places[id(file)]])
            check_coverage(result)
    other_key = transcribe(model, params, files[0], tokenizer=tokenizer, **options | {"key": jax.random.key(4)})
    assert other_key != alone[0]


@pytest.mark.slow
def test_one_program_serves_all_durations_and_options(short):
    model, params, tokenizer = short
    programs = {
        decoding.encode: 1,
        decoding._decode: 2,
        decoding._language_probabilities: 1,
        decoding.teacher_forced: 1,
    }
    before = {program: program._cache_size() for program in programs}
    option_sets = (
        {}, {"beam_size": 2}, {"temperature": (0.0, 0.5), "best_of": 2, "compression_ratio_threshold": 0.1},
        {"initial_prompt": "Names", "prefix": "So", "language": None},
        {"without_timestamps": True, "repetition_penalty": 1.5},
        {"batched": True, "max_initial_timestamp": 0.5, "suppress_tokens": (), "word_timestamps": True},
    )  # fmt: skip
    for seconds, options in zip((0.1, 0.9, 4.0, 5.5, 8.2, 8.2), option_sets, strict=True):
        options = {"temperature": 0.0, "language": "en", "sample_len": 6, "batch_size": 3} | options
        check_coverage(transcribe(model, params, sounds(0, seconds), tokenizer=tokenizer, **options))
    for program, most in programs.items():  # decoding: with one hypothesis a row, and with two
        assert program._cache_size() - before[program] <= most


@pytest.mark.slow
def test_silence_and_clipping_are_transcribed(short):
    model, params, tokenizer = short
    loud = np.clip(20 * sounds(1, 3.0), -1, 1)
    for audio in (np.zeros(32_000, np.float32), np.zeros(1600, np.float32), loud):
        options = {"language": "en", "temperature": 0.0, "sample_len": 6, "batch_size": 3}
        result = transcribe(model, params, audio, tokenizer=tokenizer, **options)
        check_coverage(result)
        assert all(np.isfinite(segment.avg_logprob) for segment in result.segments)
