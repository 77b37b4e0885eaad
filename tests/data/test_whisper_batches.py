import dataclasses
import json

import numpy as np
import pytest
import soundfile

from jaxaudio.data.audio import AudioError
from jaxaudio.data.byte_pair import BytePairEncoding, train_byte_pairs
from jaxaudio.data.manifests import ManifestError, TimedText, Utterance, read_manifest
from jaxaudio.data.whisper_batches import (
    WhisperData,
    evaluation_batches,
    load_window,
    manifest_windows,
    subsample_speechless,
    whisper_batches,
)
from jaxaudio.data.whisper_examples import Window, token_row, window_tokens
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer

WINDOW = {"window_s": 2.0, "text_length": 32}


@pytest.fixture(scope="module")
def tokenizer():
    return WhisperTokenizer.for_ranks(BytePairEncoding(tuple(bytes([i]) for i in range(256))), ("en", "de"), 101)


def ramp(duration_s):
    """Samples that tell where they are: exact in 16 bits."""
    return (np.arange(round(duration_s * 16000)) % 30000).astype(np.float32) / 32768


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A manifest on disk: 5 s in segments, one of them cut; 1 s of text alone; 7 s of silence."""
    folder = tmp_path_factory.mktemp("recordings")
    for name, duration_s in (("long", 5.0), ("text", 1.0), ("silence", 7.0)):
        soundfile.write(folder / f"{name}.wav", ramp(duration_s), 16000, subtype="PCM_16")
    segments = [(0.1, 0.9, "ab"), (1.5, 2.5, "c"), (3.0, 3.3, "d")]
    segments = [dict(zip(("start_s", "end_s", "text"), segment, strict=True)) for segment in segments]
    lines = [
        {"audio": "long.wav", "language": "German", "segments": segments, "task": "translate"},
        {"audio": "text.wav", "language": "en", "text": "e", "duration_s": 1.0},
        {"audio": "silence.wav", "language": "en", "text": ""},
    ]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_manifest(folder / "list.jsonl")


def test_windows_of_a_list(recordings, tokenizer):
    examples = manifest_windows(recordings, tokenizer, 2.0)
    found = [(example.window.start_s, example.window.cut_start_s, len(example.window.segments)) for example in examples]
    assert found == [(0.0, 1.5, 1), (1.5, None, 2), (3.5, None, 0), (0, None, 1), *[(t, None, 0) for t in (0, 2, 4, 6)]]
    assert [example.utterance.language for example in examples[:4]] == ["de"] * 3 + ["en"]
    assert examples[1].window.previous_text == "ab"


def test_speechless_windows_are_subsampled_and_no_other(recordings, tokenizer):
    examples = manifest_windows(recordings, tokenizer, 2.0) * 100
    kept = subsample_speechless(examples, 0.1, seed=0)
    speech = [example for example in examples if example.window.segments]
    assert [example for example in kept if example.window.segments] == speech
    assert 25 < len(kept) - len(speech) < 75  # of 500
    assert subsample_speechless(examples, 0.1, seed=0) == kept
    assert subsample_speechless(examples, 0.1, seed=1) != kept
    assert subsample_speechless(examples, 1.0, seed=0) == examples


def expected_row(tokenizer, example, timestamps, previous):
    window, utterance = example.window, example.utterance
    tokens = window_tokens(tokenizer, window, language=utterance.language, task=utterance.task, timestamps=timestamps)
    previous = list(f" {window.previous_text}".encode()) if previous and window.previous_text else ()
    row = token_row(tokenizer, tokens, text_length=32, previous=previous)
    samples = np.zeros(32000, np.float32)
    whole = ramp({"long": 5.0, "text": 1.0, "silence": 7.0}[utterance.audio.rsplit("/")[-1][:-4]])
    start = round(window.start_s * 16000)
    heard = whole[start : start + 32000]
    if not timestamps and window.cut_start_s is not None:
        heard = heard[: round(window.cut_start_s * 16000)]
    samples[: len(heard)] = heard
    return {"waveform": samples, **row}


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in other)


def test_every_row_is_one_of_the_four_ways_to_write_its_window(recordings, tokenizer):
    examples = manifest_windows(recordings, tokenizer, 2.0)
    batches = whisper_batches(examples, tokenizer, WhisperData(), batch_size=8, seed=0, num_epochs=20, **WINDOW)
    rows = [{name: batch[name][row] for name in batch} for batch in batches for row in range(8)]
    assert len(rows) == 160
    ways = {}
    for example in examples:
        for timestamps in (False, True)[: 1 + example.window.timed]:
            for previous in (False, True)[: 1 + bool(example.window.previous_text)]:
                expected = expected_row(tokenizer, example, timestamps, previous)
                count = sum(same(row, expected) for row in rows)
                ways[example.utterance.audio[-8:], example.window.start_s, timestamps, previous] = count
                assert count, (example, timestamps, previous)
    # Each of the 20 epochs has each window once; rows without speech are the same with and without times.
    speech = {key: count for key, count in ways.items() if key[0] == "long.wav" and key[1] in (0.0, 1.5)}
    assert sum(speech.values()) == 40
    with_times = sum(count for (_, _, timestamps, _), count in speech.items() if timestamps)
    assert 10 <= with_times <= 30
    assert 4 <= sum(count for (*_, previous), count in speech.items() if previous) <= 16


@pytest.mark.parametrize(("rates", "timestamps", "previous"), [((1.0, 0.0), True, False), ((0.0, 1.0), False, True)])
def test_rates_of_one_and_zero_are_always_and_never(recordings, tokenizer, rates, timestamps, previous):
    examples = manifest_windows(recordings, tokenizer, 2.0)[:2]
    data = WhisperData(timestamps_rate=rates[0], previous_text_rate=rates[1])
    (batch,) = whisper_batches(examples, tokenizer, data, batch_size=8, seed=1, num_epochs=4, **WINDOW)
    expected = [expected_row(tokenizer, example, timestamps, previous) for example in examples]
    for row in range(8):
        assert any(same({name: batch[name][row] for name in batch}, one) for one in expected)


def test_bpe_dropout_draws_other_spellings_of_the_same_text(recordings):
    pairs = train_byte_pairs(["abcabc"] * 3, 2)
    tokenizer = WhisperTokenizer.for_ranks(pairs, ("en",), 101)
    utterance = dataclasses.replace(recordings[1], text="abcabc")
    examples = manifest_windows([utterance], tokenizer, 2.0)
    data = WhisperData(bpe_dropout=0.5)
    (batch,) = whisper_batches(examples, tokenizer, data, batch_size=16, seed=0, num_epochs=16, **WINDOW)
    texts = [[token for token in row if token < tokenizer.eot] for row in batch["inputs"].tolist()]
    assert len({tuple(text) for text in texts}) > 3
    assert {tokenizer.decode(text) for text in texts} == {" abcabc"}


def test_the_seed_decides_and_a_saved_position_continues(recordings, tokenizer):
    examples = manifest_windows(recordings, tokenizer, 2.0)
    make = lambda seed: whisper_batches(examples, tokenizer, WhisperData(), batch_size=3, seed=seed, **WINDOW)  # noqa: E731
    first, again, other = make(0), make(0), make(1)
    batches = [next(first) for _ in range(4)]
    for batch in batches[:2]:
        assert same(next(again), batch)
    assert not all(same(next(other), batch) for batch in batches)
    resumed = make(0)
    resumed.set_state(again.get_state())
    for batch in batches[2:]:
        assert same(next(resumed), batch)


def test_processes_share_an_epoch(recordings, tokenizer):
    examples = manifest_windows(recordings, tokenizer, 2.0)
    data = WhisperData(timestamps_rate=1.0, previous_text_rate=0.0)
    options = {"batch_size": 1, "seed": 0, "num_epochs": 1, **WINDOW}
    shares = [
        list(whisper_batches(examples, tokenizer, data, process_index=index, process_count=2, **options))
        for index in range(2)
    ]
    whole = list(whisper_batches(examples, tokenizer, data, **options))
    assert [len(share) for share in shares] == [4, 4]
    for batch in whole:
        assert sum(same(other, batch) for share in shares for other in share) == sum(same(o, batch) for o in whole)
    with pytest.raises(ValueError, match="8 windows cannot be shared by 9 processes"):
        whisper_batches(examples, tokenizer, data, process_count=9, **options)


def test_evaluation_has_every_window_once(recordings, tokenizer):
    examples = manifest_windows(recordings, tokenizer, 2.0)
    shares = [
        list(evaluation_batches(examples, tokenizer, batch_size=3, process_index=i, process_count=2, **WINDOW))
        for i in range(2)
    ]
    assert [len(share) for share in shares] == [2, 2]
    order = [batch for pair in zip(*shares, strict=True) for batch in pair]
    rows = [{name: batch[name][row] for name in batch} for batch in order for row in range(3)]
    for row, example in zip(rows, examples, strict=False):
        assert same(row, expected_row(tokenizer, example, example.window.timed, previous=False))
    assert not any(row["mask"].any() or row["waveform"].any() for row in rows[8:])


def test_windows_of_a_file_that_is_resampled(tmp_path):
    """From the middle of a file at another rate, the same samples as of the whole."""
    samples = np.random.default_rng(0).standard_normal(8000 * 70).astype(np.float32) / 8
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    whole = load_window(tmp_path / "a.wav", 0.0, 70 * 16000)
    assert len(whole) == 70 * 16000
    for start_s, seconds in ((0.0, 1), (29.5, 2), (31.24, 30), (69.0, 5)):
        start = round(start_s * 16000)
        part = load_window(tmp_path / "a.wav", start_s, seconds * 16000)
        np.testing.assert_array_equal(part, whole[start : start + seconds * 16000])
    with pytest.raises(AudioError, match=r"a.wav: ends after 70.00 s, a window of it begins at 71.0 s"):
        load_window(tmp_path / "a.wav", 71.0, 100)


def test_lists_that_cannot_be_trained_on(recordings, tokenizer):
    with pytest.raises(ManifestError, match="long.wav: has neither text nor segments"):
        manifest_windows([dataclasses.replace(recordings[0], segments=())], tokenizer, 2.0)
    with pytest.raises(ManifestError, match="text.wav: has no language; expected a code such as en"):
        manifest_windows([dataclasses.replace(recordings[1], language=None)], tokenizer, 2.0)
    with pytest.raises(ValueError, match="Klingon"):
        manifest_windows([dataclasses.replace(recordings[1], language="Klingon")], tokenizer, 2.0)
    long = Utterance(recordings[1].audio, text="a" * 40, language="en", duration_s=1.0)
    batches = whisper_batches(
        manifest_windows([long], tokenizer, 2.0), tokenizer, WhisperData(), batch_size=1, seed=0, **WINDOW
    )
    with pytest.raises(ManifestError, match="text.wav, window at 0.0 s: 46 tokens with eot, but the decoder holds 33"):
        next(batches)
    gone = Utterance("nowhere.wav", text="a", language="en")
    with pytest.raises(AudioError, match="nowhere.wav"):
        manifest_windows([gone], tokenizer, 2.0)


def test_an_english_tokenizer_needs_no_language(recordings):
    tokenizer = WhisperTokenizer.for_ranks(BytePairEncoding(tuple(bytes([i]) for i in range(256))), (), 101)
    (example,) = manifest_windows([dataclasses.replace(recordings[1], language=None)], tokenizer, 2.0)
    assert example.window == Window(0.0, (TimedText(0.0, 1.0, "e"),), timed=False)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(WhisperData)])
def test_rates_are_probabilities(field):
    with pytest.raises(ValueError, match=rf"{field} must be in \[0, 1\], got 1.5"):
        WhisperData(**{field: 1.5})
