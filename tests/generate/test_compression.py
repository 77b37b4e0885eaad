"""Recordings to .jac files and back, against the codec itself on whole recordings."""

import dataclasses
import io
import pathlib
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr
import tiny_codec

from jaxaudio.data.audio import AudioError
from jaxaudio.data.codec_files import CodecFileError, CodecWriter, LostChunks, open_codec_file
from jaxaudio.data.codec_header import header_bytes
from jaxaudio.generate import compression
from jaxaudio.generate.codec import Codec
from jaxaudio.generate.compression import decode_file, encode_file, file_header
from jaxaudio.models.dac import DAC, DACConfig
from jaxaudio.models.encodec import EnCodec

RATE = 8000


@pytest.fixture(scope="module")
def causal():
    return tiny_codec.to_codec(tiny_codec.make_codec())


@pytest.fixture(scope="module")
def looking_ahead():
    """Odd strides and DAC's cut, so that the decoder's output is some samples short."""
    seanet = dataclasses.replace(tiny_codec.CONFIG.seanet, causal=False, num_lstm_layers=0, short_transpose=True)
    config = DACConfig(RATE, seanet, tiny_codec.CONFIG.rvq)
    return random_codec("ahead", DAC(config))


@pytest.fixture(scope="module")
def segmented():
    """Stereo at 8 kHz in segments of 0.1 s, each at its own loudness."""
    seanet = dataclasses.replace(tiny_codec.CONFIG.seanet, channels=2, causal=False, norm="group", num_lstm_layers=0)
    config = dataclasses.replace(tiny_codec.CONFIG, seanet=seanet, segment_s=0.1, segment_overlap=0.05)
    return random_codec("segmented", EnCodec(config))


def random_codec(name: str, model) -> Codec:
    keys = jax.random.split(jax.random.key(7), 2)
    waveform = jnp.zeros((1, 400, model.config.channels))
    params = jax.tree.map(np.asarray, jax.jit(model.init)(keys[0], waveform, jnp.array([4]))["params"])
    params["quantizer"]["codebooks"] = np.asarray(0.1 * jax.random.normal(keys[1], (4, 16, 8)))
    return Codec(name, model, params)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """0.2 s, 80 frames of 20 samples."""
    monkeypatch.setattr(compression, "CHUNK_S", 0.2)


def noise(num_samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal((num_samples, channels))).astype(np.float32)


def encoded(codec: Codec, folder: pathlib.Path, waveform: np.ndarray, **options) -> pathlib.Path:
    soundfile.write(folder / "in.wav", waveform, RATE, subtype="FLOAT")
    encode_file(codec, folder / "in.wav", folder / "a.jac", overwrite=True, **{"num_codebooks": 3} | options)
    return folder / "a.jac"


def decoded(
    codec: Codec, path: pathlib.Path, suffix: str = ".wav", **options
) -> tuple[np.ndarray, compression.Restored]:
    done = decode_file(codec, path, path.with_suffix(suffix), overwrite=True, **options)
    return soundfile.read(path.with_suffix(suffix), dtype="float32", always_2d=True)[0], done


def assert_in_16_bits(restored: np.ndarray, expected: np.ndarray) -> None:
    """Half a step of rounding, and 1e-5 for the model's pieces."""
    np.testing.assert_allclose(restored, np.clip(expected, -1, 32767 / 32768), atol=0.5 / 32768 + 1e-5)


