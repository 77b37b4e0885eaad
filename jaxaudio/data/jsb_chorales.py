"""JSB Chorales: 382 four-part chorales by J. S. Bach on a grid of 16th notes, with the canonical split.

The public file `Jsb16thSeparated` of github.com/czhuang/JSB-Chorales-dataset as a tensorflow-datasets builder, without
TensorFlow. Its voices are in order; the files `jsb-chorales-16th` hold sets of pitches, and the quarter-note file is
transposed, so neither is a replacement. The split is that of Boulanger-Lewandowski et al. 2012, which "Music
Transformer" (Huang et al. 2018, Table 2) reports on.
"""

import hashlib
import http.client
import io
import json
import os
import pathlib
import urllib.request

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from jaxaudio.data.chorales import NUM_VOICES, REST, check_grid

COMMIT = "9a7f733ddb4ed91f48da64ac7f0f621c34aadd4d"
URL = f"https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/{COMMIT}/Jsb16thSeparated.json"
# Both files of that commit, the preferred one first: the npz is pickled. They hold the same chorales in the same order.
SHA256 = {
    "Jsb16thSeparated.json": "79294cc374f9252e95ef4b703161524c1c53dc1f712c236f00f1c1f5d54af5a7",
    "Jsb16thSeparated.npz": "2adcdf0d57880c3763f104555072285fe7f9e3d6049fcc4b9830557b8d4a7820",
}
NUM_CHORALES = {"train": 229, "valid": 76, "test": 77}
# Of their grids, as `_digest` takes it: what a prepared data set must hold.
GRIDS_SHA256 = "4e3ec67930d1f4568a3ac5cd482c55b0bacbfee5335d1d9b5334213fe6068001"


class JsbError(ValueError):
    """The file of the JSB chorales is missing, truncated or altered; the message says what was expected."""


