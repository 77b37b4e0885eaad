import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudio.generate.codec import Codec, _decode, _encode
from jaxaudio.models.dac import DAC, DACConfig
from jaxaudio.models.encodec import EnCodec, EnCodecConfig
from jaxaudio.models.mimi import Mimi, MimiConfig
from jaxaudio.models.soundstream import SoundStream, SoundStreamConfig
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.nn.seanet import SEANetConfig
from jaxaudio.nn.transformer_config import TransformerConfig

SEANET = SEANetConfig(num_filters=2, embed_dim=4, strides=(2, 3), num_lstm_layers=1)
RVQ = RVQConfig(3, 16, 4, 4)
ZEROS = dataclasses.replace(SEANET, pad_mode="zeros", num_lstm_layers=0, conv_shortcut=False)
MODELS = {
    "encodec": EnCodec(EnCodecConfig(600, SEANET, RVQ, (0.4, 0.8, 1.2))),
    "looks ahead": EnCodec(EnCodecConfig(600, dataclasses.replace(SEANET, causal=False), RVQ)),
    "segments": EnCodec(
        EnCodecConfig(
            600,
            dataclasses.replace(SEANET, causal=False, norm="group", channels=2),
            RVQ,
            segment_s=0.2,
            segment_overlap=0.05,
        )
    ),
    "dac": DAC(
        DACConfig(
            600,
            dataclasses.replace(ZEROS, causal=False, activation="snake", short_transpose=True, dilations=(1, 3)),
            RVQConfig(3, 16, 2, 4, projection="per_level", distance="cosine", learned_by="gradient"),
        )
    ),
    "mimi": Mimi(
        MimiConfig(
            1200,
            ZEROS,
            RVQConfig(3, 16, 2, 4, projection="shared"),
            transformer=TransformerConfig(
                2, 4, 2, 8, window=5, positions="rotary", final_norm=False, layer_scale=0.5, mlp_bias=False
            ),
        )
    ),
    "soundstream": SoundStream(SoundStreamConfig(600, ZEROS, RVQ)),
}
EXACT = [name for name in MODELS if name != "segments"]


def make(name):
    model = MODELS[name]
    waveform = jnp.zeros((1, 60, model.config.channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), waveform, jnp.array([3])))["params"]
    rng = np.random.default_rng(1)
    flat, tree = jax.tree.flatten(jax.tree.map(lambda leaf: rng.uniform(-0.6, 0.6, leaf.shape), shapes))
    return Codec(name, model, jax.tree.unflatten(tree, [leaf.astype(np.float32) for leaf in flat]))


@pytest.fixture(scope="module")
def codecs():
    return {name: make(name) for name in MODELS}


def noise(codec, num_samples, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (num_samples, codec.config.channels)).astype(np.float32)


