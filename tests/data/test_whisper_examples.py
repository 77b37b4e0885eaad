import pathlib

import numpy as np
import pytest
import whisper

from jaxaudio.data.byte_pair import BytePairEncoding
from jaxaudio.data.manifests import TimedText, Utterance
from jaxaudio.data.whisper_examples import Window, cut_windows, spaced, token_row, window_tokens
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer

# Ids by hand: 256 bytes, then these.
EOT, SOT, EN, ZH, TRANSLATE, TRANSCRIBE, _, PREV, NO_SPEECH, NO_TIMESTAMPS, BEGIN = range(256, 267)
A, B, C = (list(f" {letter}".encode()) for letter in "abc")


@pytest.fixture(scope="module")
def tokenizer():
    """No merges, two languages, a window of 2 s."""
    return WhisperTokenizer.for_ranks(BytePairEncoding(tuple(bytes([i]) for i in range(256))), ("en", "zh"), 101)


@pytest.fixture(scope="module")
def public():
    path = pathlib.Path(whisper.__file__).parent / "assets" / "multilingual.tiktoken"
    return WhisperTokenizer.from_file(path, vocab_size=51865)


def timed(*spans):
    return tuple(TimedText(*span) for span in spans)


TWO = Window(0.0, timed((0.0, 0.5, "a"), (0.72, 1.0, "b")))
CUT = Window(
    0.0,
    timed(
        (0.0, 0.5, "a"),
    ),
    cut_start_s=1.8,
)


@pytest.mark.parametrize(
    ("window", "options", "expected"),
    [
        (TWO, {}, [SOT, EN, TRANSCRIBE, BEGIN, *A, BEGIN + 25, BEGIN + 36, *B, BEGIN + 50, EOT]),
        (TWO, {"timestamps": False}, [SOT, EN, TRANSCRIBE, NO_TIMESTAMPS, *A, *B, EOT]),
        (TWO, {"task": "translate", "timestamps": False}, [SOT, EN, TRANSLATE, NO_TIMESTAMPS, *A, *B, EOT]),
        (TWO, {"language": "zh", "timestamps": False}, [SOT, ZH, TRANSCRIBE, NO_TIMESTAMPS, *b"ab", EOT]),
        # The segment that the end cuts gives its start alone; without times, nothing.
        (CUT, {}, [SOT, EN, TRANSCRIBE, BEGIN, *A, BEGIN + 25, BEGIN + 90, EOT]),
        (CUT, {"timestamps": False}, [SOT, EN, TRANSCRIBE, NO_TIMESTAMPS, *A, EOT]),
        (Window(0.0, (), 0.3), {}, [SOT, EN, TRANSCRIBE, BEGIN + 15, EOT]),
        (Window(0.0, (), 0.3), {"timestamps": False}, [SOT, NO_SPEECH, EOT]),
        (Window(0.0, ()), {}, [SOT, NO_SPEECH, EOT]),
        (Window(0.0, ()), {"timestamps": False}, [SOT, NO_SPEECH, EOT]),
        (Window(0.0, timed((0.0, 2.0, "a")), timed=False), {"timestamps": False},
         [SOT, EN, TRANSCRIBE, NO_TIMESTAMPS, *A, EOT]),
        (Window(0.0, timed((0.0, 2.0, " a "))), {}, [SOT, EN, TRANSCRIBE, BEGIN, *A, BEGIN + 100, EOT]),
    ],
)  # fmt: skip
def test_tokens_by_hand(tokenizer, window, options, expected):
    assert window_tokens(tokenizer, window, **{"language": "en", "timestamps": True} | options) == expected


def test_an_english_vocabulary_has_neither_language_nor_task():
    tokenizer = WhisperTokenizer.for_ranks(BytePairEncoding(tuple(bytes([i]) for i in range(256))), (), 101)
    # eot 256, sot 257, translate 258 ... notimestamps 263, times from 264
    assert window_tokens(tokenizer, TWO, language=None, timestamps=True) == [
        257, 264, *A, 289, 300, *B, 314, 256,
    ]  # fmt: skip


