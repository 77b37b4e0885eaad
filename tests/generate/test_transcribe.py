"""Batches of windows, of clips and of files; options and audio that are wrong; real weights against openai-whisper."""

import itertools

import numpy as np
import pytest

from jaxaudio.data.transcripts import to_dict
from jaxaudio.generate.transcribe import transcribe, transcribe_many
from tests.generate.scripted_whisper import MODEL, TOKENIZER, Answer, Scripted, openai_transcribe
from tests.generate.test_windows import HELLO, check_coverage, random_case

SPEECH = [(0.5, 3.0), (4.0, 12.0), (33.0, 41.5), (60.0, 95.0), (99.0, 99.99)]
CLIPS = [(50, 1200), (3300, 4150), (6000, 9000), (9000, 9999)]  # the long one is cut; its rest has room for the last


def speech(blocks):
    """A detector that knows what it will find, and listens all the same."""
    assert sum(map(len, blocks)) > 0
    return SPEECH


def one_clip_at_a_time(monkeypatch, answer, align, num_frames, clips, **options):
    """openai-whisper on each clip alone, put together."""
    segments, questions = [], []
    for start, end in clips:
        clip = {"clip_timestamps": [start / 100, end / 100]}
        result, asked = openai_transcribe(monkeypatch, answer, align, num_frames, **options | clip)
        segments += result["segments"]
        questions += asked
    segments = [{**segment, "id": i} for i, segment in enumerate(segments)]
    tokens = [token for segment in segments for token in segment["tokens"]]
    return {"text": TOKENIZER.decode(tokens), "segments": segments, "language": "en"}, questions


def in_order(asked):
    return sorted(asked, key=lambda question: (question.seek, question.temperature))


@pytest.mark.parametrize("seed", range(12))
def test_batched_clips_are_those_of_openai_whisper_one_at_a_time(monkeypatch, seed):
    answer, align, _, options = random_case(seed)
    options |= {"language": "en", "condition_on_previous_text": False, "clip_timestamps": "0"}
    expected, questions = one_clip_at_a_time(monkeypatch, answer, align, 10_000, CLIPS, **options)
    del options["condition_on_previous_text"]
    results = []
    for batch_size in (1, 3, 8):
        scripted = Scripted(monkeypatch, answer, align)
        results.append(scripted.transcribe(10_000, **options, batched=True, vad=speech, batch_size=batch_size))
        assert in_order(question for _, question in scripted.asked) == in_order(questions)
    assert to_dict(results[0]) == expected
    assert results[1:] == results[:1] * 2
    check_coverage(results[0])
    assert {span.rule for span in results[0].skipped} >= {"voice_activity"}


def test_batched_clips_are_those_of_openai_whisper_in_one_call(monkeypatch):
    answer, align, _, _ = random_case(3)
    clips = list(itertools.chain(*([start / 100, end / 100] for start, end in CLIPS)))
    options = {"language": "en", "condition_on_previous_text": False}
    expected, _ = openai_transcribe(monkeypatch, answer, align, 10_000, **options, clip_timestamps=clips)
    result = Scripted(monkeypatch, answer, align).transcribe(10_000, language="en", batched=True, vad=speech)
    assert to_dict(result) == expected


def test_speech_in_sequence_is_openai_whisper_on_clips_without_the_cuts(monkeypatch):
    answer, align, _, _ = random_case(4)
    clips = [0.5, 12.0, 33.0, 41.5, 60.0, 99.99]
    expected, _ = openai_transcribe(monkeypatch, answer, align, 10_000, language="en", clip_timestamps=clips)
    result = Scripted(monkeypatch, answer, align).transcribe(10_000, language="en", vad=speech)
    assert to_dict(result) == expected


