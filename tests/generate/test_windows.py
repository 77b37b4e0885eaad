"""One file's algorithm against openai-whisper's `transcribe`: the same scripted model on both sides."""

import numpy as np
import pytest

from jaxaudio.data.transcripts import to_dict
from jaxaudio.generate.word_timestamps import WordTiming
from tests.generate.scripted_whisper import (
    BEGIN,
    TOKENIZER,
    Answer,
    Scripted,
    no_words,
    openai_transcribe,
)

HELLO = tuple(TOKENIZER.encode(" Hello there"))
WORLD = tuple(TOKENIZER.encode(" wide world."))
SECOND = 100  # frames


def at(seconds: float) -> int:
    """The timestamp's id."""
    return BEGIN + round(seconds / 0.02)


def compare(monkeypatch, script, num_frames, align=no_words, **options):
    """Both transcriptions are equal, in their result and in all that they asked the model; ours is returned."""
    shared = {"language": "en", **options}
    theirs = {name: list(value) if name == "prefix" else value for name, value in shared.items()}
    expected, expected_questions = openai_transcribe(monkeypatch, script, align, num_frames, **theirs)
    scripted = Scripted(monkeypatch, script, align)
    result = scripted.transcribe(num_frames, **shared)
    assert [question for _, question in scripted.asked] == expected_questions
    assert to_dict(result) == expected
    check_coverage(result)
    return result


def check_coverage(result):
    """What was heard and what was skipped tile the audio."""
    spans = sorted((*result.heard, *result.skipped), key=lambda span: span.start_s)
    edges = [span.start_s for span in spans] + [result.duration_s]
    assert edges[0] == 0.0
    assert [span.end_s for span in spans] == edges[1:]
    assert all(span.start_s < span.end_s for span in spans)


def by_seek(answers: dict[int, Answer]):
    """A script that looks at the window's place only."""
    return lambda question: answers[question.seek]


PAIRS = (at(0), *HELLO, at(2), at(2.5), *WORLD, at(7), at(7))  # and the beginning of a third segment
CLOSED = (at(0.5), *HELLO, at(3), at(4), *WORLD, at(9))


def test_several_segments_per_window(monkeypatch):
    script = by_seek({0: Answer(PAIRS + HELLO), 700: Answer(PAIRS), 1400: Answer((at(0), *WORLD, at(8)))})
    result = compare(monkeypatch, script, 4000)
    assert [segment.start for segment in result.segments] == [0.0, 2.5, 7.0, 9.5, 14.0]
    assert [(span.start_s, span.end_s) for span in result.heard] == [(0.0, 40.0)]


def test_a_single_timestamp_at_the_end_closes_the_window(monkeypatch):
    script = by_seek({0: Answer(CLOSED), 3000: Answer((*HELLO, at(1)))})
    result = compare(monkeypatch, script, 4321)
    assert [segment.seek for segment in result.segments] == [0, 0, 3000]


@pytest.mark.parametrize(
    "tokens",
    [
        HELLO,
        (at(0), *HELLO),
        (at(1), *HELLO),
        (at(0), *HELLO, at(5.5)),
        (at(3),),
        (),
        (at(1), 220, at(2), at(2), *HELLO, at(2), at(2)),  # a blank segment and one without duration
    ],
    ids=["no timestamps", "zero", "first", "closed", "time alone", "nothing", "blank"],
)
def test_windows_without_pairs_or_without_text(monkeypatch, tokens):
    compare(monkeypatch, lambda question: Answer(tokens), 7000)


def test_silence_is_skipped(monkeypatch):
    silence = Answer(PAIRS, no_speech_prob=0.9, avg_logprob=-1.5)
    result = compare(monkeypatch, by_seek({0: Answer(CLOSED), 3000: silence, 6000: Answer(CLOSED)}), 6500)
    assert [(span.start_s, span.end_s, span.rule) for span in result.skipped] == [(30.0, 60.0, "no_speech")]
    assert [(span.start_s, span.end_s) for span in result.heard] == [(0.0, 30.0), (60.0, 65.0)]


def test_a_probable_text_is_no_silence(monkeypatch):
    result = compare(monkeypatch, lambda question: Answer(CLOSED, no_speech_prob=0.9, avg_logprob=-0.9), 3000)
    assert len(result.segments) == 2


