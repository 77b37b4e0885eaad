import collections
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxaudio.data import music21_chorales
from jaxaudio.data.chorales import ChoraleError

STEPS = {0: ("C", 0), 2: ("D", 0), 4: ("E", 0), 5: ("F", 0), 7: ("G", 0), 9: ("A", 0), 11: ("B", 0)}


def _part_xml(index, notes):
    """`notes` are (pitch or None, 16ths, flags), the flags "tie" and "grace"."""
    body = ""
    for pitch, duration, *flags in notes:
        name = "<rest/>"
        if pitch is not None:
            step, alter = STEPS[pitch % 12]
            name = f"<pitch><step>{step}</step><alter>{alter}</alter><octave>{pitch // 12 - 1}</octave></pitch>"
        length = "" if "grace" in flags else f"<duration>{duration}</duration>"
        tie = '<tie type="start"/>' if "tie" in flags else ""
        body += f"<note>{'<grace/>' if 'grace' in flags else ''}{name}{length}{tie}</note>"
    attributes = "<attributes><divisions>4</divisions></attributes>"
    return f'<part id="P{index}"><measure number="1">{attributes}{body}</measure></part>'


def _write_score(path, *parts):
    names = "".join(f'<score-part id="P{i}"><part-name>{i}</part-name></score-part>' for i in range(len(parts)))
    body = "".join(_part_xml(index, notes) for index, notes in enumerate(parts))
    path.write_text(f'<score-partwise version="3.1"><part-list>{names}</part-list>{body}</score-partwise>')
    return path


HELD = [(48, 8)]


def test_score_to_grid_by_hand(tmp_path):
    """Ties join, rests are -1, grace notes are left out, the last part ends early."""
    score = _write_score(
        tmp_path / "score.xml",
        [(72, 2), (74, 0, "grace"), (71, 2), (None, 4)],
        [(64, 4, "tie"), (64, 4)],
        [(None, 2), (57, 6)],
        [(45, 4)],
    )
    expected = np.full((8, 4), -1)
    expected[:2, 0], expected[2:4, 0] = 72, 71
    expected[:, 1] = 64
    expected[2:, 2] = 57
    expected[:4, 3] = 45
    np.testing.assert_array_equal(music21_chorales.grid_score(score), expected)


def test_unusable_scores(tmp_path):
    with pytest.raises(ChoraleError, match="fewer than 4 parts: 3"):
        music21_chorales.grid_score(_write_score(tmp_path / "three.xml", HELD, HELD, HELD))
    with pytest.raises(ChoraleError, match="more than 4 parts: 5"):
        music21_chorales.grid_score(_write_score(tmp_path / "five.xml", *[HELD] * 5))
    with pytest.raises(ChoraleError, match="no notes"):
        music21_chorales.grid_score(_write_score(tmp_path / "silent.xml", *[[(None, 8)]] * 4))
    with pytest.raises(ChoraleError, match="Pitch 84 of the alto at step 0"):
        music21_chorales.grid_score(_write_score(tmp_path / "high.xml", HELD, [(84, 8)], HELD, HELD))


def test_chord_in_a_part_is_unusable(tmp_path):
    path = _write_score(tmp_path / "chord.xml", [(60, 8), (64, 8)], HELD, HELD, HELD)
    path.write_text(path.read_text().replace("<note><pitch><step>E", "<note><chord/><pitch><step>E"))
    with pytest.raises(ChoraleError, match="part 0 sounds two notes at once at quarter 0"):
        music21_chorales.grid_score(path)


