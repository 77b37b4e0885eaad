"""A tiny data set with LibriSpeech's features, written by TFDS without TensorFlow."""

import io
from unittest import mock

import numpy as np
import soundfile
import tensorflow_datasets as tfds

from jaxaudio.data import tfds_audio

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
