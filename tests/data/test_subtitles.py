"""Peer: openai-whisper's own writers, run on the same result."""

import itertools
import json
import pathlib
import random

import pytest
from whisper.utils import format_timestamp as published_timestamp
from whisper.utils import get_writer

from jaxaudio.data.subtitles import FORMATS, format_timestamp, format_transcript, write_transcript
from jaxaudio.data.transcripts import Segment, Span, Transcription, Word, to_dict, to_report_dict

ODD_TEXTS = (
    *(" -->", " a --> b", " tab\there", "", " ", " <b>&amp;", ' "q"', " 日本語", " 😀", " e\u0301\u2028x"),
    *(" line\nbreak", "\nfirst", " last\n", " \r\n", "\x1b\x00"),
)


def _word(text, start, duration):
    return Word(text, round(start, 2), round(start + duration, 2), 0.75)


def _segment(index, start, end, text, words=None):
    return Segment(index, 3000 * index, start, end, text, (50364, 5 + index, 50400), 0.2, -0.31, 1.25, 1e-7, words)


def _transcription(segments, language="en"):
    return Transcription("".join(segment.text for segment in segments), tuple(segments), language, 10_000.0)


def _random_transcription(seed, num_segments=8):
    """Segments of words with long and short pauses, odd texts, and times beyond an hour."""
    rng = random.Random(seed)
    start = rng.choice([0.0, 0.004, 59.9996, 3590.0, 360_000.0])
    segments = []
    for index in range(num_segments):
        words, first = [], start
        for _ in range(rng.choice([0, 1, 2, 7, 15])):
            start += rng.choice([0.0, 0.0, 0.3, 2.99, 3.0, 3.01, 9.0])
            text = rng.choice(ODD_TEXTS) if rng.random() < 0.15 else " " + "x" * rng.randrange(1, 14)
            words.append(_word(text, start, rng.choice([0.0, 0.12, 0.7])))
            start = words[-1].end
        segments.append(_segment(index, first, start, "".join(word.word for word in words), tuple(words)))
    return _transcription(segments)


def _without_words(transcription):
    return _transcription(
        [Segment(**{**vars(segment), "words": None}) for segment in transcription.segments], transcription.language
    )


def _assert_equal_files(transcription, folder, output_format="all", **options):
    """Both write all formats, or one, and the bytes are equal."""
    for name in ("ours", "theirs"):
        (folder / name).mkdir(exist_ok=True)
    get_writer(output_format, str(folder / "theirs"))(to_dict(transcription), "some/talk.v1.mp3", options)
    written = write_transcript(transcription, folder / "ours" / "talk.v1", output_format, **options)
    formats = FORMATS if output_format == "all" else (output_format,)
    assert [path.name for path in written] == [f"talk.v1.{name}" for name in formats]
    for path in written:
        assert path.read_bytes() == (folder / "theirs" / path.name).read_bytes(), (path.name, options)


@pytest.mark.parametrize("seed", range(5))
def test_files_equal_the_peer(tmp_path, seed):
    transcription = _random_transcription(seed)
    _assert_equal_files(transcription, tmp_path)
    _assert_equal_files(_without_words(transcription), tmp_path)
    for output_format in FORMATS:
        _assert_equal_files(transcription, tmp_path, output_format)


@pytest.mark.parametrize("seed", range(5))
def test_options_equal_the_peer(tmp_path, seed):
    transcription = _random_transcription(100 + seed)
    limits = [{}, {"max_line_width": 1}, {"max_line_width": 20}]
    limits += [{"max_line_width": width, "max_line_count": count} for width in (12, 42) for count in (1, 2, 3)]
    limits += [{"max_words_per_line": number} for number in (1, 3)] + [{"max_words_per_line": 4, "max_line_width": 10}]
    for options, highlight in itertools.product(limits, (False, True)):
        _assert_equal_files(transcription, tmp_path, **options, highlight_words=highlight)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_segments_equal_the_peer(tmp_path, text):
    segments = [_segment(0, 0.0, 1.5, text), _segment(1, 1.5, 1.5, ""), _segment(2, 3599.9994, 3600.9996, text)]
    _assert_equal_files(_transcription(segments, "zh"), tmp_path)


