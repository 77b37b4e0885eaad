"""Which networks judge a waveform: the discriminators of SoundStream, EnCodec, audiocraft and DAC as frozen configs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """Waveform networks at several resolutions: SoundStream section 3.4 and Fig. 2, after MelGAN.

    Attributes:
      downsampling: how much lower than the waveform's is each network's rate, a power of 2. audiocraft's are all 1: it
        computes the lower rates and drops them.
      features: of the first convolution.
      max_features: of any.
      kernel_sizes: of the first convolution and the last two; the strided ones have 10 * stride + 1.
      strides: of the grouped convolutions, which also multiply the features.
      groups: of these. SoundStream's groups have 4 channels each; audiocraft has 4 groups in each.
      negative_slope: of the leaky ReLU; not in SoundStream's paper (MelGAN has 0.2).

    Raises:
      ValueError: a downsampling that is not a power of 2; the message carries all.
    """

    downsampling: tuple[int, ...] = (1, 2, 4)
    features: int = 16
    max_features: int = 1024
    kernel_sizes: tuple[int, int, int] = (15, 5, 3)
    strides: tuple[int, ...] = (4, 4, 4, 4)
    groups: tuple[int, ...] = (4, 16, 64, 256)
    negative_slope: float = 0.2

    def __post_init__(self):
        if any(factor < 1 or factor & (factor - 1) for factor in self.downsampling):
            raise ValueError(f"each downsampling must be a power of 2, got {self.downsampling}")


@dataclasses.dataclass(frozen=True)
class PeriodConfig:
    """Networks over every p-th sample: HiFi-GAN's, as in DAC (section 3.4) and audiocraft.

    Attributes:
      periods: in samples.
      features: of the convolutions, all with the stride but the last.
      kernel_sizes: of these convolutions and of the one that gives the logits.
      stride: over time.
      negative_slope: of the leaky ReLU.
      always_pad: DAC's code appends a whole period to a waveform of whole periods too; others append nothing to it.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    features: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    kernel_sizes: tuple[int, int] = (5, 3)
    stride: int = 3
    negative_slope: float = 0.1
    always_pad: bool = True


@dataclasses.dataclass(frozen=True)
class ResidualSTFTConfig:
    """SoundStream's network over one complex spectrogram (section 3.4 and Fig. 4).

    Attributes:
      win_length, hop_length: of the STFT, in samples.
      features: of the first convolution.
      kernel_size: of the first convolution.
      multipliers: of the features by each block. Read off a figure; not verified.
      strides: of each block over (time, frequency).
      negative_slope: of the leaky ReLU, which the paper does not name.
      weight_norm: likewise.
    """

    win_length: int = 1024
    hop_length: int = 256
    features: int = 32
    kernel_size: int = 7
    multipliers: tuple[int, ...] = (2, 2, 1, 2, 1, 2)
    strides: tuple[tuple[int, int], ...] = ((1, 2), (2, 2), (1, 2), (2, 2), (1, 2), (2, 2))
    negative_slope: float = 0.2
    weight_norm: bool = True


@dataclasses.dataclass(frozen=True)
class MultiScaleSTFTConfig:
    """EnCodec's networks over complex spectrograms of several resolutions (section 3.4), hops a quarter of the window.

    Attributes:
      win_lengths: of the STFTs.
      features: of every convolution.
      kernel_size: over (time, frequency), 8 wide in the paper, 9 in the code; the last two are square.
      dilations: over time, of the convolutions that halve the frequencies.
      negative_slope: of the leaky ReLU.
      first_weight_norm: whether the first convolution has weight norm too; no public code has.
    """

    win_lengths: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    features: int = 32
    kernel_size: tuple[int, int] = (3, 9)
    dilations: tuple[int, ...] = (1, 2, 4)
    negative_slope: float = 0.2
    first_weight_norm: bool = False


@dataclasses.dataclass(frozen=True)
class MultiBandConfig:
    """DAC's networks over bands of complex spectrograms of several resolutions (section 3.4), hops a quarter.

    Attributes:
      win_lengths: of the STFTs.
      bands: limits of the bands as fractions of the bins, rounded down; a convolution stack for each.
      features: of every convolution.
      kernel_size: over (time, frequency); the last two are square.
      num_strided: convolutions that halve the frequencies.
      negative_slope: of the leaky ReLU.
    """

    win_lengths: tuple[int, ...] = (2048, 1024, 512)
    bands: tuple[tuple[float, float], ...] = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
    features: int = 32
    kernel_size: tuple[int, int] = (3, 9)
    num_strided: int = 3
    negative_slope: float = 0.1


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Which families of networks judge a waveform (None: not this one), in the order of their outputs.

    Attributes:
      scales, periods, residual_stft, multi_scale_stft, multi_band: the families.
      normalize: takes the mean off each row and scales its peak to 0.8 first, as DAC does.
    """

    scales: ScaleConfig | None = None
    periods: PeriodConfig | None = None
    residual_stft: ResidualSTFTConfig | None = None
    multi_scale_stft: MultiScaleSTFTConfig | None = None
    multi_band: MultiBandConfig | None = None
    normalize: bool = False


PRESETS: dict[str, DiscriminatorConfig] = {
    "soundstream": DiscriminatorConfig(scales=ScaleConfig(), residual_stft=ResidualSTFTConfig()),
    "encodec_24khz": DiscriminatorConfig(multi_scale_stft=MultiScaleSTFTConfig(kernel_size=(3, 8))),
    "encodec_48khz": DiscriminatorConfig(
        multi_scale_stft=MultiScaleSTFTConfig(win_lengths=(4096, 2048, 1024, 512, 256), kernel_size=(3, 8))
    ),
    # What EnCodec's published code does without arguments.
    "encodec_code": DiscriminatorConfig(multi_scale_stft=MultiScaleSTFTConfig(win_lengths=(1024, 2048, 512))),
    "audiocraft": DiscriminatorConfig(
        multi_scale_stft=MultiScaleSTFTConfig(win_lengths=(1024, 2048, 512, 256, 128), negative_slope=0.3)
    ),
    "dac": DiscriminatorConfig(periods=PeriodConfig(), multi_band=MultiBandConfig(), normalize=True),
}
