"""The entropy coder of a codec's codes: a language model in exact integers before an arithmetic coder. NumPy, no JAX.

A codec's folder holds its model as one file, entropy.safetensors: the integers of `data.integer_lm`, and in the file's
metadata its name and the numbers that no shape tells. Nothing else has to know of it; a stream names it by its hash.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from threadpoolctl import threadpool_limits

from jaxaudio.data.arithmetic_coding import Decoder, Encoder
from jaxaudio.data.files import atomic_path
from jaxaudio.data.integer_lm import TABLE_BITS, EntropyModelError, IntegerLM

FILE = "entropy.safetensors"
VERSION = (
    "jaxaudio entropy model 1"  # of the file and of the arithmetic: other numbers for the same tensors, another one
)
HOW_TO_GET_ONE = (
    "convert a published one, python -m jaxaudio.convert.encodec_lm FILE.th FOLDER --frame-rate 75, or train one, "
    "python -m experiments.encodec_entropy"
)
_BLOCK = 64  # frames whose tables are in memory together
# Products of one row gain nothing from threads; beside other work, waiting for them took three times as long.
_one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


@dataclasses.dataclass(frozen=True, eq=False)
class LMCoder:
    """Codes (Q, T) to bytes and back, every chunk by itself.

    Attributes:
      name: of the model, for people.
      model: the language model.
    """

    name: str
    model: IntegerLM

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides the bytes."""
        digest = hashlib.sha256(f"{VERSION} {self.model.num_heads} {self.model.past_frames}".encode())
        for name, array in sorted(self.model.tensors.items()):
            digest.update(f" {name} {array.dtype.str} {array.shape} ".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    @_one_thread
    def encode(self, codes: np.ndarray) -> bytes:
        """The bytes of codes (Q, T); Q may be less than the model's codebooks.

        Raises:
          EntropyModelError: codes of another kind: their shape, or the smallest and the largest.
        """
        if codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise EntropyModelError(f"expected integer codes (Q, T), got {codes.dtype} {codes.shape}")
        num_codebooks, num_frames = codes.shape
        self._check(num_codebooks)
        if codes.size and not (codes.min() >= 0 and codes.max() < self.model.codebook_size):
            raise EntropyModelError(
                f"codes from {codes.min()} to {codes.max()}; the model has 0 to {self.model.codebook_size - 1}"
            )
        codes = codes.astype(np.int64)
        encoder = Encoder(TABLE_BITS)
        for start in range(0, num_frames, self.model.num_positions):
            stream = codes[:, start : start + self.model.num_positions]
            inputs = np.pad(stream[:, :-1] + 1, ((0, 0), (1, 0)))
            state = self.model.start(1, stream.shape[1])
            for first in range(0, stream.shape[1], _BLOCK):
                block = slice(first, first + _BLOCK)
                tables = self.model.cumulative(inputs[None, :, block], state)[0]
                encoder.put(stream[:, block].T.reshape(-1), tables.reshape(-1, tables.shape[-1]))
        return encoder.finish()

    @_one_thread
    def decode(self, data: bytes, num_codebooks: int, num_frames: int) -> np.ndarray:
        """The codes (Q, T) int32 that `encode` made `data` of.

        Raises:
          CodingError: the bytes are damaged, or of other codes.
          EntropyModelError: more codebooks than the model's.
        """
        self._check(num_codebooks)
        decoder = Decoder(data, TABLE_BITS)
        codes = np.zeros((num_codebooks, num_frames), np.int32)
        for start in range(0, num_frames, self.model.num_positions):
            stream = codes[:, start : start + self.model.num_positions]
            state = self.model.start(1, stream.shape[1])
            inputs = np.zeros((1, num_codebooks, 1), np.int64)
            for frame in range(stream.shape[1]):
                stream[:, frame] = decoder.get(self.model.cumulative(inputs, state)[0, 0])
                inputs[0, :, 0] = stream[:, frame] + 1
        decoder.finish()
        return codes

    def _check(self, num_codebooks: int) -> None:
        if not 1 <= num_codebooks <= self.model.num_codebooks:
            raise EntropyModelError(f"{num_codebooks} codebooks; the model has 1 to {self.model.num_codebooks}")


def save_entropy_model(
    folder: str | os.PathLike, tensors: Mapping[str, np.ndarray], *, num_heads: int, past_frames: int, name: str
) -> pathlib.Path:
    """Writes the entropy model of a codec's folder, in place of one that may be there.

    Args:
      folder: the codec's.
      tensors, num_heads, past_frames: see `IntegerLM`.
      name: for people: a training, a published file.
    Returns:
      The file.
    Raises:
      EntropyModelError: as `IntegerLM`.
    """
    from safetensors.numpy import save_file

    IntegerLM(tensors, num_heads=num_heads, past_frames=past_frames)
    metadata = {"version": VERSION, "name": name, "num_heads": str(num_heads), "past_frames": str(past_frames)}
    path = pathlib.Path(folder) / FILE
    with atomic_path(path) as temporary:
        save_file({key: array.copy() for key, array in tensors.items()}, temporary, metadata)  # contiguous
    return path


def load_entropy_coder(folder: str | os.PathLike) -> LMCoder:
    """The entropy coder of a codec's folder.

    Raises:
      EntropyModelError: it has none, and how to get one; or its file is damaged or of another version.
    """
    import safetensors

    path = pathlib.Path(folder) / FILE
    if not path.is_file():
        raise EntropyModelError(f"{folder} has no entropy model ({FILE}): {HOW_TO_GET_ONE}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise EntropyModelError(f"{path} cannot be read: {error}") from error
    if metadata.get("version") != VERSION:
        raise EntropyModelError(f"{path} has the version {metadata.get('version')!r}; expected {VERSION!r}")
    try:
        numbers = {name: int(metadata.get(name, "0")) for name in ("num_heads", "past_frames")}
        return LMCoder(metadata.get("name", path.parent.name), IntegerLM(tensors, **numbers))
    except ValueError as error:
        raise EntropyModelError(f"{path}: {error}") from error
