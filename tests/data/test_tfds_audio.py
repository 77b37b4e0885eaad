"""A tiny data set with LibriSpeech's features, written by TFDS and read back."""

import io
from unittest import mock

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from jaxaudio.data import tfds_audio
from jaxaudio.data.tfds_audio import LibriSpeech, TfdsError

tfds.disable_progress_bar()
tfds_audio._stand_in_for_tensorflow()
RNG = np.random.default_rng(0)
TEXTS = ("HE HOPED THERE WOULD BE STEW", "STUFF IT INTO YOU", "ÇA VA")
WAVES = [RNG.integers(-32768, 32768, size).astype(np.int16) for size in (800, 1, 1234)]


def prepare(folder, version, *, lazy, text="text"):
    """Writes the data set as catalogue code would: samples, or FLAC files."""

    def stored(wave):
        if not lazy:
            return wave
        soundfile.write(file := io.BytesIO(), wave, 16_000, format="FLAC")
        return np.array(file.getvalue(), object)

    class Librispeech(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="lazy_decode" if lazy else "default"),)

        def _info(self):
            speech = tfds.features.Audio(sample_rate=16_000, dtype=np.int16, lazy_decode=lazy, file_format="flac")
            features = {"speech": speech, text: tfds.features.Text(), "speaker_id": np.int64, "id": np.str_}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"test_clean": self._generate_examples()}

        def _generate_examples(self):
            for i, (wave, words) in enumerate(zip(WAVES, TEXTS, strict=True)):
                yield i, {"speech": stored(wave), text: words, "speaker_id": i, "id": f"1-2-{i}"}

    builder = Librispeech(data_dir=folder, file_format="array_record")
    with mock.patch.object(tfds.features.Audio, "dtype", np.int16):  # TFDS asks TensorFlow for it, to write it down
        builder.download_and_prepare()
    return builder.data_path


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
