"""DAC beside transformers' with random weights: even strides as of 44.1 kHz, odd ones as of 24 and 16 kHz."""

import codec_peers
import pytest
import torch
from codec_parity import assert_parity, decode, load, model_of


@pytest.mark.parametrize("name", codec_peers.DAC)
def test_codes_and_audio_equal_transformers(name, tmp_path):
    peer = codec_peers.make_dac(name)
    checkpoint = load(peer, tmp_path)
    hop = checkpoint.config.hop_length

    @torch.no_grad()
    def hf_encode(waveform, count):  # the front-end's padding first
        padded = torch.nn.functional.pad(waveform, (0, -waveform.shape[-1] % hop))
        return peer.encode(padded, n_quantizers=count).audio_codes

    @torch.no_grad()
    def hf_decode(codes):
        return peer.decode(audio_codes=codes).audio_values[:, None]

    assert_parity(checkpoint, hf_encode, hf_decode, range(1, 6))


def test_odd_strides_lose_samples_as_published(tmp_path):
    """16000 samples come back as 15992: one is lost in each of the strides 5, and 8 times as many after the next."""
    peer = codec_peers.make_dac("odd")
    checkpoint = load(peer, tmp_path)
    codes = torch.zeros(1, 5, 4, dtype=torch.int64)
    with torch.no_grad():
        expected = peer.decode(audio_codes=codes).audio_values.shape[-1]
    assert expected == 4 * 30 - 8  # a sample in stride 5, which 6 follow, and one in stride 3, which 2 follow
    assert decode(model_of(checkpoint), checkpoint.params, codes.int().numpy()).shape == (1, expected, 1)