def test_empty_transcripts_equal_the_peer(tmp_path):
    _assert_equal_files(_transcription([]), tmp_path)
    _assert_equal_files(_transcription([_segment(0, 0.0, 0.0, "", ())]), tmp_path)
    _assert_equal_files(_transcription([]), tmp_path, max_line_width=10, highlight_words=True)


def test_an_emptied_segment_among_segments_without_words():
    """Emptied segments have an empty list of words; the peer's writers fail when the first segment is such a one."""
    segments = [_segment(0, 1.0, 1.0, "", ()), _segment(1, 1.0, 2.0, " hello")]
    with pytest.raises(KeyError):
        get_writer("srt", ".").write_result(to_dict(_transcription(segments)), file=None)
    assert format_transcript(_transcription(segments), "srt") == (
        "1\n00:00:01,000 --> 00:00:01,000\n\n\n2\n00:00:01,000 --> 00:00:02,000\nhello\n\n"
    )


def test_result_dict():
    words = (Word(" hi", 0.5, 1.0, 0.75),)
    transcription = Transcription(
        " hi",
        (_segment(0, 0.5, 1.0, " hi", words),),
        "en",
        2.0,
        (Span(0.0, 1.0, "window"),),
        (Span(1.0, 2.0, "silence"),),
    )
    assert json.dumps(to_dict(transcription)) == (
        '{"text": " hi", "segments": [{"id": 0, "seek": 0, "start": 0.5, "end": 1.0, "text": " hi", "tokens": '
        '[50364, 5, 50400], "temperature": 0.2, "avg_logprob": -0.31, "compression_ratio": 1.25, "no_speech_prob": '
        '1e-07, "words": [{"word": " hi", "start": 0.5, "end": 1.0, "probability": 0.75}]}], "language": "en"}'
    )
    report = to_report_dict(transcription)
    assert list(report) == ["text", "segments", "language", "duration_s", "heard", "skipped"]
    assert {name: report.pop(name) for name in ("duration_s", "heard", "skipped")} == {
        "duration_s": 2.0,
        "heard": [{"start_s": 0.0, "end_s": 1.0, "rule": "window"}],
        "skipped": [{"start_s": 1.0, "end_s": 2.0, "rule": "silence"}],
    }
    assert report == to_dict(transcription)
    assert "words" not in to_dict(_without_words(transcription))["segments"][0]


def test_timestamps_equal_the_peer():
    times = [0.0, 0.0005, 0.0015, 0.9994, 0.9996, 59.9995, 60.0, 3599.9996, 3600.0, 86399.5, 360_000.25]
    for seconds, hours, marker in itertools.product(times, (False, True), ".,"):
        assert format_timestamp(seconds, hours, marker) == published_timestamp(seconds, hours, marker)
    with pytest.raises(ValueError, match=r"0 or later; got -0\.5 s"):
        format_timestamp(-0.5)


def test_no_file_is_written_when_one_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"got -1\.0 s"):
        write_transcript(_transcription([_segment(0, -1.0, 2.0, " x")]), tmp_path / "talk", "all")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output_format", "options", "message"),
    [
        ("doc", {}, r"one of txt, vtt, srt, tsv, json; got 'doc'"),
        ("txt", {"max_line_width": 5}, r"'max_line_width': 5.*only act on subtitles, vtt and srt; got 'txt'"),
        ("json", {"highlight_words": True}, r"'highlight_words': True.*only act on subtitles.*got 'json'"),
        ("srt", {"max_line_width": 0}, r"max_line_width is at least 1; got 0"),
        ("srt", {"max_line_count": 2}, r"needs max_line_width.*'max_line_count': 2"),
        (
            "vtt",
            {"max_line_width": 9, "max_line_count": 2, "max_words_per_line": 3},
            r"max_words_per_line cannot act beside max_line_count.*'max_words_per_line': 3",
        ),
    ],
)
def test_option_errors(output_format, options, message):
    with pytest.raises(ValueError, match=message):
        format_transcript(_random_transcription(0), output_format, **options)


def test_options_need_words(tmp_path):
    transcription = _without_words(_random_transcription(0))
    with pytest.raises(ValueError, match=r"'max_words_per_line': 3.*word timestamps"):
        write_transcript(transcription, tmp_path / "talk", "all", max_words_per_line=3)
    assert list(pathlib.Path(tmp_path).iterdir()) == []
