"""EnCodec beside transformers' with random weights: codes of every bandwidth, audio, 48 kHz segments."""

import codec_peers
import numpy as np
import pytest
import torch
from codec_parity import assert_parity, decode, encode, load, model_of, noise


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
    """Each segment at its own loudness, the last ones short, as a batch of unequal lengths."""
    peer = codec_peers.make_encodec("encodec_48khz")
    checkpoint = load(peer, tmp_path)
    config, (waveform, *_) = checkpoint.config, noise(2, 2 * 1188 + 17)
    length, stride = config.segment_length, config.segment_stride
    assert (length, stride) == (1200, 1188)
    with torch.no_grad():
        out = peer.encode(torch.from_numpy(waveform.T[None].copy()), bandwidth=25.6)
        audio = peer.decode(out.audio_codes, out.audio_scales, last_frame_pad_length=out.last_frame_pad_length)[0]
    starts = range(0, len(waveform), stride)
    segments, scales, lengths = np.zeros((len(starts), length, 2), np.float32), [], []
    for row, start in enumerate(starts):
        segment = waveform[start : start + length]
        lengths.append(len(segment))
        scales.append(np.sqrt(np.mean(segment.mean(1) ** 2)) + 1e-8)
        segments[row, : len(segment)] = segment / scales[-1]
    assert lengths == [1200, 1200, 17]
    np.testing.assert_allclose(scales, [float(scale) for scale in out.audio_scales], rtol=1e-6)
    codes = np.asarray(encode(model_of(checkpoint), checkpoint.params, segments, 4, np.asarray(lengths)))
    frames = -(-np.asarray(lengths) // config.hop_length)
    for row, count in enumerate(frames):
        np.testing.assert_array_equal(codes[row, :, :count], out.audio_codes[row, 0, :, :count].numpy())
    pieces = np.asarray(decode(model_of(checkpoint), checkpoint.params, codes, frames))
    np.testing.assert_allclose(pieces[0, :stride] * scales[0], audio[0].numpy().T[:stride], atol=1e-4, rtol=0)
