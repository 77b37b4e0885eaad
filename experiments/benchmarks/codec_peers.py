"""transformers' codecs with random weights, and ours with the same through `convert`."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import transformers

from jaxaudio.convert.codec import load_codec
from jaxaudio.convert.codec_read import MODELS
from jaxaudio.generate.codec import Codec


class Peers(NamedTuple):
    """A codec of ours and transformers' with the same weights.

    codec: ours.
    num_codebooks: that both use.
    encode: waveform (A,) -> codes (Q, T), by transformers.
    decode: codes (Q, T) -> waveform (A,), by transformers.
    """

    codec: Codec
    num_codebooks: int
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]


def make_model(name: str) -> transformers.PreTrainedModel:
    """transformers' model of the published size, its codebooks filled where its latents are.

    Args:
      name: "encodec_24khz", "dac_44khz" or "mimi".
    """
    torch.manual_seed(0)
    if name == "dac_44khz":
        return transformers.DacModel(transformers.DacConfig(sampling_rate=44100)).eval()
    sound = 0.1 * torch.randn(1, 1, 24000)
    if name == "encodec_24khz":
        model = transformers.EncodecModel(transformers.EncodecConfig()).eval()
        with torch.no_grad():
            # Random latents differ little from their mean: without it, fewer distances are equal to the last digits.
            model.encoder.layers[-1].conv.bias -= model.encoder(sound)[0].mean(1)
            _fill(model.quantizer.layers, model.encoder(sound)[0], "embed", "cluster_size")
        return model
    model = transformers.MimiModel(transformers.MimiConfig()).eval()
    quantizer = model.quantizer
    with torch.no_grad():
        latents = model.encoder(sound).latents
        for half in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
            _fill(half.layers, half.input_proj(latents)[0], "embed_sum", "cluster_usage")
    return model


def _fill(layers, latents: torch.Tensor, sums: str, counts: str) -> None:
    """Codes around the latents (D, T), those of later levels nearer to zero; each used once."""
    mean, spread = latents.mean(1), latents.std(1)
    for level, layer in enumerate(layers):
        noise = torch.randn(layer.codebook.codebook_size, len(mean))
        setattr(layer.codebook, sums, (level == 0) * mean + 0.7**level * spread * noise)
        setattr(layer.codebook, counts, torch.ones(len(noise)))


def make_peers(name: str, model: transformers.PreTrainedModel, num_codebooks: int) -> Peers:
    """Loads the model's weights into ours.

    Args:
      name: of the codec, for people.
      model: transformers' EncodecModel, DacModel or MimiModel.
      num_codebooks: that both use.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        checkpoint = load_codec(pathlib.Path(folder))
    config = checkpoint.config
    codec = Codec(name, MODELS[checkpoint.kind][1](config), checkpoint.params)
    kbps = codec.kbps(num_codebooks)

    @torch.inference_mode()
    def encode(waveform):
        batch = torch.from_numpy(waveform)[None, None]
        if checkpoint.kind == "encodec":
            return model.encode(batch, bandwidth=kbps).audio_codes[0, 0].numpy()
        if checkpoint.kind == "mimi":
            return model.encode(batch, num_quantizers=num_codebooks).audio_codes[0].numpy()
        padded = torch.nn.functional.pad(batch, (0, -len(waveform) % config.hop_length))  # as its feature extractor
        return model.encode(padded, n_quantizers=num_codebooks).audio_codes[0].numpy()

    @torch.inference_mode()
    def decode(codes):
        codes = torch.from_numpy(codes).long()[None]
        if checkpoint.kind == "encodec":
            return model.decode(codes[None], [None]).audio_values.numpy().ravel()
        return model.decode(audio_codes=codes).audio_values.numpy().ravel()

    return Peers(codec, num_codebooks, encode, decode)
