"""LibriSpeech's features, written by TFDS, read back."""

import numpy as np
import pytest
from tiny_librispeech import TEXTS, WAVES, prepare

from jaxaudio.data.tfds_audio import LibriSpeech, TfdsError


@pytest.mark.parametrize("lazy", [False, True], ids=["samples", "files"])
def test_examples_come_in_any_order(tmp_path, lazy):
    prepare(tmp_path, "2.1.1", lazy=lazy)
    source = LibriSpeech(tmp_path, "test_clean")
    assert len(source) == 3
    for i in (2, 0, 1, 2):
        example = source[i]
        written = int(example.id.removeprefix("1-2-"))
        assert example.text == TEXTS[written]
        assert example.waveform.dtype == np.float32
        np.testing.assert_array_equal(example.waveform, WAVES[written] / np.float32(32768))
    assert {source[i].id for i in range(3)} == {"1-2-0", "1-2-1", "1-2-2"}
    assert len(LibriSpeech(tmp_path, "test_clean[:2]")) == 2


def test_the_newest_version_or_the_one_named_is_read(tmp_path):
    old = prepare(tmp_path, "2.9.0", lazy=False)
    prepare(tmp_path, "2.10.0", lazy=True)
    assert isinstance(LibriSpeech(tmp_path, "test_clean")._source[0]["speech"], bytes)
    assert not isinstance(LibriSpeech(old, "test_clean")._source[0]["speech"], bytes)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(TfdsError, match="no prepared LibriSpeech"):
        LibriSpeech(tmp_path, "test_clean")
    prepare(tmp_path / "a", "1.0.0", lazy=False)
    with pytest.raises(TfdsError, match="no split 'test-clean'; the splits are test_clean"):
        LibriSpeech(tmp_path / "a", "test-clean")
    prepare(tmp_path / "b", "1.0.0", lazy=False, text="transcript")
    with pytest.raises(TfdsError, match="has id, speaker_id, speech, transcript; expected speech at 16000 Hz"):
        LibriSpeech(tmp_path / "b", "test_clean")
    info = next(tmp_path.glob("a/*/*/*/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(TfdsError, match="is tfrecord, which cannot be read in any order"):
        LibriSpeech(tmp_path / "a", "test_clean")
