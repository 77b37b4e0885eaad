"""Lines that are appended, torn, read again and put in order."""

import json

import pytest

from jaxaudio.data.result_lines import ResultLog, append_result, read_results, write_results


def test_lines_are_those_of_json(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_results(path) == []
    results = [{"index": 1, "text": "Grüße\u2028\n"}, {"index": 0, "x": 0.1 + 0.2, "spans": [[1, 2]]}]
    for result in results:
        append_result(path, result)
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == results
    assert read_results(path) == results
    write_results(path, sorted(results, key=lambda result: result["index"]))
    assert read_results(path) == results[::-1]
    assert path.stat().st_size == len(path.read_bytes())


def test_a_torn_last_line_is_cut_off(tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    for result in ({"text": "eins"}, {"text": "zwei ü"}):
        append_result(whole, result)
    content = whole.read_bytes()
    second = content.index(b"\n") + 1
    for size in range(len(content)):
        torn.write_bytes(content[:size])
        assert read_results(torn) == [{"text": "eins"}][: size >= second]
        assert torn.read_bytes() == content[: second * (size >= second)]
    append_result(torn, {"text": "zwei ü"})
    assert torn.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"a": 1}\n{"a": \n', r"a.jsonl:2: is not JSON"), ("[1]\n", r"a.jsonl:1: expected a JSON object, got b'\[1\]'")],
)
def test_a_damaged_line_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "a.jsonl")


ITEMS = {0: {"audio": "a.wav"}, 2: {"audio": "b.wav"}, 5: {"audio": "c.wav"}}


def log(path, items=ITEMS, **settings):
    return ResultLog(path, items, {"beam_size": 5, "temperature": (0.0, 0.2)} | settings)


def test_a_log_goes_on_and_ends_in_order(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    first = log(path)
    first.add(5, {"text": "drei"})
    first.add(0, {"text": "eins"})
    with path.open("ab") as file:
        file.write(b'{"index": 2, "au')  # killed while it wrote
    second = log(path)
    assert 5 in second
    assert 2 not in second
    second.add(2, {"text": "zwei"})
    second.add(0, {"text": "Eins"})
    second.sort()
    assert read_results(path) == [
        {"index": 0, "audio": "a.wav", "text": "Eins"},
        {"index": 2, "audio": "b.wav", "text": "zwei"},
        {"index": 5, "audio": "c.wav", "text": "drei"},
    ]
    assert log(path).results == read_results(path)


def test_a_log_of_another_run_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    log(path, beam_size=2)
    log(path).add(2, {"text": "zwei"})  # nothing was there yet
    with pytest.raises(ValueError, match="beam_size 5 there, None now; seed None there, 7 now"):
        log(path, beam_size=None, seed=7)
    with pytest.raises(ValueError, match=r"item 2, {'audio': 'b.wav'}; now that is {'audio': 'x.wav'}"):
        log(path, {2: {"audio": "x.wav"}})
    with pytest.raises(ValueError, match="item 2, which the list does not have"):
        log(path, {0: {"audio": "a.wav"}})