class JsbChorales(tfds.core.GeneratorBasedBuilder):
    """The chorales as `grid` (T, 4) int8, MIDI pitch or -1 for a rest, and `index`, the place in its split.

    Read it with `as_data_source(split)` or `tfds.data_source("jsb_chorales", data_dir=...)`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Jsb16thSeparated at commit 9a7f733."}
    # tensorflow-datasets finds this by importlib_resources, which it does not install on Python 3.9 and later.
    code_path = epath.Path(__file__)

    def __init__(self, *, source_dir: str | os.PathLike | None = None, file_format="array_record", **kwargs):
        """Makes the builder.

        Args:
            source_dir: Folder with `Jsb16thSeparated.json` or `.npz`. None downloads the file.
            file_format: array_record, the random-access format that a data source needs.
            **kwargs: As `tfds.core.GeneratorBasedBuilder`, such as `data_dir`.
        """
        self._source_dir = source_dir
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://github.com/czhuang/JSB-Chorales-dataset",
            features=tfds.features.FeaturesDict(
                {
                    "grid": tfds.features.Tensor(shape=(None, NUM_VOICES), dtype=np.int8),
                    "index": tfds.features.Scalar(dtype=np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        splits = download() if self._source_dir is None else read_source(find_source(self._source_dir))
        return {split: self._generate_examples(grids) for split, grids in splits.items()}

    def _generate_examples(self, grids):
        for index, grid in enumerate(grids):
            yield index, {"grid": grid.astype(np.int8), "index": index}


def load_jsb(data_dir: str | os.PathLike | None, cache_dir: str | os.PathLike) -> dict[str, tuple[np.ndarray, ...]]:
    """The grids of all splits, prepared once under `cache_dir` and read through the data source.

    `data_dir` is checked also when the data set is prepared already, and what is read back from `cache_dir` is compared
    with the public file. Several processes may prepare at once: each does so in a temporary folder of its own, the
    first to finish renames it into place, and all read that one.

    Args:
        data_dir: Folder with `Jsb16thSeparated.json` or `.npz`, itself or in its sub-folder `jsb`. None downloads the
            JSON form when nothing is prepared yet.
        cache_dir: Folder for the prepared data set.

    Returns:
        {"train": 229 grids, "valid": 76, "test": 77}, each (T, 4) int32 in the order of the file.

    Raises:
        JsbError: The file is missing, cannot be downloaded, is truncated or altered (has found and expected sha256),
            or the prepared data set is damaged or altered (says which folder to remove).
    """
    if data_dir is not None:
        read_source(find_source(data_dir))
    folder = pathlib.Path(cache_dir) / JsbChorales.name / str(JsbChorales.VERSION)
    if not folder.exists():
        try:
            JsbChorales(source_dir=data_dir, data_dir=os.fspath(cache_dir)).download_and_prepare()
        except OSError:
            # The renaming fails when another process was first; its data set is as good.
            if not folder.exists():
                raise
    try:
        return _read_prepared(JsbChorales(data_dir=os.fspath(cache_dir)))
    except Exception as error:  # every reader below has errors of its own: KeyError, RuntimeError, protobuf's, ...
        raise JsbError(f"{folder} is damaged or altered ({error}); remove it and it is prepared again.") from error


def _read_prepared(builder: JsbChorales) -> dict[str, tuple[np.ndarray, ...]]:
    splits = {}
    for split in NUM_CHORALES:
        examples = sorted(builder.as_data_source(split=split), key=lambda example: int(example["index"]))
        splits[split] = tuple(check_grid(example["grid"]) for example in examples)
    _check_grids(splits, "the data set")
    return splits


def find_source(data_dir: str | os.PathLike) -> pathlib.Path:
    """The `Jsb16thSeparated` file in `data_dir` or its sub-folder `jsb`.

    The JSON form is preferred when both are there, for it needs no unpickling.

    Raises:
        JsbError: There is none, or `data_dir` is empty.
    """
    if not os.fspath(data_dir):
        raise JsbError(
            f"data_dir={data_dir!r} is empty; give the folder of {' or '.join(SHA256)}, or None to download it."
        )
    for name in SHA256:
        for folder in (pathlib.Path(data_dir), pathlib.Path(data_dir) / "jsb"):
            if (folder / name).is_file():
                return folder / name
    raise JsbError(f"There is no {' or '.join(SHA256)} in {data_dir} or {data_dir}/jsb; put it there from {URL}.")


def read_source(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, ...]]:
    """Reads a `Jsb16thSeparated` file, `.json` or `.npz`: split to grids (T, 4) int32, in the order of the file.

    Raises:
        JsbError: The sha256 is not that of the public file (has both), or what is read is not its chorales.
    """
    path = pathlib.Path(path)
    return _parse(path.read_bytes(), path.suffix, os.fspath(path))


def download() -> dict[str, tuple[np.ndarray, ...]]:
    """As `read_source`, from the public repository, in the JSON form, which needs no unpickling.

    Raises:
        JsbError: The file cannot be downloaded, or as `read_source`.
    """
    # Not by tensorflow-datasets: its ten retries keep a machine without network waiting for minutes.
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise JsbError(
            f"Could not download {URL}: {error}. Get it elsewhere and pass the folder it lies in."
        ) from error
    return _parse(content, ".json", URL)


def _parse(content: bytes, suffix: str, origin: str) -> dict[str, tuple[np.ndarray, ...]]:
    found, expected = hashlib.sha256(content).hexdigest(), SHA256[f"Jsb16thSeparated{suffix}"]
    if found != expected:
        raise JsbError(
            f"{origin} is truncated or altered: sha256 {found} ({len(content)} bytes), expected {expected}. "
            f"Get it again from {URL.removesuffix('.json')}{suffix}."
        )
    if suffix == ".npz":
        # The arrays are pickled objects, and a pickle can run any code: it is opened only now that its bytes, those in
        # memory, are known to be the public file's.
        with np.load(io.BytesIO(content), allow_pickle=True, encoding="latin1") as arrays:
            pieces = {split: [np.nan_to_num(piece, nan=REST) for piece in arrays[split]] for split in arrays.files}
    else:
        pieces = json.loads(content)
    splits = {
        split: tuple(check_grid(np.asarray(piece).astype(np.int32)) for piece in pieces[split])
        for split in NUM_CHORALES
    }
    _check_grids(splits, origin)
    return splits


def _check_grids(splits: dict[str, tuple[np.ndarray, ...]], origin: str) -> None:
    found, counts = _digest(splits), {split: len(grids) for split, grids in splits.items()}
    if found != GRIDS_SHA256:
        raise JsbError(
            f"{origin} has {counts} chorales, their sha256 is {found}; expected {NUM_CHORALES} and {GRIDS_SHA256}."
        )


def _digest(splits: dict[str, tuple[np.ndarray, ...]]) -> str:
    """sha256 over the grids of train, valid and test, each its length in 4 little-endian bytes and its int8 values."""
    digest = hashlib.sha256()
    for split in NUM_CHORALES:
        for grid in splits[split]:
            digest.update(len(grid).to_bytes(4, "little") + grid.astype(np.int8).tobytes())
    return digest.hexdigest()
