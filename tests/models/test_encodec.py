"""EnCodec beside transformers' with random weights: codes of every bandwidth, audio, 48 kHz segments."""

import codec_peers
import numpy as np
import pytest
import torch
from codec_parity import assert_parity, load, model_of, noise

from jaxaudio.generate.codec import Codec


def levels_of(peer) -> dict[int, float]:
    """How many codebooks each bandwidth has, and the bandwidth."""
    quantizer = peer.quantizer
    return {quantizer.get_num_quantizers_for_bandwidth(kbps): kbps for kbps in peer.config.target_bandwidths}


@pytest.mark.parametrize("name", codec_peers.ENCODEC)
def test_codes_and_audio_equal_transformers(name, tmp_path):
    peer = codec_peers.make_encodec(name)
    checkpoint = load(peer, tmp_path)
    peer.config.normalize = False  # which the caller does
    levels = levels_of(peer)

    @torch.no_grad()
    def hf_encode(waveform, count):
        return peer._encode_frame(waveform, levels[count])[0]

    assert_parity(checkpoint, hf_encode, torch.no_grad()(peer._decode_frame), sorted(levels))


def test_segments_of_48khz_equal_transformers(tmp_path):
    """Each segment at its own loudness, the last one short, faded into each other."""
    peer = codec_peers.make_encodec("encodec_48khz")
    checkpoint = load(peer, tmp_path)
    config, (waveform, *_) = checkpoint.config, noise(2, 2 * 1188 + 17)
    assert (config.segment_length, config.segment_stride) == (1200, 1188)
    with torch.no_grad():
        out = peer.encode(torch.from_numpy(waveform.T[None].copy()), bandwidth=25.6)
        audio = peer.decode(out.audio_codes, out.audio_scales, last_frame_pad_length=out.last_frame_pad_length)[0]
    codec = Codec("peer", model_of(checkpoint), checkpoint.params)
    encoded = codec.encode(waveform, num_codebooks=4)
    np.testing.assert_allclose(encoded.scales, [float(scale) for scale in out.audio_scales], rtol=1e-6)
    frames = [40, 40, 1]  # the last segment has 17 samples; what transformers stacks below it is no code
    expected = [codes[0, :, :count] for codes, count in zip(out.audio_codes.numpy(), frames, strict=True)]
    np.testing.assert_array_equal(encoded.codes, np.concatenate(expected, axis=1))
    np.testing.assert_allclose(codec.decode(encoded), audio[0].numpy().T[: len(waveform)], atol=1e-4, rtol=0)
