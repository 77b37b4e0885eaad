import json
import os

import pytest

from jaxaudio.data.manifests import ManifestError, TimedText, Utterance, read_manifest, shard, write_manifest


def _write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_fields_and_defaults(tmp_path):
    absolute = str(tmp_path / "elsewhere" / "b.flac")
    path = _write(
        tmp_path / "list.jsonl",
        {"audio": "talks/a.wav"},
        "",
        {
            "audio": absolute,
            "text": "Guten Tag. Wie geht's?",
            "language": "de",
            "duration_s": 4,
            "segments": [
                {"start_s": 0, "end_s": 1.25, "text": "Guten Tag."},
                {"start_s": 1.25, "end_s": 3, "text": "Wie geht's?"},
            ],
            "task": "translate",
            "previous_text": "Früher.",
            "id": "b",
        },
        {"audio": "c.wav", "text": "", "language": None, "segments": [], "id": None},
        "",
    )
    assert read_manifest(path) == [
        Utterance(str(tmp_path / "talks" / "a.wav")),
        Utterance(
            absolute,
            "Guten Tag. Wie geht's?",
            "de",
            4.0,
            (TimedText(0.0, 1.25, "Guten Tag."), TimedText(1.25, 3.0, "Wie geht's?")),
            "translate",
            "Früher.",
            "b",
        ),
        Utterance(str(tmp_path / "c.wav"), text=""),
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "list.jsonl").write_bytes('\ufeff{"audio": "ä.wav"}\r\n{"audio": "b.wav"}\r\n'.encode())
    assert [os.path.basename(u.audio) for u in read_manifest(tmp_path / "list.jsonl")] == ["ä.wav", "b.wav"]


def test_what_is_written_is_read_back(tmp_path):
    utterances = [
        Utterance(str(tmp_path / "lists" / "a.wav"), text="", id="1"),
        Utterance(str(tmp_path / "lists" / "deep" / "b.wav"), "Häh?\n\u2028", "cy", 0.1, (TimedText(0.0, 0.1, "x"),)),
        Utterance(str(tmp_path / "elsewhere" / "c.wav"), task="translate", previous_text="So."),
    ]
    path = tmp_path / "lists" / "all.jsonl"
    write_manifest(utterances, path)
    assert read_manifest(path) == utterances
    fields = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert fields[0] == {"audio": "a.wav", "text": "", "id": "1"}
    assert fields[-1]["audio"] == str(tmp_path / "elsewhere" / "c.wav")
    (tmp_path / "lists").rename(tmp_path / "moved")  # files in the folder of the list move with it
    assert read_manifest(tmp_path / "moved" / "all.jsonl")[1].audio == str(tmp_path / "moved" / "deep" / "b.wav")


def test_a_relative_list_writes_paths_that_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_manifest([Utterance("sounds/a.wav")], "list.jsonl")
    assert json.loads((tmp_path / "list.jsonl").read_text()) == {"audio": os.path.join("sounds", "a.wav")}
    assert read_manifest("list.jsonl") == [Utterance(os.path.join("sounds", "a.wav"))]


