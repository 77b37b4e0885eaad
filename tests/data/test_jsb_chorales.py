import hashlib
import io
import json
import os
import pathlib
import shutil
import struct

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
    monkeypatch.setattr(jsb_chorales, "GRIDS_SHA256", _grids_sha256(pieces))
    folder = tmp_path / "jsb"
    folder.mkdir()
    _write_json(folder, pieces, monkeypatch)
    return pieces, folder


def _grids_sha256(pieces):
    grids = [grid for split in ("train", "valid", "test") for grid in pieces[split]]
    content = b"".join(struct.pack(f"<i{4 * len(grid)}b", len(grid), *sum(grid, [])) for grid in grids)
    return hashlib.sha256(content).hexdigest()


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


def test_builder_prepares_once_and_reads_in_order(small, tmp_path, monkeypatch):
    pieces, folder = small
    _assert_equal(jsb_chorales.load_jsb(folder, tmp_path / "cache"), pieces)
    monkeypatch.setattr(jsb_chorales, "download", lambda: pytest.fail("the prepared data set was not used"))
    _assert_equal(jsb_chorales.load_jsb(None, tmp_path / "cache"), pieces)


def test_source_is_checked_also_when_prepared(small, tmp_path):
    pieces, folder = small
    jsb_chorales.load_jsb(folder, tmp_path / "cache")
    with pytest.raises(JsbError, match=r"no Jsb16thSeparated\.json or .* in .*nowhere"):
        jsb_chorales.load_jsb(tmp_path / "nowhere", tmp_path / "cache")
    with (folder / "Jsb16thSeparated.json").open("a") as file:
        file.write(" ")
    with pytest.raises(JsbError, match="is truncated or altered"):
        jsb_chorales.load_jsb(folder, tmp_path / "cache")


def test_altered_cache(small, tmp_path, monkeypatch):
    """As many chorales, one pitch of one of them changed."""
    pieces, folder = small
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        other = json.loads(json.dumps(pieces))
        other["test"][0][2][3] = 36 if other["test"][0][2][3] != 36 else 37
        patch.setattr(jsb_chorales, "GRIDS_SHA256", _grids_sha256(other))
        _write_json(folder, other, patch)
        jsb_chorales.load_jsb(folder, cache)
    found = _grids_sha256(other)
    with pytest.raises(JsbError, match=rf"jsb_chorales/1\.0\.0 is damaged or altered .*{found}.*; remove it"):
        jsb_chorales.load_jsb(None, cache)
    shutil.rmtree(cache / "jsb_chorales" / "1.0.0")
    _write_json(folder, pieces, monkeypatch)
    _assert_equal(jsb_chorales.load_jsb(folder, cache), pieces)


@pytest.mark.parametrize("name", ["dataset_info.json", "jsb_chorales-valid.array_record-00000-of-00001"])
def test_damaged_cache(small, tmp_path, name):
    pieces, folder = small
    jsb_chorales.load_jsb(folder, tmp_path)
    (tmp_path / "jsb_chorales" / "1.0.0" / name).write_bytes(b"damaged")
    with pytest.raises(JsbError, match=r"jsb_chorales/1\.0\.0 is damaged .*; remove it"):
        jsb_chorales.load_jsb(None, tmp_path)


def test_two_processes_prepare_at_once(small, tmp_path, monkeypatch):
    """The second one starts and ends while the first one prepares."""
    pieces, folder = small
    generate, calls = jsb_chorales.JsbChorales._split_generators, []

    def interrupted(builder, dl_manager):
        calls.append(builder)
        if len(calls) == 1:
            _assert_equal(jsb_chorales.load_jsb(folder, tmp_path / "cache"), pieces)
        return generate(builder, dl_manager)

    monkeypatch.setattr(jsb_chorales.JsbChorales, "_split_generators", interrupted)
    _assert_equal(jsb_chorales.load_jsb(folder, tmp_path / "cache"), pieces)
    assert len(calls) == 2
    assert [path.name for path in (tmp_path / "cache" / "jsb_chorales").iterdir()] == ["1.0.0"]


def test_folder_that_cannot_be_written(small, tmp_path):
    pieces, folder = small
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        jsb_chorales.load_jsb(folder, tmp_path / "file")


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


def test_find_source(tmp_path):
    with pytest.raises(JsbError, match=r"no Jsb16thSeparated\.json or Jsb16thSeparated\.npz in .*nowhere"):
        jsb_chorales.find_source(tmp_path / "nowhere")
    with pytest.raises(JsbError, match="data_dir='' is empty"):
        jsb_chorales.find_source("")
    (tmp_path / "jsb").mkdir()
    pickled, plain = tmp_path / "Jsb16thSeparated.npz", tmp_path / "jsb" / "Jsb16thSeparated.json"
    pickled.touch()
    assert jsb_chorales.find_source(tmp_path) == pickled
    plain.touch()
    assert jsb_chorales.find_source(tmp_path) == plain


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