@pytest.mark.parametrize(
    ("no_speech_threshold", "logprob_threshold"), [(None, -1.0), (0.6, None), (None, None), (0.95, -1.0)]
)
def test_thresholds_can_be_off(monkeypatch, no_speech_threshold, logprob_threshold):
    options = {"no_speech_threshold": no_speech_threshold, "logprob_threshold": logprob_threshold}
    compare(monkeypatch, lambda question: Answer(CLOSED, no_speech_prob=0.9, avg_logprob=-1.5), 6000, **options)


@pytest.mark.parametrize(
    ("bad", "num_attempts"),
    [
        ({"compression_ratio": 2.41}, 3),
        ({"avg_logprob": -1.01}, 3),
        ({"avg_logprob": -1.01, "no_speech_prob": 0.61}, 1),  # silence: the failure does not count
        ({"compression_ratio": 2.41, "avg_logprob": -1.01, "no_speech_prob": 0.61}, 1),
        ({"compression_ratio": 2.4, "avg_logprob": -1.0}, 1),
    ],
)
def test_fallback(monkeypatch, bad, num_attempts):
    def script(question):
        return Answer(CLOSED) if question.temperature >= 0.4 else Answer(HELLO, **bad)

    result = compare(monkeypatch, script, 3000)
    assert [segment.temperature for segment in result.segments[:1]] == (
        [0.4] if num_attempts == 3 else [0.0][: len(result.segments)]
    )


def test_the_last_temperature_is_kept_even_if_it_fails(monkeypatch):
    result = compare(monkeypatch, lambda question: Answer(CLOSED, compression_ratio=3.0), 3000, temperature=(0.0, 0.3))
    assert {segment.temperature for segment in result.segments} == {0.3}
    compare(monkeypatch, lambda question: Answer(CLOSED, compression_ratio=3.0), 3000, temperature=0.7)


@pytest.mark.parametrize("condition_on_previous_text", [True, False])
@pytest.mark.parametrize("hot_window", [None, 700, 1400])
def test_previous_text_is_the_prompt_until_a_hot_window(monkeypatch, condition_on_previous_text, hot_window):
    def script(question):
        is_bad = question.seek == hot_window and question.temperature < 0.6
        return Answer(PAIRS, avg_logprob=-2.0 if is_bad else -0.5)

    options = {"condition_on_previous_text": condition_on_previous_text}
    compare(monkeypatch, script, 4000, initial_prompt=" Mister Quilter ", **options)


def test_half_a_degree_does_not_reset_the_prompt(monkeypatch):
    compare(monkeypatch, lambda question: Answer(PAIRS), 3000, temperature=0.5)


def test_prompt_reset_on_temperature(monkeypatch):
    scripted = Scripted(monkeypatch, lambda question: Answer(PAIRS))
    scripted.transcribe(1400, language="en", temperature=0.3, prompt_reset_on_temperature=0.2)
    assert [question.prompt for _, question in scripted.asked] == [(), ()]


@pytest.mark.parametrize("condition_on_previous_text", [True, False])
@pytest.mark.parametrize("carry_initial_prompt", [True, False])
def test_initial_prompt_of_many_windows(monkeypatch, carry_initial_prompt, condition_on_previous_text):
    tokens = (at(0), *HELLO * 10, at(5), at(5), *WORLD * 9, at(6), at(6))  # 223 tokens are full after some windows
    compare(
        monkeypatch,
        lambda question: Answer(tokens),
        8000,
        initial_prompt="Names: Ortega, Quilter, Stanislaw.",
        carry_initial_prompt=carry_initial_prompt,
        condition_on_previous_text=condition_on_previous_text,
    )


def test_silent_windows_keep_the_initial_prompt(monkeypatch):
    script = by_seek({0: Answer((), no_speech_prob=0.9, avg_logprob=-2.0), 3000: Answer(PAIRS), 3700: Answer(CLOSED)})
    compare(monkeypatch, script, 4000, initial_prompt="Names", condition_on_previous_text=False)


def test_prefix_is_in_every_window(monkeypatch):
    compare(monkeypatch, lambda question: Answer(PAIRS), 2000, prefix=HELLO)
    scripted = Scripted(monkeypatch, lambda question: Answer(PAIRS))
    scripted.transcribe(2000, language="en", prefix="  Hello there ")
    assert {question.prefix for _, question in scripted.asked} == {HELLO}


