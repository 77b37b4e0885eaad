import dataclasses
import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import whisper

from jaxaudio.data.transcripts import Segment, Word
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.generate import word_timestamps
from jaxaudio.generate.whisper import encode, inference_params
from jaxaudio.generate.word_timestamps import WordTiming, add_word_timestamps, align_words, merge_punctuations
from jaxaudio.models.whisper import Whisper
from tests.whisper_peers import ENGLISH, MULTILINGUAL, V3, from_openai, make_openai, openai_tokenizer, tokenizer_file

EOT = 50257
MARKS = {"prepend_punctuations": "\"'“¿([{-", "append_punctuations": "\"'.。,，!！?？:：”)]}、"}


def _scripted(seed):
    """A window's words with times as an alignment gives them, and segments over their tokens."""
    rng = np.random.default_rng(seed)
    pool = [" the", " $", "5", ".", ",", " “", "”", " (", ")", " -", "?", "。", "今日", " 1,000", " ", "! ", "'", "é"]
    words = rng.choice(pool, rng.integers(0, 25)).tolist()
    steps = rng.choice([0, 1, 5, 12, 20, 60, 200], len(words) + 1, p=[0.1, 0.1, 0.2, 0.3, 0.15, 0.1, 0.05])
    times = (np.cumsum(steps) / 50).tolist()  # of 20 ms
    alignment, num_tokens = [], 0
    for word, start, end in zip(words, times, times[1:], strict=False):
        tokens = tuple(range(num_tokens, num_tokens + int(rng.integers(1, 4))))
        num_tokens += len(tokens)
        alignment.append(WordTiming(word, tokens, start, end, float(rng.random())))
    seek = int(rng.choice([0, rng.integers(0, 100_000)]))
    cuts = [0, *sorted(rng.integers(0, num_tokens + 1, rng.integers(0, 4)).tolist()), num_tokens]
    edges = np.sort(rng.integers(0, round(50 * times[-1]) + 2, 2 * len(cuts) - 2)) / 50
    segments = [
        _segment(seek, seek / 100 + start, seek / 100 + end, (EOT + 110, *range(first, last), EOT + 120))
        for (first, last), start, end in zip(itertools.pairwise(cuts), edges[::2], edges[1::2], strict=True)
    ]
    return segments, alignment, max(0.0, seek / 100 - float(rng.choice([0.0, 0.5, 5.0])))


def _segment(seek, start, end, tokens):
    return Segment(
        id=0,
        seek=seek,
        start=float(start),
        end=float(end),
        text="",
        tokens=tuple(tokens),
        temperature=0.0,
        avg_logprob=0.0,
        compression_ratio=1.0,
        no_speech_prob=0.0,
        words=None,
    )


def _theirs(segments, **arguments):
    """openai-whisper's function, which works in place on dicts: (start, end, words) of each segment."""
    dicts = [{"seek": s.seek, "start": s.start, "end": s.end, "tokens": list(s.tokens)} for s in segments]
    whisper.timing.add_word_timestamps(segments=dicts, **arguments)
    return [(s["start"], s["end"], [(*word.values(),) for word in s["words"]]) for s in dicts]


def _plain(segments):
    return [(s.start, s.end, [dataclasses.astuple(word) for word in s.words]) for s in segments]


@pytest.mark.parametrize("seeds", [range(0, 50), range(50, 100), range(100, 150)], ids=str)
def test_segments_get_openai_whispers_words_and_times(monkeypatch, seeds):
    tokenizer = types.SimpleNamespace(eot=EOT)
    changed = 0
    for seed in seeds:
        segments, alignment, last_speech_s = _scripted(seed)
        scripted = [
            whisper.timing.WordTiming(t.word, list(t.tokens), np.float64(t.start), np.float64(t.end), t.probability)
            for t in alignment
        ]
        monkeypatch.setattr(whisper.timing, "find_alignment", lambda *args, scripted=scripted: scripted)
        expected = _theirs(
            segments,
            model=None,
            tokenizer=tokenizer,
            mel=None,
            num_frames=3000,
            last_speech_timestamp=last_speech_s,
            **MARKS,
        )
        before = (tuple(segments), tuple(alignment))
        ours = add_word_timestamps(segments, alignment, tokenizer=tokenizer, last_speech_s=last_speech_s, **MARKS)
        assert _plain(ours) == expected
        assert before == (tuple(segments), tuple(alignment))
        assert all(0 <= word.start <= word.end for segment in ours for word in segment.words)
        changed += any((a.start, a.end) != (b.start, b.end) for a, b in zip(ours, segments, strict=True))
    assert changed > len(seeds) // 2  # the scripts say something