def test_tokens_of_the_public_vocabulary(public):
    window = Window(0.0, timed((0.5, 2.26, "And so my fellow Americans")), cut_start_s=29.98)
    tokens = window_tokens(public, window, language="en", timestamps=True)
    # specs of the release: sot 50258, en 50259, transcribe 50359, times from 50364, eot 50257
    assert tokens == [50258, 50259, 50359, 50364 + 25, 400, 370, 452, 7177, 6280, 50364 + 113, 50364 + 1499, 50257]


def test_dropout_spells_the_text_in_other_ways(public):
    window = Window(0.0, timed((0.0, 1.0, "And so my fellow Americans")))
    rng = np.random.default_rng(0)
    plain, dropped = (
        window_tokens(public, window, language="en", timestamps=True, dropout=rate, rng=rng) for rate in (0.0, 0.5)
    )
    assert len(dropped) > len(plain)
    assert public.decode(dropped[4:-2]) == public.decode(plain[4:-2]) == " And so my fellow Americans"


def test_a_row_is_shifted_once_and_only_the_previous_text_is_masked(tokenizer):
    tokens = window_tokens(tokenizer, CUT, language="en", timestamps=False)
    row = token_row(tokenizer, tokens, text_length=12, previous=[*B, *C])
    inputs = [PREV, *B, *C, SOT, EN, TRANSCRIBE, NO_TIMESTAMPS, *A]
    np.testing.assert_array_equal(row["inputs"], [*inputs, EOT])  # padding
    np.testing.assert_array_equal(row["targets"], [*inputs[1:], EOT, EOT])
    #                        B      C     sot ...                          eot   padding
    np.testing.assert_array_equal(row["mask"], [False] * 4 + [True] * 7 + [False])
    assert row["inputs"].dtype == row["targets"].dtype == np.int32

    row = token_row(tokenizer, [SOT, NO_SPEECH, EOT], text_length=4)
    np.testing.assert_array_equal(row["inputs"], [SOT, NO_SPEECH, EOT, EOT])
    np.testing.assert_array_equal(row["targets"], [NO_SPEECH, EOT, EOT, EOT])
    np.testing.assert_array_equal(row["mask"], [True, True, False, False])


@pytest.mark.parametrize(
    ("num_own", "num_previous", "num_kept"),
    [(10, 300, 223), (10, 223, 223), (10, 222, 222), (226, 300, 222), (448, 300, 0), (449, 300, 0), (447, 300, 1)],
)
def test_the_previous_text_keeps_its_last_223_tokens_or_what_has_room(tokenizer, num_own, num_previous, num_kept):
    own = [SOT, *[97] * (num_own - 2), EOT]
    previous = list(range(1, num_previous + 1))
    row = token_row(tokenizer, own, text_length=448, previous=[token % 250 for token in previous])
    whole = ([PREV, *[token % 250 for token in previous[-num_kept:]]] if num_kept else []) + own
    np.testing.assert_array_equal(row["inputs"][: len(whole) - 1], whole[:-1])
    np.testing.assert_array_equal(row["targets"][: len(whole) - 1], whole[1:])
    assert row["mask"].sum() == len(own) - (not num_kept)


def test_a_text_that_is_too_long_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="450 tokens with eot, but the decoder holds 449"):
        token_row(tokenizer, [SOT] * 450, text_length=448)


def test_times_must_be_known_and_inside_the_window(tokenizer):
    untimed = Window(0.0, timed((0.0, 2.0, "a")), timed=False)
    with pytest.raises(ValueError, match="the text 'a' has no times"):
        window_tokens(tokenizer, untimed, language="en", timestamps=True)
    late = Window(0.0, timed((0.0, 2.04, "a")))
    with pytest.raises(ValueError, match="time 2.04 s is outside the window, whose timestamps are 0 to 2.0 s"):
        window_tokens(tokenizer, late, language="en", timestamps=True)