def test_processes_parse_the_package(monkeypatch, tmp_path):
    """BWV 66.6 opens A3 E4 C#5, then G#3 B3 E4 B4, as music21's own documentation prints it."""
    chosen = [path for path in music21_chorales.score_paths() if path.name in ("bwv66.6.mxl", "bwv846.mxl")]
    monkeypatch.setattr(music21_chorales, "score_paths", lambda: chosen)
    calls = []
    result = music21_chorales.load_music21(tmp_path, num_processes=2, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]
    assert result.unusable == {"bwv846.mxl": "fewer than 4 parts: 2"}
    assert "not the JSB split" in result.description
    assert sum(result.names.values(), ()) == ("bwv66.6.mxl",)
    (grid,) = sum(result.splits.values(), ())
    assert grid.shape == (9 * 16, 4)
    np.testing.assert_array_equal(grid[[0, 2]], [[73, 64, 57, 57], [71, 64, 59, 56]])

    monkeypatch.setattr(music21_chorales, "score_paths", lambda: pytest.fail("the cache was not used"))
    cached = music21_chorales.load_music21(tmp_path)
    np.testing.assert_array_equal(sum(cached.splits.values(), ())[0], grid)
    (cache,) = tmp_path.iterdir()
    cache.write_bytes(cache.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{cache.name} is damaged .*remove it"):
        music21_chorales.load_music21(tmp_path)


def test_silent_score_has_a_reason(monkeypatch, tmp_path):
    """Also when it is the only one, and no grid is left to cache."""
    scores = [_write_score(tmp_path / "silent.xml", *[[(None, 8)]] * 4)]
    monkeypatch.setattr(music21_chorales, "score_paths", lambda: scores)
    with pytest.raises(ValueError, match=r"None of 1 scores .* usable chorale: {'silent\.xml': 'no notes'}"):
        music21_chorales.load_music21(tmp_path / "alone", progress=lambda *_: None)
    scores.append(_write_score(tmp_path / "sounding.xml", *[HELD] * 4))
    result = music21_chorales.load_music21(tmp_path / "both", progress=lambda *_: None)
    assert result.unusable == {"silent.xml": "no notes"}
    assert sum(result.names.values(), ()) == ("sounding.xml",)


def test_failing_process_and_bad_arguments(tmp_path):
    broken = tmp_path / "broken.xml"
    broken.write_text("<score-partwise>")
    with pytest.raises(RuntimeError, match=r"after 0 of 1 scores, exit status \[1\]"):
        music21_chorales.parse_scores([broken], progress=lambda *_: None)
    with pytest.raises(ValueError, match="num_processes=0"):
        music21_chorales.parse_scores([broken], num_processes=0)


def test_parsing_process_does_not_import_jax(tmp_path):
    score = _write_score(tmp_path / "score.xml", HELD, HELD, HELD, HELD)
    program = (
        "import sys; from jaxaudio.data import music21_chorales; music21_chorales._main(sys.argv[1:]);"
        "assert not {'jax', 'flax', 'grain'} & sys.modules.keys()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", program, score], check=True, env=environment, capture_output=True)


def _piece(seed):
    return np.random.default_rng(seed).integers(40, 78, (40, 4)).astype(np.int32)


def test_split_keeps_works_and_settings_together():
    grids = {f"bwv{number}.1.mxl": _piece(number) for number in range(1, 301)}
    counts = collections.Counter(music21_chorales.split_chorales(grids).values())
    assert 215 < counts["train"] < 265
    assert counts["valid"] > 15
    assert counts["test"] > 15

    variants = {}
    for number in range(1, 301):
        other = _piece(number) + 2
        other[:12] = _piece(1000 + number)[:12]  # 28 of 40 chords are those of the first setting, a tone higher
        variants |= {f"bwv{number}.5-a.mxl": _piece(2000 + number), f"bwv{number + 500}.mxl": other}
    split = music21_chorales.split_chorales(grids | variants)
    assert set(split.values()) == {"train", "valid", "test"}
    for number in range(1, 301):
        assert split[f"bwv{number}.1.mxl"] == split[f"bwv{number}.5-a.mxl"] == split[f"bwv{number + 500}.mxl"]
    # Order of the files plays no part.
    assert music21_chorales.split_chorales(dict(reversed((grids | variants).items()))) == split


def test_chord_runs_ignore_key_and_lengths():
    grid = _piece(0)
    grid[3, 1] = -1
    moved = np.repeat(np.where(grid < 0, grid, grid + 3), 2, axis=0)
    assert music21_chorales.chord_runs(grid) == music21_chorales.chord_runs(moved)
    assert len(music21_chorales.chord_runs(grid)) == 33
    assert not music21_chorales.chord_runs(grid) & music21_chorales.chord_runs(_piece(1))