@pytest.mark.parametrize("name", ["causal", "looking_ahead", "segmented"])
@pytest.mark.parametrize("num_samples", [1, 1601, 8123])
def test_a_file_holds_the_codes_of_the_recording_and_gives_its_decoding(name, num_samples, request, tmp_path):
    codec = request.getfixturevalue(name)
    waveform = noise(num_samples, codec.config.channels)
    path = encoded(codec, tmp_path, waveform)
    expected = codec.encode(waveform, num_codebooks=3)
    with open_codec_file(path) as file:
        chunks = list(file.chunks())
        assert (file.lost, file.notes, file.header.num_samples) == ((), (), num_samples)
        assert (file.header.sample_rate, file.header.frame_rate, file.header.kbps) == (RATE, 400.0, 4.8)
    np.testing.assert_array_equal(np.concatenate([chunk.codes for chunk in chunks], axis=1), expected.codes)
    if expected.scales is not None:
        np.testing.assert_array_equal(np.concatenate([chunk.scales for chunk in chunks]), expected.scales)
    assert len(chunks) == -(-num_samples // file.header.chunk_samples)
    for suffix in (".wav", ".flac"):
        restored, done = decoded(codec, path, suffix)
        assert_in_16_bits(restored, codec.decode(expected))
        assert (done.lost, done.notes) == ((), ())


def test_the_length_of_chunks_is_5_seconds(causal, segmented, monkeypatch):
    monkeypatch.setattr(compression, "CHUNK_S", 5.0)
    header = file_header(causal, 2)
    assert (header.chunk_frames, header.chunk_samples, header.chunk_segments) == (2000, 40_000, 0)
    header = file_header(segmented, 2)
    assert (header.chunk_frames, header.chunk_samples, header.chunk_segments) == (160, 4 * 760, 4)


def test_other_rates_and_channels_are_converted(causal, segmented, tmp_path):
    waveform = noise(5000, 2)
    soundfile.write(tmp_path / "stereo.wav", waveform, 11025, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", waveform[:, 0], RATE, subtype="FLOAT")
    done = encode_file(causal, tmp_path / "stereo.wav", tmp_path / "a.jac", num_codebooks=4)
    mono = soxr.resample(waveform.mean(axis=1), 11025, RATE, quality="VHQ")
    assert done.header.num_samples == len(mono)
    with open_codec_file(tmp_path / "a.jac") as file:
        codes = np.concatenate([chunk.codes for chunk in file.chunks()], axis=1)
    assert (codes == causal.encode(mono).codes).mean() > 0.99  # blocks are resampled as the whole is, to 1e-6
    encode_file(segmented, tmp_path / "mono.wav", tmp_path / "b.jac", num_codebooks=4)
    with open_codec_file(tmp_path / "b.jac") as file:
        codes = np.concatenate([chunk.codes for chunk in file.chunks()], axis=1)
    np.testing.assert_array_equal(codes, segmented.encode(waveform[:, [0, 0]]).codes)


def test_what_was_written_is_counted(causal, tmp_path):
    seconds = []
    soundfile.write(tmp_path / "in.wav", noise(8000), RATE, subtype="FLOAT")
    done = encode_file(causal, tmp_path / "in.wav", tmp_path / "a.jac", num_codebooks=4, progress=seconds.append)
    assert done.num_bytes == (tmp_path / "a.jac").stat().st_size
    assert done.kbps == done.num_bytes * 8 / 1000
    assert sum(seconds) == pytest.approx(1.0)
    seconds.clear()
    decode_file(causal, tmp_path / "a.jac", tmp_path / "b.wav", progress=seconds.append)
    assert sum(seconds) == pytest.approx(1.0)


def test_samples_beyond_full_scale_are_clipped_and_counted(causal, tmp_path):
    loud = dataclasses.replace(causal, params=jax.tree.map(np.copy, causal.params))
    loud.params["decoder"]["conv_out"]["bias"] += 0.9
    path = encoded(loud, tmp_path, noise(4000))
    restored, done = decoded(loud, path)
    expected = loud.decode(loud.encode(noise(4000), num_codebooks=3))
    assert done.num_clipped == (np.abs(expected) > 1).sum() > 0
    assert_in_16_bits(restored, expected)


class ZlibCoder:
    name, hash = "zlib", "0123456789abcdef0123"

    def encode(self, codes):
        return zlib.compress(codes.astype(np.uint8).tobytes())

    def decode(self, data, num_codebooks, num_frames):
        return np.frombuffer(zlib.decompress(data), np.uint8).reshape(num_codebooks, num_frames).astype(np.int32)


def test_an_entropy_coder_changes_the_size_alone(causal, tmp_path):
    waveform = np.zeros((8000, 1), np.float32)  # whose codes repeat
    plain = encoded(causal, tmp_path, waveform)
    size = plain.stat().st_size
    expected, _ = decoded(causal, plain)
    path = encoded(causal, tmp_path, waveform, coder=ZlibCoder())
    assert path.stat().st_size < 0.7 * size
    restored, done = decoded(causal, path, coder=ZlibCoder())
    np.testing.assert_array_equal(restored, expected)
    assert (done.header.entropy, done.header.entropy_hash) == ("zlib", "0123456789abcdef")
    with pytest.raises(CodecFileError, match=r"needs? the entropy model zlib \(0123456789abcdef\), but none is given"):
        decoded(causal, path)


def damaged(path: pathlib.Path, *indices: int) -> list[LostChunks]:
    """A bit of these chunks changed."""
    data = bytearray(path.read_bytes())
    for index in indices:
        at = -1
        for _ in range(index + 1):
            at = data.index(b"\xa9JC\xd7", at + 1)
        data[at + 20] ^= 64
    path.write_bytes(data)
    with open_codec_file(path) as file:
        return list(file.lost)


@pytest.mark.parametrize(
    ("name", "indices"), [("causal", (0,)), ("causal", (1, 2, 4)), ("causal", (5,)), ("looking_ahead", (1, 2, 4))]
)
def test_lost_chunks_are_silence_and_the_others_are_decoded(name, indices, request, tmp_path):
    """Six chunks of 1600 samples, the last one of 123: each run of whole ones is as a recording of its own."""
    codec, waveform = request.getfixturevalue(name), noise(8123)
    path = encoded(codec, tmp_path, waveform)
    with open_codec_file(path) as file:
        codes = [chunk.codes for chunk in file.chunks()]
    lost = damaged(path, *indices)
    assert [index for part in lost for index in range(part.first, part.last + 1)] == list(indices)
    restored, done = decoded(codec, path)
    assert done.lost == tuple(lost)
    assert [(part.start_s, part.end_s) for part in lost][-1][1] == min((indices[-1] + 1) * 0.2, 8123 / RATE)
    expected, run = np.zeros((8123, 1), np.float32), []
    for index in range(7):
        if index < 6 and index not in indices:
            run.append(index)
        elif run:
            begin, end = run[0] * 1600, min((run[-1] + 1) * 1600, 8123)
            pieces = [(codes[part], None) for part in run]
            expected[begin:end] = np.concatenate(list(codec.decode_blocks(pieces, end - begin)))
            run = []
    assert_in_16_bits(restored, expected)


@pytest.mark.parametrize("indices", [(0, 1), (2,)])
def test_lost_segments_are_silence_and_the_others_are_as_they_were(segmented, indices, tmp_path):
    """Three chunks of 4 segments of 800 samples at every 760th, the last of one and a very short one."""
    path = encoded(segmented, tmp_path, noise(9 * 760 + 30, 2))
    whole, _ = decoded(segmented, path)
    assert [part.first for part in damaged(path, *indices)] == [indices[0]]
    restored, _ = decoded(segmented, path)
    assert restored.shape == (9 * 760 + 30, 2)
    for index in range(3):
        begin, end = index * 3040 + 40, min((index + 1) * 3040, len(whole))  # 40 samples are shared with the last one
        expected = np.zeros_like(whole[begin:end]) if index in indices else whole[begin:end]
        np.testing.assert_allclose(restored[begin:end], expected, atol=1.01 / 32768)


def test_a_truncated_file_keeps_its_length(causal, tmp_path):
    path = encoded(causal, tmp_path, noise(8123))
    whole, _ = decoded(causal, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    restored, done = decoded(causal, path)
    assert restored.shape == whole.shape
    first = done.lost[0].first * 1600
    np.testing.assert_allclose(restored[:first], whole[:first], atol=1.01 / 32768)
    assert not restored[first:].any()
    assert done.notes == ("one of the two copies of its header is damaged or missing; the other was read",)


def test_memory_does_not_grow_with_the_recording(causal, tmp_path):
    """Two minutes are 3.8 MB in float32; 10 s of it go through the model at once."""
    encoded(causal, tmp_path, noise(25 * RATE))  # compiles first, middle and last pieces
    decoded(causal, tmp_path / "a.jac")
    soundfile.write(tmp_path / "long.wav", noise(120 * RATE), RATE)
    tracemalloc.start()
    encode_file(causal, tmp_path / "long.wav", tmp_path / "long.jac", num_codebooks=3)
    decode_file(causal, tmp_path / "long.jac", tmp_path / "back.wav")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert soundfile.info(tmp_path / "back.wav").frames == 120 * RATE
    assert peak < 3e6, peak


# Refusals


def test_a_wrong_codec_is_refused_by_name(causal, looking_ahead, tmp_path):
    path = encoded(causal, tmp_path, noise(1000))
    with pytest.raises(
        CodecFileError, match=r"a.jac: was encoded with the codec tiny \(config \w{16}, .*, but ahead \(con"
    ):
        decoded(looking_ahead, path)
    other = tiny_codec.to_codec(tiny_codec.make_codec("other", seed=1))
    with pytest.raises(CodecFileError, match=r"with the codec tiny .*, but another training of other \(config"):
        decoded(other, path)
    again = tiny_codec.to_codec(tiny_codec.make_codec("the same by another name"))
    np.testing.assert_array_equal(decoded(again, path)[0], decoded(causal, path)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codebooks": 5}, "5 codebooks in .*a.jac, but tiny has 1 to 4"),
        ({"channels": 2}, "a.jac: its header has channels 2; expected 1 for tiny"),
        ({"chunk_samples": 1601}, "chunk_samples 1601; expected 1600 for tiny"),
        ({"sample_rate": 9000, "codebook_size": 32}, "sample_rate 9000; expected 8000, codebook_size 32; expected 16"),
    ],
)
def test_a_header_that_does_not_fit_its_codec_is_refused(causal, tmp_path, change, message):
    header = dataclasses.replace(file_header(causal, 4), **change)
    file = io.BytesIO()
    writer = CodecWriter(file, header)
    writer.add(np.zeros((header.num_codebooks, 80), np.int32))
    writer.finish(1600)
    (tmp_path / "a.jac").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match=message):
        decoded(causal, tmp_path / "a.jac")


def test_more_codebooks_than_the_model_has_are_refused(causal, tmp_path):
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"{count} codebooks asked for, but tiny has 1 to 4"):
            encoded(causal, tmp_path, noise(100), num_codebooks=count)