def test_clips_are_cut_out_of_the_speech(monkeypatch):
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
    options = {"vad": speech, "clip_timestamps": "2,6,34,38,39,40,90"}
    result = scripted.transcribe(12_000, language="en", batched=True, **options)
    assert [(question.seek, question.num_frames) for _, question in scripted.asked] == [
        (200, 400), (3400, 400), (3900, 100), (9000, 999)
    ]  # fmt: skip
    assert [(span.start_s, span.end_s, span.rule) for span in result.skipped] == [
        (0.0, 2.0, "clip_timestamps"), (6.0, 34.0, "clip_timestamps"), (38.0, 39.0, "clip_timestamps"),
        (40.0, 90.0, "clip_timestamps"), (99.99, 120.0, "voice_activity"),
    ]  # fmt: skip
    check_coverage(result)


def test_without_speech_nothing_is_asked_but_the_language(monkeypatch):
    for batched in (False, True):
        scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
        result = scripted.transcribe(500, vad=lambda blocks: [], batched=batched)
        assert (result.text, result.segments, result.language, scripted.asked) == ("", (), "de", [])
        assert [(span.start_s, span.end_s, span.rule) for span in result.skipped] == [(0.0, 5.0, "voice_activity")]


def test_the_energy_detector_serves_batches_without_another(monkeypatch):
    Scripted(monkeypatch, lambda question: Answer(HELLO))
    silence, noise = np.zeros(80_000, np.float32), 0.1 * np.random.default_rng(0).standard_normal(32_000, np.float32)
    audio = np.concatenate([silence, noise, silence])
    result = transcribe(MODEL, {}, audio, tokenizer=TOKENIZER, language="en", batched=True)
    (heard,) = result.heard
    assert 4.5 < heard.start_s < 5.0 < 7.0 < heard.end_s < 7.5


FILES = {1.0: 4321, 2.0: 900, 3.0: 6400, 4.0: 3000, 5.0: 12_345}  # first sample and frames


def wave(tag):
    return np.full(160 * FILES[tag] + 7, tag, np.float32)


@pytest.mark.parametrize(
    "options", [{}, {"batched": True, "vad": speech, "language": None}], ids=["sequence", "batched"]
)
def test_many_files_share_batches_and_do_not_change_each_other(monkeypatch, options):
    answer, align, _, _ = random_case(7)
    options = {"word_timestamps": True, **options}
    alone, asked_alone = {}, {}
    for tag in FILES:
        scripted = Scripted(monkeypatch, answer, align)
        alone[tag] = transcribe(MODEL, {}, wave(tag), tokenizer=TOKENIZER, **options)
        asked_alone[tag] = in_order(question for _, question in scripted.asked)
    for batch_size, tags in ((1, [1.0, 2.0, 3.0]), (3, [3.0, 5.0, 4.0, 2.0, 1.0]), (8, [2.0, 1.0, 5.0])):
        scripted = Scripted(monkeypatch, answer, align)
        waves = [wave(tag) for tag in tags]
        files = {id(file): tag for file, tag in zip(waves, tags, strict=True)}
        results = transcribe_many(MODEL, {}, waves, tokenizer=TOKENIZER, batch_size=batch_size, **options)
        found = {files[id(file)]: result for file, result in results}
        assert found == {tag: alone[tag] for tag in tags}
        for tag in tags:
            assert in_order(question for first, question in scripted.asked if first == tag) == asked_alone[tag]
        # One shape, whatever is left to do; and no more batches than the rows need.
        assert {rows for name, rows in scripted.calls if name != "decode"} == {batch_size}
        assert len({rows for name, rows in scripted.calls if name == "decode"}) == 1


def test_windows_of_files_fill_the_batch(monkeypatch):
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
    waves = [np.full(160 * frames, 0.5, np.float32) for frames in (9000, 3000, 3000, 3000, 6000)]
    results = dict_of(transcribe_many(MODEL, {}, waves, tokenizer=TOKENIZER, language="en", batch_size=3), waves)
    assert [len(result.segments) for result in results] == [3, 1, 1, 1, 2]
    assert [name for name, _ in scripted.calls] == ["encode", "decode"] * 3  # 8 windows in 3 batches


def dict_of(results, files):
    """Results in the order of the files."""
    places = {id(file): place for place, file in enumerate(files)}
    found = {places[id(file)]: result for file, result in results}
    return [found[place] for place in range(len(files))]
