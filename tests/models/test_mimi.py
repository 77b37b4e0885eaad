"""Mimi beside transformers' with random weights: longer than the attention's window, any number of codebooks."""

import codec_peers
import pytest
import torch
from codec_parity import LENGTHS, assert_parity, load


@pytest.mark.parametrize("name", codec_peers.MIMI)
def test_codes_and_audio_equal_transformers(name, tmp_path):
    peer = codec_peers.make_mimi(name)
    checkpoint = load(peer, tmp_path)
    config = checkpoint.config
    assert LENGTHS[0] / config.seanet.hop_length > 2 * config.transformer.window

    @torch.no_grad()
    def hf_encode(waveform, count):
        return peer.encode(waveform, num_quantizers=count).audio_codes

    @torch.no_grad()
    def hf_decode(codes):
        return peer.decode(codes).audio_values

    assert_parity(checkpoint, hf_encode, hf_decode, range(config.num_semantic, 6))
