"""EnCodec: a convolutional codec with an LSTM, at many bitrates.

Defossez et al. 2022, https://arxiv.org/abs/2210.13438; the 32 and 16 kHz models are MusicGen's and AudioGen's (Copet et
al. 2023, https://arxiv.org/abs/2306.05284, section 3.1). Sizes and padding are those of the released models.
"""

import dataclasses

from jaxaudio.nn.codec import Codec, CodecConfig
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.nn.seanet import SEANetConfig


@dataclasses.dataclass(frozen=True)
class EnCodecConfig(CodecConfig):
    """Sizes of one model.

    Attributes:
      segment_s, segment_overlap: seconds and share of the pieces that are coded one by one, each at its own loudness,
        which the decoder is told (48 kHz, section 3.1); None codes the whole.
    """

    segment_s: float | None = None
    segment_overlap: float = 0.01

    @property
    def causal(self) -> bool:
        """Whether frames can be coded as they come."""
        return self.seanet.causal and self.segment_s is None

    @property
    def segment_length(self) -> int | None:
        """Samples of a segment."""
        return None if self.segment_s is None else round(self.segment_s * self.sample_rate)

    @property
    def segment_stride(self) -> int | None:
        """Samples from the begin of one segment to the next one's."""
        return None if self.segment_s is None else max(1, int((1 - self.segment_overlap) * self.segment_length))


def _rvq(num_codebooks: int, codebook_size: int = 1024) -> RVQConfig:
    return RVQConfig(num_codebooks, codebook_size, codebook_dim=128, embed_dim=128)


def _audiocraft(sample_rate: int, strides: tuple[int, ...]) -> EnCodecConfig:
    seanet = SEANetConfig(num_filters=64, strides=strides, causal=False, pad_mode="zeros", conv_shortcut=False)
    return EnCodecConfig(sample_rate, seanet, _rvq(4, 2048), (2.2,))


PRESETS: dict[str, EnCodecConfig] = {
    "encodec_24khz": EnCodecConfig(24_000, SEANetConfig(), _rvq(32), (1.5, 3.0, 6.0, 12.0, 24.0)),
    "encodec_48khz": EnCodecConfig(
        48_000,
        SEANetConfig(channels=2, causal=False, norm="group"),
        _rvq(16),
        (3.0, 6.0, 12.0, 24.0),
        segment_s=1.0,
    ),
    "encodec_32khz": _audiocraft(32_000, (4, 4, 5, 8)),
    "encodec_16khz": _audiocraft(16_000, (2, 4, 5, 8)),
}


class EnCodec(Codec):
    """Waveform to codes and back; segments and their loudness are `generate.codec`'s."""

    config: EnCodecConfig
