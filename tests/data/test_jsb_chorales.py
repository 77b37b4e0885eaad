import hashlib
import io
import json
import os
import pathlib

import numpy as np
import pytest

from jaxaudio.data import jsb_chorales
from jaxaudio.data.jsb_chorales import JsbError


def _pieces(counts):
    rng = np.random.default_rng(0)
    return {split: [rng.integers(36, 82, (3, 4)).tolist() for _ in range(count)] for split, count in counts.items()}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file of the same form with 3/2/1 tiny chorales, one with a rest, known by its digest."""
    monkeypatch.setattr(jsb_chorales, "NUM_CHORALES", {"train": 3, "valid": 2, "test": 1})
    pieces = _pieces(jsb_chorales.NUM_CHORALES)
    pieces["train"][0][1][2] = -1
    folder = tmp_path / "jsb"
    folder.mkdir()
    _write_json(folder, pieces, monkeypatch)
    return pieces, folder


def _write_json(folder, pieces, monkeypatch):
    content = json.dumps(pieces).encode()
    (folder / "Jsb16thSeparated.json").write_bytes(content)
    monkeypatch.setitem(jsb_chorales.SHA256, "Jsb16thSeparated.json", hashlib.sha256(content).hexdigest())


def _assert_equal(splits, pieces):
    assert splits.keys() == pieces.keys()
    for split, grids in splits.items():
        assert len(grids) == len(pieces[split])
        for grid, piece in zip(grids, pieces[split], strict=True):
            assert grid.dtype == np.int32
            np.testing.assert_array_equal(grid, piece)


def test_builder_prepares_once_and_reads_in_order(small, tmp_path):
    pieces, folder = small
    _assert_equal(jsb_chorales.load_jsb(folder, tmp_path / "cache"), pieces)
    (folder / "Jsb16thSeparated.json").unlink()
    _assert_equal(jsb_chorales.load_jsb(folder, tmp_path / "cache"), pieces)


def test_npz_form_equals_json_form(small, tmp_path, monkeypatch):
    pieces, folder = small
    arrays = {}
    for split, grids in pieces.items():
        arrays[split] = np.empty(len(grids), object)
        arrays[split][:] = [np.where(np.array(grid) < 0, np.nan, grid).astype(np.float16) for grid in grids]
    content = io.BytesIO()
    np.savez(content, **arrays)
    (tmp_path / "Jsb16thSeparated.npz").write_bytes(content.getvalue())
    monkeypatch.setitem(jsb_chorales.SHA256, "Jsb16thSeparated.npz", hashlib.sha256(content.getvalue()).hexdigest())
    _assert_equal(jsb_chorales.read_source(tmp_path / "Jsb16thSeparated.npz"), pieces)


def test_download_reads_the_json_form(small, monkeypatch):
    pieces, folder = small
    monkeypatch.setattr(jsb_chorales, "URL", (folder / "Jsb16thSeparated.json").as_uri())
    _assert_equal(jsb_chorales.download(), pieces)
    monkeypatch.setattr(jsb_chorales, "URL", (folder / "absent.json").as_uri())
    with pytest.raises(JsbError, match=r"Could not download file:.*absent\.json.*pass the folder"):
        jsb_chorales.download()


@pytest.mark.parametrize("form", ["json", "npz"])
def test_truncated_file_is_not_opened(small, tmp_path, form):
    """For the npz form this also says that nothing is unpickled from unknown bytes."""
    pieces, folder = small
    content = (folder / "Jsb16thSeparated.json").read_bytes()[:-40]
    path = tmp_path / f"Jsb16thSeparated.{form}"
    path.write_bytes(content)
    found, expected = hashlib.sha256(content).hexdigest(), jsb_chorales.SHA256[path.name]
    with pytest.raises(JsbError, match=rf"truncated or altered: sha256 {found} .*expected {expected}"):
        jsb_chorales.read_source(path)


def test_wrong_counts(small, monkeypatch):
    pieces, folder = small
    _write_json(folder, pieces | {"valid": pieces["valid"][:1]}, monkeypatch)
    with pytest.raises(JsbError, match=r"'valid': 1.* expected .*'valid': 2"):
        jsb_chorales.read_source(folder / "Jsb16thSeparated.json")


def test_missing_file(tmp_path):
    with pytest.raises(JsbError, match=r"no Jsb16thSeparated\.npz or Jsb16thSeparated\.json in"):
        jsb_chorales.load_jsb(tmp_path / "nowhere", tmp_path / "cache")


@pytest.mark.skipif("JAXAUDIO_DATA" not in os.environ, reason="JAXAUDIO_DATA names no folder with the JSB chorales")
def test_public_file(tmp_path):
    """Counts published with the file: 55 228 + 18 408 + 18 900 steps and 411 + 589 + 284 rests."""
    folder = pathlib.Path(os.environ["JAXAUDIO_DATA"])
    splits = jsb_chorales.load_jsb(folder, tmp_path)
    assert {split: len(grids) for split, grids in splits.items()} == {"train": 229, "valid": 76, "test": 77}
    steps = {split: sum(len(grid) for grid in grids) for split, grids in splits.items()}
    assert steps == {"train": 55_228, "valid": 18_408, "test": 18_900}
    rests = {split: sum(int((grid == -1).sum()) for grid in grids) for split, grids in splits.items()}
    assert rests == {"train": 411, "valid": 589, "test": 284}
    np.testing.assert_array_equal(splits["test"][0][0], [65, 60, 57, 53])