def test_a_recording_is_cut_where_decoding_would_seek_to():
    spans = timed((1.0, 9.0, "a"), (10.0, 19.5, "b"), (19.5, 20.0, "c"), (28.0, 35.0, "d"), (75.012, 80.0, "e"))
    utterance = Utterance("x.wav", segments=spans, previous_text=" before ", language="en")
    first, second, third, fourth = cut_windows(utterance, 100.0)
    assert first == Window(0.0, timed((1.0, 9.0, "a"), (10.0, 19.5, "b"), (19.5, 20.0, "c")), 28.0, True, "before")
    assert second == Window(28.0, timed((0.0, 7.0, "d")), None, True, "before a b c")
    # 58 to 88 s holds the last segment, whose start is rounded to 75.02.
    assert third == Window(58.0, timed((17.02, 22.0, "e")), None, True, "before a b c d")
    assert fourth == Window(88.0, (), None, True, "before a b c d e")
    assert [window.is_speech() for window in (first, second, third, fourth)] == [True, True, True, False]


@pytest.mark.parametrize("seed", range(3))
def test_windows_lose_no_segment_and_no_second(seed):
    """Against the segments themselves: every one is whole in exactly one window, and the windows cover the audio."""
    rng = np.random.default_rng(seed)
    edges = np.cumsum(rng.integers(1, 900, 80)) / 50  # whole ticks, gaps and segments up to 18 s
    spans = [TimedText(a, b, f"w{i}") for i, (a, b) in enumerate(zip(edges[::2], edges[1::2], strict=True))]
    duration_s = edges[-1] + 40
    windows = cut_windows(Utterance("x.wav", segments=tuple(spans), language="en"), duration_s, 30.0)
    heard = [
        (window.start_s + segment.start_s, window.start_s + segment.end_s, segment.text)
        for window in windows
        for segment in window.segments
    ]
    np.testing.assert_allclose([row[:2] for row in heard], [(s.start_s, s.end_s) for s in spans], atol=1e-6)
    assert [row[2] for row in heard] == [span.text for span in spans]
    for window, after in zip(windows, windows[1:], strict=False):
        end = 30.0 if window.cut_start_s is None else window.cut_start_s
        assert after.start_s == pytest.approx(window.start_s + end)
        assert after.previous_text == " ".join([window.previous_text, *(s.text for s in window.segments)]).strip()
    assert windows[-1].start_s + 30 >= duration_s
    assert not any(s.start_s < w.start_s < s.end_s for w in windows for s in spans)


def test_a_text_without_times_is_one_window():
    assert cut_windows(Utterance("x.wav", text="a b"), 12.0) == (
        Window(0.0, timed((0.0, 12.0, "a b")), None, False, ""),
    )
    assert [window.segments for window in cut_windows(Utterance("x.wav", text=""), 40.0)] == [(), ()]
    with pytest.raises(ValueError, match=r"x.wav: 31.00 s with a text but no segments, a window has 30.00 s"):
        cut_windows(Utterance("x.wav", text="a"), 31.0)


@pytest.mark.parametrize(
    ("span", "match"),
    [
        ((1.0, 2.0, "  "), "segment 1, 1.0 to 2.0 s, has no text"),
        ((1.0, 1.005, "b"), "segment 1, 1.0 to 1.005 s, is shorter than 0.02 s"),
        ((0.5, 2.0, "b"), "segment 1, 0.5 to 2.0 s, begins before the one before it ends"),
        ((1.0, 32.0, "b"), "segment 1, 1.0 to 32.0 s, is longer than a window of 30.0 s"),
        ((39.0, 41.0, "b"), "segment 1, 39.0 to 41.0 s, ends after the audio of 40.0 s"),
    ],
)
def test_segments_that_cannot_be_cut(span, match):
    with pytest.raises(ValueError, match=match):
        cut_windows(Utterance("x.wav", segments=timed((0.0, 1.0, "a"), span)), 40.0)


def test_audio_ends_before_a_cut_segment_only_without_times():
    assert CUT.num_samples(timestamps=True, sample_rate=16000, window_s=2.0) == 32000
    assert CUT.num_samples(timestamps=False, sample_rate=16000, window_s=2.0) == 28800
    assert TWO.num_samples(timestamps=False, sample_rate=16000, window_s=2.0) == 32000


def test_words_stand_behind_a_space_where_the_language_has_spaces():
    assert spaced(" a b ", "en") == " a b"
    assert spaced(" 你好 ", "zh") == "你好"
