"""LibriSpeech as TensorFlow Datasets prepares it, read without TensorFlow, one example at a time in any order.

    tfds build librispeech --file_format=array_record

prepares it once: array_record is the format that can be read in any order. The configs `default`, which keeps samples,
and `lazy_decode`, which keeps FLAC files, are both read.
"""

import dataclasses
import importlib.util
import io
import os
import pathlib
import types
from typing import Any

import numpy as np

from jaxaudio.data.audio import SAMPLE_RATE


class TfdsError(ValueError):
    """A data set that is not there or cannot be read; the message names the folder and what was expected."""


@dataclasses.dataclass(frozen=True, eq=False)
class SpeechExample:
    """One utterance.

    Attributes:
      id: its name in the data set, "1089-134686-0000".
      waveform: (A,) float32 in [-1, 1] at 16 kHz.
      text: what is said, as the data set writes it.
    """

    id: str
    waveform: np.ndarray
    text: str


class LibriSpeech:
    """A split of LibriSpeech: `source[i]` is a `SpeechExample`, `len(source)` their number.

    Args:
      folder: TFDS' data_dir (with a folder librispeech), or the folder of one version (with dataset_info.json).
      split: "test_clean", "test_other", "dev_clean", "train_clean100", ... or a part of one: "test_clean[:100]".
    Raises:
      TfdsError: no prepared data set, another one or another format, or no such split; has what is there.
    """

    def __init__(self, folder: str | os.PathLike, split: str):
        import tensorflow_datasets as tfds

        _stand_in_for_tensorflow()
        version = _version(pathlib.Path(folder))
        builder = tfds.builder_from_directory(version)
        features = builder.info.features
        if not {"speech", "text", "id"} <= set(features) or features["speech"].sample_rate != SAMPLE_RATE:
            found = ", ".join(sorted(features))
            raise TfdsError(f"{version} has {found}; expected speech at {SAMPLE_RATE} Hz, text and id")
        if split.split("[")[0] not in builder.info.splits:
            raise TfdsError(f"{version} has no split {split!r}; the splits are {', '.join(builder.info.splits)}")
        if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            raise TfdsError(
                f"{version} is {builder.info.file_format.value}, which cannot be read in any order; prepare it with "
                "--file_format=array_record"
            )
        # The feature's own decoding would need TensorFlow where it keeps files.
        self._source = builder.as_data_source(split=split, decoders={"speech": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> SpeechExample:
        example = self._source[index]
        return SpeechExample(example["id"].decode(), _samples(example["speech"]), example["text"].decode())


def _samples(speech: Any) -> np.ndarray:
    if isinstance(speech, bytes):
        import soundfile

        return soundfile.read(io.BytesIO(speech), dtype="float32")[0]
    return np.asarray(speech, np.float32) / 32768


def _version(folder: pathlib.Path) -> pathlib.Path:
    """The folder of the newest version below `folder`, or itself."""
    if (folder / "dataset_info.json").is_file():
        return folder
    found = [path.parent for path in folder.glob("librispeech/*/*/dataset_info.json")]
    if not found:
        raise TfdsError(
            f"{folder} has no prepared LibriSpeech: expected librispeech/CONFIG/VERSION/dataset_info.json in it; "
            "prepare it with `tfds build librispeech --file_format=array_record --data_dir FOLDER`"
        )
    return max(found, key=lambda path: [int(number) for number in path.name.split(".")])


def _stand_in_for_tensorflow() -> None:
    """Gives the audio feature of TFDS, which asks TensorFlow for the names of types alone, these names without it."""
    if importlib.util.find_spec("tensorflow") is None:
        from tensorflow_datasets.core.features import audio_feature

        kinds = {"uint8": np.uint8, "int16": np.int16, "int32": np.int32, "string": np.object_}
        audio_feature.tf = types.SimpleNamespace(**kinds, dtypes=types.SimpleNamespace(as_dtype=lambda dtype: dtype))
