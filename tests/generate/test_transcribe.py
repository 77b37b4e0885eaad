"""Batches of windows, of clips and of files; options and audio that are wrong; real weights against openai-whisper."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
import soundfile

from jaxaudio.data.manifests import Utterance
from jaxaudio.data.transcripts import to_dict
from jaxaudio.generate import transcribe as transcribe_module
from jaxaudio.generate.transcribe import transcribe, transcribe_many
from jaxaudio.generate.transcribe_options import TranscribeOptions
from tests.generate.scripted_whisper import MODEL, TOKENIZER, Answer, Scripted, openai_transcribe
from tests.generate.test_windows import HELLO, PAIRS, check_coverage, random_case

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


def test_one_bad_file_is_reported_and_the_others_go_on(monkeypatch, tmp_path):
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
    text = tmp_path / "notes.wav"
    text.write_text("not audio")
    damaged = np.ones((2, 100), np.float32)
    good = np.full(16_000, 0.1, np.float32)
    files = [tmp_path / "absent.wav", good, text, damaged, good.copy()]
    results = dict_of(transcribe_many(MODEL, {}, files, tokenizer=TOKENIZER, batch_size=2), files)
    assert [type(result).__name__ for result in results] == [
        "AudioError", "Transcription", "AudioError", "ValueError", "Transcription"
    ]  # fmt: skip
    for result, message in ((results[0], "absent.wav"), (results[2], "notes.wav"), (results[3], "(2, 100)")):
        assert message in str(result)
    assert results[1] == results[4]
    assert [name for name, _ in scripted.calls].count("encode") == 2  # the two good ones, detection and text


def test_an_utterance_brings_its_language(monkeypatch, tmp_path):
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    utterances = [Utterance(str(tmp_path / "a.wav"), language=language) for language in ("French", None, "Klingon")]
    results = transcribe_many(MODEL, {}, utterances, tokenizer=TOKENIZER, language="it")
    french, default, unknown = dict_of(results, utterances)
    assert (french.language, default.language) == ("fr", "it")
    assert "Klingon" in str(unknown)
    assert [question.language for _, question in scripted.asked] == ["fr", "it"]


@pytest.mark.parametrize(
    ("field", "message"),
    [({"task": "translate"}, "a.wav: its task is 'translate', .* 'transcribe'"), ({"previous_text": "Eh"}, "'Eh'")],
)
def test_an_utterance_that_asks_for_something_else_is_an_error(monkeypatch, field, message):
    Scripted(monkeypatch, lambda question: Answer(HELLO))
    utterance = Utterance("a.wav", **field)
    ((_, error),) = transcribe_many(MODEL, {}, [utterance], tokenizer=TOKENIZER, language="en")
    with pytest.raises(ValueError, match=message):
        raise error


def test_progress_ends_with_the_duration(monkeypatch):
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
    seen = []
    watch = {"progress": lambda *seconds: seen.append(seconds)}
    scripted.transcribe(7055, language="en", clip_timestamps="5,40,50,65", **watch)
    assert seen == [(50.55, 70.55), (55.55, 70.55), (70.55, 70.55)]  # 20.55 s are not asked for
    seen.clear()
    scripted.transcribe(10_000, batched=True, vad=speech, batch_size=3, **watch)
    assert seen == sorted(seen)
    assert seen[-1] == (100.0, 100.0)


def test_multilingual_detects_each_window(monkeypatch):
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
    result = scripted.transcribe(600, multilingual=True, clip_timestamps="1,2,3.01,4,5,6")
    assert result.language == "de"  # of the first window, as the reference detects it
    found = [(question.seek, question.language) for _, question in scripted.asked]
    assert found == [(100, "de"), (301, "en"), (500, "de")]


def test_hotwords_leave_less_room_for_the_prompt(monkeypatch):
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO * 40))
    scripted.transcribe(18_000, language="en", hotwords="Ortega Quilter")
    num_hotwords = len(TOKENIZER.encode(" Ortega Quilter"))
    assert [len(question.prompt) for _, question in scripted.asked][-1] == 223 - num_hotwords
    scripted.asked.clear()
    scripted.transcribe(18_000, language="en", hotwords=TOKENIZER.decode(HELLO[:1] * 223))
    assert {question.prompt for _, question in scripted.asked} == {()}


def test_attempts_are_named_by_window_and_number(monkeypatch):
    names = []
    scripted = Scripted(
        monkeypatch, lambda question: Answer(HELLO, avg_logprob=-2.0 if question.temperature < 0.4 else 0.0)
    )
    decode = transcribe_module.decode

    def record(*args, requests, **kwargs):
        names.append(requests)
        return decode(*args, requests=requests, **kwargs)

    monkeypatch.setattr(transcribe_module, "decode", record)
    scripted.transcribe(6000, language="en")
    assert names == [[(0, 0)], [(0, 1)], [(0, 2)], [(3000, 0)], [(3000, 1)], [(3000, 2)]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": ()}, "temperature .*()"),
        ({"temperature": -0.5}, "-0.5"),
        ({"temperature": (0.0, math.nan)}, "nan"),
        ({"batch_size": 0}, "batch_size .* 0"),
        ({"clip_timestamps": "5,3"}, r"\(5.0, 3.0\)"),
        ({"clip_timestamps": (-1.0,)}, "-1.0"),
        ({"clip_timestamps": "1,two"}, "1,two"),
        ({"hallucination_silence_threshold": 2.0}, "hallucination_silence_threshold=2.0 .* word_timestamps"),
        ({"append_punctuations": "."}, "append_punctuations='.' .* word_timestamps"),
        ({"prepend_punctuations": "("}, r"prepend_punctuations='\(' .* word_timestamps"),
        ({"carry_initial_prompt": True}, "carry_initial_prompt=True .* initial_prompt"),
        ({"patience": 2.0}, "patience=2.0 .* beam_size"),
        ({"beam_size": 5, "temperature": 0.5}, "beam_size=5"),
        ({"best_of": 5, "temperature": 0.0}, "best_of=5"),
        ({"multilingual": True, "language": "de"}, "'de'"),
        ({"batched": True, "condition_on_previous_text": True}, "condition_on_previous_text=True"),
        ({"without_timestamps": True, "max_initial_timestamp": 0.5}, "max_initial_timestamp=0.5"),
        ({"temperature": 0.2, "compression_ratio_threshold": 3.0}, "compression_ratio_threshold=3.0.* only one is 0.2"),
        ({"batched": True, "prompt_reset_on_temperature": 0.3}, "prompt_reset_on_temperature=0.3"),
        ({"condition_on_previous_text": False, "prompt_reset_on_temperature": 0.3}, "0.3"),
        ({"task": "summarise"}, "summarise"),
        ({"length_penalty": 1.5}, "1.5"),
        ({"language": "Klingon"}, "Klingon"),
        ({"language": "yue"}, "yue"),  # only since large-v3
        ({"initial_prompt": "word " * 230}, "initial_prompt has 2.. tokens.* 223"),
        ({"initial_prompt": "word " * 223, "carry_initial_prompt": True}, "223 tokens.* 222"),
        ({"hotwords": "word " * 230}, "hotwords have 2.. tokens.* 223"),
    ],
)
def test_wrong_options_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        transcribe_many(MODEL, {}, [], tokenizer=TOKENIZER, **wrong)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="beem_size"):
        transcribe_many(MODEL, {}, [], tokenizer=TOKENIZER, beem_size=5)


@pytest.mark.parametrize("wrong", [{"language": "de"}, {"task": "translate"}, {"multilingual": True}])
def test_an_english_model_has_no_other_language(wrong):
    english = dataclasses.replace(TOKENIZER, is_multilingual=False)
    (value,) = wrong.values()
    with pytest.raises(ValueError, match=str(value)):
        transcribe_many(MODEL, {}, [], tokenizer=english, **wrong)


def test_options_are_given_at_once_or_by_name(monkeypatch):
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
    options = TranscribeOptions(language="de", clip_timestamps="0,1")
    assert (
        scripted.transcribe(300, options=options, language="German").heard
        == scripted.transcribe(300, options=options).heard
    )
    assert options.clip_timestamps == (0.0, 1.0)
    assert TranscribeOptions(temperature=0.0).temperature == (0.0,)


def test_a_clip_after_the_end_is_an_error_and_one_across_it_ends_there(monkeypatch):
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
    with pytest.raises(ValueError, match=r"starts at 7.0 s.* 5.0 s"):
        scripted.transcribe(500, language="en", clip_timestamps="0,1,7,9")
    assert [(span.start_s, span.end_s) for span in scripted.transcribe(500, clip_timestamps="2,9").heard] == [
        (2.0, 5.0)
    ]


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (iter([]), "no samples"),
        (np.zeros((2, 16_000), np.float32), r"\(2, 16000\)"),
        (np.zeros(16_000, np.int16), "int16.*32768"),
        (np.full(16_000, 3000.0), "3000.*32768"),
        (np.where(np.arange(160_000) == 52_000, np.nan, 0.0), "nan at 3.25"),
        (np.where(np.arange(160_000) == 52_000, -np.inf, 0.0), "inf"),
    ],
    ids=["empty", "empty iterator", "stereo", "integers", "not scaled", "nan", "inf"],
)
@pytest.mark.parametrize("vad", [None, speech])
def test_wrong_audio_is_named(audio, message, vad):
    with pytest.raises(ValueError, match=message):
        transcribe(MODEL, {"encoder": {}, "decoder": {}}, audio, tokenizer=TOKENIZER, vad=vad)


def test_arrays_files_and_iterators_are_the_same_audio(monkeypatch, tmp_path):
    scripted = Scripted(monkeypatch, lambda question: Answer(PAIRS))
    waveform = np.random.default_rng(0).integers(-32768, 32768, 600_123).astype(np.float32) / 32768
    soundfile.write(tmp_path / "a.wav", waveform, 16_000)
    for vad in (None, speech):
        results = [
            transcribe(MODEL, {}, audio, tokenizer=TOKENIZER, language="en", vad=vad)
            for audio in (
                waveform,
                waveform.astype(np.float64),
                jax.numpy.asarray(waveform),
                str(tmp_path / "a.wav"),
                tmp_path / "a.wav",
                iter(np.split(waveform, [7, 8000, 480_000])),
            )
        ]
        assert results[1:] == results[:1] * 5
    assert len({first for first, _ in scripted.asked}) == 1


def test_less_than_a_frame_is_skipped(monkeypatch):
    Scripted(monkeypatch, lambda question: Answer(HELLO))
    result = transcribe(MODEL, {}, np.zeros(100, np.float32), tokenizer=TOKENIZER, language="en")
    assert [(span.start_s, span.end_s, span.rule) for span in result.skipped] == [
        (0.0, 0.00625, "shorter_than_a_frame")
    ]
    assert result.heard == ()