def test_recordings_that_cannot_be_encoded_are_named_and_leave_nothing(causal, segmented, tmp_path):
    broken = noise(3000)
    broken[2000] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", noise(0), RATE)
    soundfile.write(tmp_path / "three.wav", noise(100, 3), RATE)
    (tmp_path / "empty.wav").touch()
    for codec, name, message in (
        (causal, "nan", "nan.wav: a sample of channel 1 is nan at 0.2500 s"),
        (causal, "none", "none.wav: has a header but no samples"),
        (causal, "empty", r"empty.wav: is empty \(0 bytes\)"),
        (segmented, "three", "three.wav: has 3 channels; expected 2, or 1"),
    ):
        with pytest.raises(AudioError, match=message):
            encode_file(codec, tmp_path / f"{name}.wav", tmp_path / "out" / "a.jac", num_codebooks=2)
    assert not list((tmp_path / "out").iterdir())


def test_files_that_exist_are_kept(causal, tmp_path):
    path = encoded(causal, tmp_path, noise(1000))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="a.jac exists; name another file, or give --overwrite"):
        encode_file(causal, tmp_path / "in.wav", path, num_codebooks=1)
    assert path.read_bytes() == before
    with pytest.raises(FileExistsError, match="in.wav exists"):
        decode_file(causal, path, tmp_path / "in.wav")


def test_destinations_that_cannot_be_are_refused(causal, tmp_path):
    path = encoded(causal, tmp_path, noise(1600))
    with pytest.raises(ValueError, match=r"a.mp3: expected a name that ends in .wav or .flac"):
        decode_file(causal, path, tmp_path / "a.mp3")
    data, header = path.read_bytes(), file_header(causal, 3)
    long = dataclasses.replace(header, num_samples=1 << 31)
    path.write_bytes(header_bytes(long) + data[len(header_bytes(header)) :])
    with pytest.raises(ValueError, match=r"a.wav: 268435 s are too much for a .wav; name a .flac"):
        decode_file(causal, path, tmp_path / "a.wav")