@pytest.mark.parametrize(
    "clip_timestamps",
    ["", "0", "7.5", "0,12", "3,9.999,20", "2,4,5,6,50,62.345", "1.005,1.015,2.025", "30,60"],
)
def test_clip_timestamps(monkeypatch, clip_timestamps):
    result = compare(
        monkeypatch,
        lambda question: Answer(PAIRS if question.num_frames > 700 else HELLO),
        7000,
        clip_timestamps=clip_timestamps,
    )
    assert {span.rule for span in result.skipped} <= {"clip_timestamps"}
    as_numbers = [float(number) for number in clip_timestamps.split(",") if number]
    scripted = Scripted(monkeypatch, lambda question: Answer(HELLO))
    assert scripted.transcribe(7000, language="en", clip_timestamps=tuple(as_numbers)).heard == result.heard


@pytest.mark.parametrize("num_frames", [1, 99, 2999, 3000, 3001, 6000])
def test_any_length(monkeypatch, num_frames):
    compare(monkeypatch, lambda question: Answer(HELLO), num_frames)


@pytest.mark.parametrize("num_frames", [500, 5000])
def test_language_is_detected_from_the_first_window(monkeypatch, num_frames):
    result = compare(monkeypatch, lambda question: Answer(HELLO), num_frames, language=None)
    assert result.language == "de"
    assert compare(monkeypatch, lambda question: Answer(HELLO), num_frames, language="fr").language == "fr"


# A word's text with its duration and probability: an ordinary one, and three that look invented.
USUAL, FAINT, SHORT, LONG = (0.3, 0.9), (0.2, 0.05), (0.01, 0.1), (4.5, 0.9)


def words_at(*words):
    """Timings of one token each from (start in its window, (duration, probability))."""
    return [
        WordTiming(f" word{index}", (HELLO[0],), start, start + duration, probability)
        for index, (start, (duration, probability)) in enumerate(words)
    ]


def text(num_words: int) -> tuple[int, ...]:
    return HELLO[:1] * num_words


HALLUCINATIONS = {
    "nothing suspicious": [words_at((1.0, USUAL), (1.5, USUAL), (5.0, USUAL), (5.5, USUAL))],
    "the end is near": [words_at((1.0, USUAL), (1.5, USUAL), (28.0, USUAL), (28.7, USUAL))],
    "silence before the first": [words_at((6.0, FAINT), (6.5, SHORT), (8.0, USUAL), (8.5, USUAL))],
    "between silences": [words_at((0.5, USUAL), (1.0, USUAL), (9.0, FAINT), (9.2, SHORT))],
    "a first one at the start": [words_at((0.2, FAINT), (0.4, SHORT), (9.0, USUAL), (9.5, USUAL))],
    "two in a row": [words_at((0.5, LONG), (5.0, LONG), (10.0, FAINT), (10.3, SHORT))],
    "no words": [[]],
}


@pytest.mark.parametrize("threshold", [None, 2.0])
@pytest.mark.parametrize("timings", HALLUCINATIONS.values(), ids=HALLUCINATIONS)
@pytest.mark.parametrize("num_frames", [3000, 3900, 5100])
@pytest.mark.parametrize("ends", ["pairs", "closed", "no timestamps"])
def test_word_timestamps_and_hallucinations(monkeypatch, ends, num_frames, timings, threshold):
    tokens = {
        "pairs": (at(0.5), *text(2), at(3), at(4), *text(2), at(10), at(10)),
        "closed": (at(0.5), *text(2), at(3), at(4), *text(2), at(10)),
        "no timestamps": text(4),
    }[ends]

    def align(seek, tokens):  # the words only once, so that a window that is decoded again gives something else
        return timings[0] if seek in (0, 3000) else words_at((1.0, USUAL), (1.5, USUAL), (2.0, USUAL), (2.5, USUAL))

    compare(
        monkeypatch,
        lambda question: Answer(tokens),
        num_frames,
        align,
        word_timestamps=True,
        hallucination_silence_threshold=threshold,
    )


