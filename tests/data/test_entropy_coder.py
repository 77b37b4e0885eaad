"""Codes to bytes and back; the same bytes whatever the BLAS, its threads and XLA do; files that are refused."""

import hashlib
import json
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from tiny_encodec_lm import PAST, C, N, Q, integer_lm, random_codes, random_params, shifted

from jaxaudio.data.arithmetic_coding import CodingError
from jaxaudio.data.codec_files import EntropyCoder
from jaxaudio.data.entropy_coder import FILE, LMCoder, load_entropy_coder, save_entropy_model
from jaxaudio.data.integer_lm import TABLE_BITS, EntropyModelError
from jaxaudio.data.lm_quantization import quantize_lm

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def coder():
    return LMCoder("tiny", integer_lm(gain=3.0))


@pytest.fixture(scope="module")
def likely_codes(coder):
    """Codes drawn from the model's own tables, so that they have little information."""
    rng, state = np.random.default_rng(0), coder.model.start(1, 40)
    codes, inputs = np.zeros((Q, 40), np.int32), np.zeros((1, Q, 1), int)
    for t in range(40):
        tables = coder.model.cumulative(inputs, state)[0, 0]
        codes[:, t] = [np.searchsorted(table, rng.integers(2**TABLE_BITS), "right") - 1 for table in tables]
        inputs = codes[None, :, t : t + 1] + 1
    return codes


@pytest.mark.parametrize("num_codebooks", [1, Q])
@pytest.mark.parametrize("num_frames", [0, 1, 40, 93])  # the model has 40 positions
def test_comes_back(coder, num_codebooks, num_frames):
    assert isinstance(coder, EntropyCoder)
    codes = random_codes(num_frames, codebooks=num_codebooks)
    for given in (codes, codes.astype(np.int32), codes.astype(np.uint16)):
        data = coder.encode(given)
        back = coder.decode(data, num_codebooks, num_frames)
        assert back.dtype == np.int32
        np.testing.assert_array_equal(back, codes)


def test_length_is_the_information(coder, likely_codes):
    tables = coder.model.cumulative(shifted(likely_codes)[None], coder.model.start(1, 40))[0]
    counts = np.take_along_axis(np.diff(tables), likely_codes.T[..., None], axis=-1)
    bits = np.sum(TABLE_BITS - np.log2(counts))
    assert bits < 0.8 * Q * 40 * np.log2(C)
    assert bits / 8 <= len(coder.encode(likely_codes)) < bits / 8 + 7