SEGMENT = {"start_s": 1.0, "end_s": 2.0, "text": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio": "a.wav"', r"is not JSON \(.*\): '\{\"audio\": \"a\.wav\"'"),
        ("[1, 2]", r"is '\[1, 2\]'; expected an object"),
        ('{"audio": "a.wav", "audio": "b.wav"}', "audio: is there twice"),
        ({"text": "x"}, "audio: is missing"),
        ({"audio": None}, "audio: is missing"),
        ({"audio": ""}, "audio: is ''; expected the path"),
        ({"audio": 3}, "audio: is 3; expected a string"),
        ({"audio": "a", "txet": "hello"}, "txet: unknown field, 'hello'; the fields are audio, text, language"),
        ({"audio": "a", "text": ["x"]}, r"text: is \['x'\]; expected a string"),
        ({"audio": "a", "language": 1}, "language: is 1; expected a string"),
        ({"audio": "a", "id": 7}, "id: is 7; expected a string"),
        ({"audio": "a", "previous_text": 7}, "previous_text: is 7"),
        ({"audio": "a", "task": "transcibe"}, "task: is 'transcibe'; expected one of transcribe, translate"),
        ({"audio": "a", "duration_s": -2}, "duration_s: is -2; expected a positive number"),
        ({"audio": "a", "duration_s": 0}, "duration_s: is 0;"),
        ({"audio": "a", "duration_s": True}, "duration_s: is True"),
        ({"audio": "a", "duration_s": "3"}, "duration_s: is '3'"),
        ('{"audio": "a", "duration_s": NaN}', "duration_s: is nan"),
        ({"audio": "a", "segments": "x"}, "segments: is 'x'; expected a list"),
        ({"audio": "a", "segments": [3]}, r"segments\[0\]: is 3; expected an object"),
        ({"audio": "a", "segments": [{"start_s": 1, "text": ""}]}, r"segments\[0\]: end_s: is missing"),
        (
            {"audio": "a", "segments": [{**SEGMENT, "end": 2}]},
            r"segments\[0\]: end: unknown field, 2; .* start_s, end_s",
        ),
        ({"audio": "a", "segments": [{**SEGMENT, "text": None}]}, r"segments\[0\]: text: is None; expected a string"),
        ({"audio": "a", "segments": [{**SEGMENT, "start_s": -1}]}, r"segments\[0\]: start_s: is -1; expected .* 0 or"),
        ({"audio": "a", "segments": [{**SEGMENT, "end_s": 1.0}]}, r"segments\[0\]: end_s: is 1\.0 and start_s is 1\.0"),
        ('{"audio": "a", "segments": [{"start_s": 0, "end_s": Infinity, "text": ""}]}', r"end_s: is inf"),
        (
            {"audio": "a", "segments": [SEGMENT, {**SEGMENT, "start_s": 1.5, "end_s": 3}]},
            r"segments\[1\]: start_s: is 1\.5, before the end of the segment before it, 2\.0",
        ),
        (
            {"audio": "a", "segments": [SEGMENT, {"start_s": 0, "end_s": 0.5, "text": ""}]},
            r"segments\[1\]: start_s: is 0\.0, before",
        ),
        ({"audio": "a", "id": "first"}, "id: 'first' is that of line 1 too"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = _write(tmp_path / "list.jsonl", {"audio": "a.wav", "id": "first"}, "", line)
    with pytest.raises(ManifestError, match=rf"list\.jsonl:3: .*{message}"):
        read_manifest(path)


def test_long_values_are_shortened_in_messages(tmp_path):
    path = _write(tmp_path / "list.jsonl", {"audio": "a", "sentence": "word " * 1000})
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert len(str(caught.value)) < 400


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ManifestError, match=r"missing\.jsonl: there is no such file"):
        read_manifest(tmp_path / "missing.jsonl")
    with pytest.raises(ManifestError, match="there is no such file"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match=r"empty\.jsonl: has no utterances"):
        read_manifest(_write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes('{"audio": "a"}\n{"audio": "ä"}'.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"latin\.jsonl:2: is not UTF-8"):
        read_manifest(tmp_path / "latin.jsonl")


def test_audio_that_is_not_there_is_an_error_if_asked(tmp_path):
    (tmp_path / "a.wav").touch()
    path = _write(tmp_path / "list.jsonl", {"audio": "a.wav"}, {"audio": "b.wav"})
    assert len(read_manifest(path)) == 2
    with pytest.raises(ManifestError, match=r"list\.jsonl:2: audio: there is no file '.*b\.wav'"):
        read_manifest(path, check_audio=True)


@pytest.mark.parametrize(
    ("utterances", "message"),
    [
        ([], "there are no utterances to write"),
        ([Utterance("a"), Utterance("b", duration_s=-1.0)], r"utterance 2: duration_s: is -1\.0"),
        ([Utterance("a", segments=(TimedText(2.0, 1.0, ""),))], r"utterance 1: segments\[0\]: end_s: is 1\.0"),
        ([Utterance("a", id="x"), Utterance("b", id="x")], "utterance 2: id: 'x' is there twice"),
        ([Utterance("a", task="sing")], "task: is 'sing'"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, utterances, message):
    with pytest.raises(ManifestError, match=message):
        write_manifest(utterances, tmp_path / "list.jsonl")
    assert not (tmp_path / "list.jsonl").exists()


def test_shards_are_disjoint_and_hold_everything():
    for num_items in (0, 1, 7, 12):
        items = list(range(num_items))
        for count in (1, 3, 5, 13):
            shards = [shard(items, index, count) for index in range(count)]
            assert sorted(sum(shards, [])) == items
            assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert shard("abcdefg", 1, 3) == ["b", "e"]


@pytest.mark.parametrize(("index", "count"), [(3, 3), (-1, 3), (0, 0), (4, 2)])
def test_a_share_of_no_process_is_an_error(index, count):
    with pytest.raises(ValueError, match=f"index={index} of count={count}"):
        shard([1, 2, 3], index, count)