def whole(codec, waveform, num_codebooks=3):
    """Codes (Q, T) of exactly this waveform, and the waveform of exactly these codes."""
    codes, _ = _encode(codec.model, num_codebooks, True, codec.params, waveform[None], None, None)
    decoded, _ = _decode(codec.model, True, codec.params, codes, None, None)
    return np.asarray(codes[0]), np.asarray(decoded[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_chunks_batches_and_frames_equal_the_whole(codecs, name):
    codec = codecs[name]
    hop, rate = codec.config.hop_length, codec.config.frame_rate
    num_samples = 52 * hop - 1
    waveform = noise(codec, num_samples)
    codes, decoded = whole(codec, waveform)
    assert codes.shape == (3, 52)
    assert len(np.unique(codes)) > 8
    decoded = np.pad(decoded, ((0, num_samples - len(decoded)), (0, 0)))[:num_samples] if name == "dac" else decoded
    decoded = decoded[:num_samples]
    for chunk_s in (10.0, 1 / rate):
        encoded = codec.encode(waveform, chunk_s=chunk_s)
        np.testing.assert_array_equal(encoded.codes, codes)
        assert (encoded.num_samples, encoded.scales) == (num_samples, None)
        restored = codec.decode(encoded, chunk_s=chunk_s)
        assert restored.shape == (num_samples, 1)
        np.testing.assert_allclose(restored, decoded, atol=1e-5)
    lengths = [num_samples, 1, 20 * hop + 1]
    batch = codec.encode_batch([waveform[:length] for length in lengths], num_codebooks=2)
    for length, encoded in zip(lengths, batch, strict=True):
        np.testing.assert_array_equal(encoded.codes, whole(codec, waveform[:length])[0][:2])
        assert (encoded.codes.shape, encoded.num_samples) == ((2, -(-length // hop)), length)


@pytest.mark.parametrize("name", [name for name in EXACT if MODELS[name].config.causal])
def test_a_causal_codec_gives_frames_as_they_come(codecs, name):
    codec = codecs[name]
    hop, rate = codec.config.hop_length, codec.config.frame_rate
    mirrored = 7 if codec.config.seanet.pad_mode == "reflect" else 1
    waveform = noise(codec, 30 * hop)
    blocks = [waveform[i * hop : (i + 1) * hop] for i in range(30)]
    given = 0

    def fed():
        nonlocal given
        for block in blocks:
            given += 1
            yield block

    pieces, counts = [], []
    for codes, _ in codec.encode_blocks(fed(), chunk_s=1 / rate):
        pieces.append(codes)
        counts.append((given, sum(piece.shape[1] for piece in pieces)))
    assert counts == [(n, n) for n in range(mirrored, 31)]
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole(codec, waveform)[0])
    waves = list(codec.decode_blocks(((codes, None) for codes in pieces), chunk_s=1 / rate))
    assert [len(wave) for wave in waves] == [mirrored * hop] + [hop] * (30 - mirrored)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [120, 115, 352])
def test_segments_are_coded_one_by_one(codecs, num_samples):
    """By a slow loop over segments of their own length, faded and summed as the paper's appendix says."""
    codec = codecs["segments"]
    waveform = noise(codec, num_samples)
    length, stride, hop = 120, 114, 6
    total = np.zeros((num_samples + 200, 2))
    weights = np.zeros((num_samples + 200, 1))
    codes, scales = [], []
    time = np.linspace(0, 1, length + 2)[1:-1]
    triangle = (0.5 - np.abs(time - 0.5))[:, None]
    for start in range(0, num_samples, stride):
        segment = waveform[start : start + length]
        scales.append(np.sqrt((segment.mean(1) ** 2).mean()) + 1e-8)
        segment_codes, decoded = whole(codec, segment / np.float32(scales[-1]))
        codes.append(segment_codes)
        assert len(decoded) == -(-len(segment) // hop) * hop
        total[start : start + len(decoded)] += triangle[: len(decoded)] * decoded * scales[-1]
        weights[start : start + len(decoded)] += triangle[: len(decoded)]
    encoded = codec.encode(waveform)
    np.testing.assert_array_equal(encoded.codes, np.concatenate(codes, 1))
    np.testing.assert_allclose(encoded.scales, scales, rtol=1e-5)
    np.testing.assert_allclose(codec.decode(encoded), (total / np.maximum(weights, 1e-9))[:num_samples], atol=1e-5)
    pieces = list(codec.encode_blocks(np.array_split(waveform, 5) if num_samples > 5 else [waveform]))
    np.testing.assert_array_equal(np.concatenate([piece for piece, _ in pieces], 1), encoded.codes)
    if num_samples == 120:
        with pytest.raises(ValueError, match="have 19 frames, got 21"):
            codec.decode(dataclasses.replace(encoded, num_samples=114, scales=encoded.scales[:1]))
        with pytest.raises(ValueError, match="num_samples"):
            list(codec.decode_blocks([(encoded.codes, encoded.scales)]))


def test_bitrates(codecs):
    codec = codecs["encodec"]  # 100 frames of 4 bits
    assert [codec.num_codebooks_for(kbps) for kbps in (0.4, 0.8, 1.2)] == [1, 2, 3]
    assert codec.kbps(3) == pytest.approx(1.2)
    with pytest.raises(ValueError, match=r"no 6 kbps; choose of 0\.4, 0\.8, 1\.2"):
        codec.num_codebooks_for(6.0)
    free = codecs["soundstream"]
    assert free.num_codebooks_for(1.0) == 2
    with pytest.raises(ValueError, match=r"0\.4 to 1\.2 kbps, got 1\.7"):
        free.num_codebooks_for(1.7)
    with pytest.raises(ValueError, match=r"got 0\.3"):
        free.num_codebooks_for(0.3)


def test_errors_name_what_came(codecs):
    codec, stereo = codecs["encodec"], codecs["segments"]
    good = noise(codec, 100)
    with pytest.raises(ValueError, match=r"shape \(samples, 1\), got float32 of shape \(100, 2\)"):
        codec.encode(noise(stereo, 100))
    with pytest.raises(ValueError, match="int16"):
        codec.encode((good * 100).astype(np.int16))
    with pytest.raises(ValueError, match="sample 7 of a block is nan"):
        codec.encode(np.where(np.arange(100)[:, None] == 7, np.nan, good).astype(np.float32))
    for empty in ([], [good[:0]]):
        with pytest.raises(ValueError, match="no samples"):
            list(codec.encode_blocks(empty))
    with pytest.raises(ValueError, match="1 to 3 codebooks, got 4"):
        codec.encode(good, num_codebooks=4)
    codes = codec.encode(good).codes
    with pytest.raises(ValueError, match=r"codes must be in 0..15, got 0..16"):
        list(codec.decode_blocks([(np.arange(17)[None], None)]))
    with pytest.raises(ValueError, match="17 frames are 102 samples, which a recording of 96 has not"):
        list(codec.decode_blocks([(codes, None)], 96))
    with pytest.raises(ValueError, match="no codes"):
        list(codec.decode_blocks([]))
    with pytest.raises(ValueError, match="integers"):
        list(codec.decode_blocks([(codes * 1.0, None)]))


def test_a_minute_goes_through_the_programs_of_a_chunk(codecs):
    codec = codecs["soundstream"]
    before = _encode._cache_size()
    for num_samples in (3600, 3601, 3000, 5000):
        codec.encode(noise(codec, num_samples), chunk_s=1.0)
    assert _encode._cache_size() - before <= 3


def test_config_hash_tells_sizes_apart(codecs):
    assert codecs["encodec"].config_hash == make("encodec").config_hash
    assert len({codec.config_hash for codec in codecs.values()}) == len(codecs)
    assert set(codecs["mimi"].params["encoder_transformer"]["transformer"]["layers"]) == {"0", "1"}