CHILD = """
import hashlib, sys
import numpy as np
from jaxaudio.data.entropy_coder import load_entropy_coder
coder = load_entropy_coder(sys.argv[1])
codes = np.load(sys.argv[2])
data = coder.encode(codes)
assert np.array_equal(coder.decode(bytes.fromhex(sys.argv[3]), *codes.shape), codes)
tables = coder.model.cumulative(np.stack([codes, codes]), coder.model.start(2, codes.shape[1]))  # all threads
sys.stdout.write(data.hex() + " " + " ".join(hashlib.sha256(table.tobytes()).hexdigest() for table in tables))
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Nehalem"},  # SSE, without fused multiply-add
        {"OPENBLAS_NUM_THREADS": "2", "XLA_FLAGS": "--xla_cpu_enable_fast_math=true --xla_cpu_use_thunk_runtime=true"},
        {"OPENBLAS_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "2"},
        {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX X86_V3 X86_V4"},
    ],
    ids=["one thread, SSE", "XLA flags", "two threads, FMA", "NumPy without AVX"],
)
def test_other_processes_read_and_write_the_same_bytes(tmp_path, environment):
    """Wide enough that BLAS takes its blocked and threaded paths."""
    sizes = {"codebooks": 4, "codes": 256, "dim": 128, "heads": 8, "hidden": 512}
    tensors = quantize_lm(random_params(**sizes), num_positions=150)
    save_entropy_model(tmp_path, tensors, num_heads=8, past_frames=50, name="wide")
    codes = random_codes(150, codebooks=4, codes=256)
    np.save(tmp_path / "codes.npy", codes)
    coder = load_entropy_coder(tmp_path)
    data, state = coder.encode(codes), coder.model.start(1, 150)
    tables = [coder.model.cumulative(codes[None, :, t : t + 1], state) for t in range(150)]
    digest = hashlib.sha256(np.concatenate(tables, axis=1).tobytes()).hexdigest()
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS", "OMP", "XLA", "NPY"))}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), str(tmp_path / "codes.npy"), data.hex()],
        env=keep | environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout == f"{data.hex()} {digest} {digest}"


def test_hash_is_of_all_that_decides(coder):
    tensors = coder.model.tensors
    hashes = {coder.hash, LMCoder("another name", integer_lm(gain=3.0)).hash}
    assert len(hashes) == 1
    assert all(len(text) == 64 for text in hashes)
    hashes.add(LMCoder("tiny", type(coder.model)(tensors, num_heads=N, past_frames=PAST + 1)).hash)
    hashes.add(LMCoder("tiny", type(coder.model)(tensors, num_heads=2 * N, past_frames=PAST)).hash)
    changed = tensors["logits/kernel"].copy()
    changed[-1, -1, -1] ^= 1
    changed = tensors | {"logits/kernel": changed}
    hashes.add(LMCoder("tiny", type(coder.model)(changed, num_heads=N, past_frames=PAST)).hash)
    assert len(hashes) == 4


def test_file_comes_back(coder, tmp_path):
    path = save_entropy_model(tmp_path / "codec", coder.model.tensors, num_heads=N, past_frames=PAST, name="tiny")
    assert path == tmp_path / "codec" / FILE
    loaded = load_entropy_coder(tmp_path / "codec")
    assert (loaded.name, loaded.hash) == (coder.name, coder.hash)


def test_damaged_bytes_are_refused(coder, likely_codes):
    data = coder.encode(likely_codes)
    with pytest.raises(CodingError, match="cut short"):
        coder.decode(data[:-9], Q, 40)
    with pytest.raises(CodingError, match="expected"):
        coder.decode(data + b"\0", Q, 40)
    for at in range(0, len(data), 7):
        with pytest.raises(CodingError):
            coder.decode(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :], Q, 40)


def test_codes_that_it_does_not_have(coder):
    with pytest.raises(EntropyModelError, match=rf"codes from 0 to {C}; the model has 0 to {C - 1}"):
        coder.encode(np.array([[0, C]]))
    with pytest.raises(EntropyModelError, match="codes from -1 to 3"):
        coder.encode(np.array([[-1, 3]]))
    with pytest.raises(EntropyModelError, match=r"expected integer codes \(Q, T\), got float64 \(1, 2\)"):
        coder.encode(np.zeros((1, 2)))
    with pytest.raises(EntropyModelError, match=f"{Q + 1} codebooks; the model has 1 to {Q}"):
        coder.encode(np.zeros((Q + 1, 2), int))
    with pytest.raises(EntropyModelError, match=f"0 codebooks; the model has 1 to {Q}"):
        coder.decode(bytes(9), 0, 2)


def test_files_that_are_refused(coder, tmp_path):
    with pytest.raises(EntropyModelError, match=r"has no entropy model \(entropy.safetensors\): convert .* train one"):
        load_entropy_coder(tmp_path)
    path = save_entropy_model(tmp_path, coder.model.tensors, num_heads=N, past_frames=PAST, name="tiny")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EntropyModelError, match="entropy.safetensors cannot be read"):
        load_entropy_coder(tmp_path)
    size = struct.unpack("<Q", whole[:8])[0]

    def with_metadata(**changes):
        header = json.loads(whole[8 : 8 + size])
        header["__metadata__"] |= changes
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])

    with_metadata(version="0")
    with pytest.raises(EntropyModelError, match="has the version '0'; expected 'jaxaudio entropy model 1'"):
        load_entropy_coder(tmp_path)
    with_metadata(num_heads="3")
    with pytest.raises(EntropyModelError, match="entropy.safetensors: num_heads is 3; expected a divisor"):
        load_entropy_coder(tmp_path)
    with pytest.raises(EntropyModelError, match="past_frames is 0"):
        save_entropy_model(tmp_path, coder.model.tensors, num_heads=N, past_frames=0, name="tiny")