def test_a_price_keeps_its_sign_and_its_time():
    tokenizer = types.SimpleNamespace(eot=EOT)
    words = [
        (" That's", 0.0, 0.4),
        (" $", 0.4, 0.6),
        ("5.99", 0.6, 1.2),
        ("!", 1.2, 1.3),
        (" (", 1.3, 1.5),
        ("50%", 1.5, 2.0),
    ]
    alignment = [WordTiming(word, (i,), start, end, 0.5) for i, (word, start, end) in enumerate(words)]
    (segment,) = add_word_timestamps(
        [_segment(1000, 10.0, 12.0, range(6))], alignment, tokenizer=tokenizer, last_speech_s=10.0, **MARKS
    )
    assert [(word.word, word.start, word.end) for word in segment.words] == [
        (" That's", 10.0, 10.4),
        (" $", 10.4, 10.6),
        ("5.99!", 10.6, 11.2),
        (" (50%", 11.5, 12.0),
    ]
    assert segment.words[0] == Word(" That's", 10.0, 10.4, 0.5)


def test_a_first_word_that_begins_before_the_audio_begins_with_it():
    tokenizer = types.SimpleNamespace(eot=EOT)
    alignment = [WordTiming(" a", (0,), 0.0, 0.66, 0.5), WordTiming(" b", (1,), 0.66, 2.0, 0.5)]
    (segment,) = add_word_timestamps(
        [_segment(0, 0.6, 2.0, (0, 1))], alignment, tokenizer=tokenizer, last_speech_s=0.0, **MARKS
    )
    # The segment begins later than the word by more than half a second, and the median, 0.7 s, is longer than the word.
    assert _plain([segment]) == [(0.6, 2.0, [(" a", 0.0, 0.66, 0.5), (" b", 0.66, 2.0, 0.5)])]


def test_no_segments_and_no_words():
    tokenizer = types.SimpleNamespace(eot=EOT)
    assert add_word_timestamps([], [], tokenizer=tokenizer, last_speech_s=1.0, **MARKS) == []
    segment = _segment(0, 0.0, 1.0, (EOT + 107,))
    (same,) = add_word_timestamps([segment], [], tokenizer=tokenizer, last_speech_s=1.0, **MARKS)
    assert same == dataclasses.replace(segment, words=())
    assert merge_punctuations([], "(", ")") == []


