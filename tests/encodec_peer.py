"""The public package `encodec` as a peer: its language model, MS-STFT discriminator and arithmetic coder.

Install it by `pip install --no-deps encodec==0.1.1`, as .ci/run does: it asks for torchaudio, of which PyPI has
builds for CUDA only, and beside PyTorch's CPU build they do not load, nor does transformers once they are installed.
All that the package takes from torchaudio is below. A test without the package is skipped and says so.
"""

import sys
import types

import pytest
import torch

torch.set_num_threads(1)


class Spectrogram(torch.nn.Module):
    """Complex STFT (B, channels, n_fft // 2 + 1, frames) without padding, with torchaudio's arguments and buffer."""

    def __init__(
        self, n_fft, *, hop_length, win_length, window_fn, normalized=True, center=False, pad_mode=None, power=None
    ):
        super().__init__()
        assert normalized, "the peer always divides by the window's norm"
        assert not center, "the peer never pads"
        assert power is None, "the peer always takes the complex values"
        self.n_fft, self.hop_length, self.win_length = n_fft, hop_length, win_length
        self.register_buffer("window", window_fn(win_length))

    def forward(self, waveform):
        batch, channels, length = waveform.shape
        frames = torch.stft(
            waveform.reshape(-1, length),
            self.n_fft,
            self.hop_length,
            self.win_length,
            self.window,
            center=False,
            return_complex=True,
        )
        return frames.reshape(batch, channels, *frames.shape[1:]) / self.window.square().sum().sqrt()


def encodec_package() -> types.ModuleType:
    """The package with the submodules model, modules, msstftd, binary and quantization.ac."""
    stub = types.ModuleType("torchaudio")
    stub.transforms = types.SimpleNamespace(Spectrogram=Spectrogram)
    before = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = stub
    try:
        import encodec
        import encodec.binary
        import encodec.model
        import encodec.modules
        import encodec.msstftd
        import encodec.quantization.ac
    except ModuleNotFoundError as error:
        if error.name != "encodec":
            raise
        pytest.skip("the peer is absent: pip install --no-deps encodec==0.1.1")
    finally:  # transformers looks for the real one
        del sys.modules["torchaudio"]
        if before is not None:
            sys.modules["torchaudio"] = before
    return encodec