def test_hallucinations_are_in_the_coverage(monkeypatch):
    def align(seek, tokens):
        invented = words_at((6.0, FAINT), (6.5, SHORT), (12.0, USUAL), (12.5, USUAL))
        return invented if seek == 0 else words_at((1.0, USUAL), (1.5, USUAL), (28.5, FAINT), (28.7, SHORT))

    tokens = (at(0.5), *text(2), at(3), at(28), *text(2), at(29))
    options = {"word_timestamps": True, "hallucination_silence_threshold": 2.0}
    result = compare(monkeypatch, lambda question: Answer(tokens), 3600, align, **options)
    skipped = [(span.start_s, span.end_s, span.rule) for span in result.skipped]
    assert skipped == [(0.0, 6.0, "hallucination_silence"), (34.5, 36.0, "hallucination_silence")]
    assert [segment.text for segment in result.segments] == [" Hello Hello"]


def pick(rng, *values):
    return values[rng.integers(len(values))]


def random_case(seed):
    """A script, an alignment and options, all drawn from a seed and from what is asked."""
    case = np.random.default_rng(seed)
    vocabulary = [220, 11, 13, *HELLO, *WORLD, *TOKENIZER.encode(" 12, “quoted” (in brackets)! Why? ß 日本")]

    def answer(question):
        rng = np.random.default_rng([seed, question.seek, round(10 * question.temperature), *question.prompt[-5:]])
        times = np.sort(rng.integers(1, max(2, question.num_frames // 2), size=2 * rng.integers(0, 5)))
        tokens = []
        for start, end in times.reshape(-1, 2):
            tokens += [BEGIN + int(start), *rng.choice(vocabulary, size=rng.integers(1, 6)).tolist(), BEGIN + int(end)]
        kind = rng.integers(4)
        if kind == 1:
            tokens = [*tokens, *tokens[-1:], *rng.choice(vocabulary, size=rng.integers(0, 4)).tolist()]
        elif kind == 2:
            tokens = [token for token in tokens if token < BEGIN]
        elif kind == 3:
            tokens = tokens[1:]
        return Answer(
            tuple(tokens),
            avg_logprob=pick(rng, -0.3, -0.9, -1.0, -1.3),
            no_speech_prob=pick(rng, 0.0, 0.5, 0.6, 0.7),
            compression_ratio=pick(rng, 1.1, 2.4, 2.5),
        )

    def align(seek, tokens):
        rng = np.random.default_rng([seed, seek, len(tokens)])
        timings, time, rest = [], pick(rng, 0.0, 0.5, 3.0), list(tokens)
        while rest:
            group = rest[: rng.integers(1, 4)]
            del rest[: len(group)]
            duration = pick(rng, 0.0, 0.02, 0.2, 0.2, 0.34, 0.34, 1.2, 3.0)
            start = time + pick(rng, 0.0, 0.0, 0.0, 0.1, 3.5)
            time = start + duration
            probability = pick(rng, 0.05, 0.5, 0.95)
            timings.append(WordTiming(TOKENIZER.decode(group), tuple(group), start, time, probability))
        return timings

    word_timestamps = bool(case.random() < 0.6)
    options = {
        "temperature": pick(case, (0.0, 0.4, 0.8), (0.2, 0.6), (0.0,)),
        "condition_on_previous_text": bool(case.random() < 0.7),
        "initial_prompt": "Names: Ortega." if case.random() < 0.4 else None,
        "clip_timestamps": pick(case, "0", "1.5", "2,40,41,41.2,55"),
        "compression_ratio_threshold": pick(case, None, 2.4),
        "logprob_threshold": pick(case, None, -1.0),
        "no_speech_threshold": pick(case, None, 0.6),
        "word_timestamps": word_timestamps,
        "hallucination_silence_threshold": pick(case, None, 0.5, 2.0) if word_timestamps else None,
    }
    options["carry_initial_prompt"] = options["initial_prompt"] is not None and bool(case.random() < 0.5)
    return answer, align, int(case.integers(5600, 9000)), options


@pytest.mark.parametrize("seed", range(50))
def test_random_scripts(monkeypatch, seed):
    answer, align, num_frames, options = random_case(seed)
    compare(monkeypatch, answer, num_frames, align, **options)


def test_a_window_that_leads_nowhere_is_left(monkeypatch):
    scripted = Scripted(monkeypatch, lambda question: Answer((at(0), at(0), *HELLO)))  # openai-whisper never returns
    result = scripted.transcribe(4000, language="en")
    assert [question.seek for _, question in scripted.asked] == [0, 3000]
    check_coverage(result)