TEXTS = {
    "en": " And so, my fellow Americans: it costs $5.99 (12% off) in 2024!",
    "de": " Grüße aus Köln – für 1.000 € pro Stück.",
    "zh": "今天的价格是5元。",
    "ja": "こんにちは、世界！",
    "es": " " + "¿Cuántos años tienes? " * 9,
}
FRAMES = (3000, 1235, 6, 401, 2222, 700)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The same random model in both packages, with windows and what was said in them."""

    peer: whisper.model.Whisper
    model: Whisper
    params: dict
    tokenizer: WhisperTokenizer
    mel: np.ndarray
    languages: tuple[str, ...]
    texts: tuple[tuple[int, ...], ...]

    def align(self, rows=slice(None), model=None, **options):
        memory = encode(self.model, self.params, jnp.asarray(self.mel[rows]))
        rows = self.texts[rows], FRAMES[: len(self.texts)][rows], self.languages[rows]
        return align_words(model or self.model, self.params, self.tokenizer, memory, *rows, **options)

    def expected(self, row, task="transcribe"):
        tokenizer = openai_tokenizer(self.model.config)
        if tokenizer.language is not None:  # the English vocabulary's prompt names neither
            tokenizer = dataclasses.replace(tokenizer, language=self.languages[row], task=task, special_tokens={})
        mel = torch.tensor(self.mel[row].T)
        return whisper.timing.find_alignment(self.peer, tokenizer, list(self.texts[row]), mel, FRAMES[row])


def _pair(config, languages, seed):
    peer = make_openai(seed, config)
    model, params, _ = from_openai(peer)
    tokenizer = WhisperTokenizer.from_file(tokenizer_file(config), config.vocab_size)
    texts = [tuple(tokenizer.encode(TEXTS[language])) for language in languages]
    mel = np.random.default_rng(seed).standard_normal((len(texts) + 1, 3000, config.num_mels)).astype(np.float32)
    return _Pair(peer, model, inference_params(params), tokenizer, mel, (*languages, "en"), (*texts, ()))


@pytest.fixture(scope="module")
def multilingual():
    return _pair(MULTILINGUAL, tuple(TEXTS), seed=0)


def _assert_equal(ours, theirs):
    assert [(t.word, t.tokens, t.start, t.end) for t in ours] == [
        (t.word, tuple(t.tokens), t.start, t.end) for t in theirs
    ]
    np.testing.assert_allclose([t.probability for t in ours], [t.probability for t in theirs], rtol=0, atol=1e-4)
    assert all(timing.start <= timing.end for timing in ours)


@pytest.mark.slow
def test_word_times_of_a_batch_equal_openai_whispers(multilingual):
    ours = multilingual.align()
    for row, timings in enumerate(ours):
        _assert_equal(timings, multilingual.expected(row))
    assert "".join(timing.word for timing in ours[0]) == TEXTS["en"]
    assert ours[-1] == []  # a row without text


def test_word_times_do_not_depend_on_the_batch(multilingual):
    together = multilingual.align()
    for row in range(3):
        _assert_equal(together[row], multilingual.align(slice(row, row + 1))[0])


def test_texts_durations_and_languages_share_one_program(multilingual, monkeypatch):
    multilingual.align(slice(0, 1))
    traced = []
    monkeypatch.setattr(word_timestamps, "teacher_forced", lambda *arguments: traced.append(arguments))
    for row, task in ((1, "transcribe"), (2, "translate"), (3, "transcribe"), (5, "transcribe")):
        multilingual.align(slice(row, row + 1), task=task)
    assert not traced


def test_word_times_of_a_translation_equal_openai_whispers(multilingual):
    (ours,) = multilingual.align(slice(1, 2), task="translate")
    _assert_equal(ours, multilingual.expected(1, "translate"))
    assert ours != multilingual.align(slice(1, 2))[0]


@pytest.mark.parametrize(
    ("config", "languages"),
    [(ENGLISH, ("en",)), (dataclasses.replace(V3, alignment_heads=((0, 1), (1, 0), (1, 1))), ("zh", "en"))],
    ids=["english", "v3"],
)
def test_word_times_of_other_vocabularies_and_heads_equal_openai_whispers(config, languages):
    pair = _pair(config, languages, seed=1)
    for row, timings in enumerate(pair.align()):
        _assert_equal(timings, pair.expected(row))


def test_heads_that_are_not_given_are_those_of_the_last_half(multilingual):
    assert multilingual.model.config.alignment_heads == ((1, 0), (1, 1))
    model = Whisper(dataclasses.replace(multilingual.model.config, alignment_heads=None))
    rows = slice(0, 1)
    assert multilingual.align(rows, model) == multilingual.align(rows)


def test_segments_of_a_random_model_equal_openai_whispers(multilingual):
    text, tokenizer = multilingual.texts[0], multilingual.tokenizer
    times = [tokenizer.timestamp_begin + step for step in (0, 300, 700)]
    segments = [
        _segment(500, 5.0, 11.0, (times[0], *text[:7], times[1])),
        _segment(500, 11.0, 19.0, (times[1], *text[7:], times[2])),
    ]
    alignment = multilingual.align(slice(0, 1))[0]
    ours = add_word_timestamps(segments, alignment, tokenizer=tokenizer, last_speech_s=4.5, **MARKS)
    theirs = _theirs(
        segments,
        model=multilingual.peer,
        tokenizer=dataclasses.replace(openai_tokenizer(MULTILINGUAL), language="en", special_tokens={}),
        mel=torch.tensor(multilingual.mel[0].T),
        num_frames=FRAMES[0],
        last_speech_timestamp=4.5,
        **MARKS,
    )
    for segment, (start, end, words) in zip(ours, theirs, strict=True):
        assert (segment.start, segment.end) == (start, end)
        assert [(word.word, word.start, word.end) for word in segment.words] == [word[:3] for word in words]


def test_words_of_a_single_frame_start_and_end_with_it(multilingual):
    memory = encode(multilingual.model, multilingual.params, jnp.asarray(multilingual.mel[:1]))
    (words,) = align_words(
        multilingual.model, multilingual.params, multilingual.tokenizer, memory, multilingual.texts[:1], [1], ["en"]
    )
    assert {(word.start, word.end) for word in words} == {(0.0, 0.0)}


@pytest.mark.parametrize(
    ("texts", "frames", "languages", "message"),
    [
        ([[5]], [3000, 3000], ["en"], r"one row for each of 1 windows, got 1, 2 and 1"),
        ([[5], [5]], [3000, 3000], ["en", "en"], r"one row for each of 1 windows, got 2, 2 and 2"),
        ([[5, 50257]], [3000], ["en"], r"row 0: token 50257 is not text, whose ids are below 50257"),
        ([[5, -1]], [3000], ["en"], r"row 0: token -1 is not text"),
        ([[5] * 444], [3000], ["en"], r"row 0: 444 tokens of text and 5 others do not fit .* 448 positions"),
        ([[5]], [0], ["en"], r"row 0: num_frames must be in 1..3000, got 0"),
        ([[5]], [3001], ["en"], r"row 0: num_frames must be in 1..3000, got 3001"),
    ],
)
def test_what_cannot_be_aligned_is_named(multilingual, texts, frames, languages, message):
    memory = encode(multilingual.model, multilingual.params, jnp.asarray(multilingual.mel[:1]))
    with pytest.raises(ValueError, match=message):
        align_words(multilingual.model, multilingual.params, multilingual.tokenizer, memory, texts, frames, languages)
