"""FLEURS as it is published: a folder for each language with a table of what is said in its recordings.

en_us/test.tsv              no header; id, file name, raw transcription, transcription, characters, samples, gender
en_us/audio/test/123.wav    audio/test.tar.gz of the release, unpacked in its place
"""

import os
import pathlib

from jaxaudio.data.audio import SAMPLE_RATE
from jaxaudio.data.languages import language_code
from jaxaudio.data.manifests import Utterance

_NUM_FIELDS = 7
# Where the release's code of a language does not begin with Whisper's.
_CODES = {"cmn": "zh", "fil": "tl", "jv": "jw", "nb": "no", "iw": "he"}


class FleursError(ValueError):
    """A folder that is not one of FLEURS; the message names the file, the line and what was expected."""


def read_fleurs(folder: str | os.PathLike, split: str = "test") -> list[Utterance]:
    """The recordings of a language, with the transcription (lower case, without punctuation) as text.

    Args:
      folder: of the language, "en_us".
      split: "train", "dev" or "test".
    Raises:
      FleursError: there is no such table; Whisper does not know the language; a line without seven fields or without a
        number of samples; a recording that is not there.
    """
    folder = pathlib.Path(folder)
    path = folder / f"{split}.tsv"
    if not path.is_file():
        raise FleursError(
            f"there is no {path}; expected a language's folder of FLEURS, such as en_us, with {split}.tsv"
        )
    language = fleurs_language(folder.absolute().name)
    utterances = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) != _NUM_FIELDS or not fields[5].isdecimal():
            raise FleursError(f"{path}:{number}: expected {_NUM_FIELDS} fields, the sixth the samples, got {fields}")
        audio = folder / "audio" / split / fields[1]
        if not audio.is_file():
            raise FleursError(f"{path}:{number}: there is no {audio}; unpack audio/{split}.tar.gz into audio")
        # Several speakers read the same sentence, whose number they share; the file's name is the recording's own.
        utterances.append(
            Utterance(
                audio=str(audio),
                text=fields[3],
                language=language,
                duration_s=int(fields[5]) / SAMPLE_RATE,
                id=audio.stem,
            )
        )
    if not utterances:
        raise FleursError(f"{path} is empty")
    return utterances


def fleurs_language(name: str) -> str:
    """Whisper's code of a language of FLEURS: "zh" for "cmn_hans_cn".

    Raises:
      FleursError: Whisper does not know it; has the name.
    """
    code = "yue" if name.startswith("yue") else name.split("_")[0]
    try:
        return language_code(_CODES.get(code, code))
    except ValueError as error:
        raise FleursError(f"{name!r} is no language of FLEURS that Whisper knows, such as en_us: {error}") from error
