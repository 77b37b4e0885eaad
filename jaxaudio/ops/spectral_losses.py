"""Losses between a recording and its reconstruction over samples and over mel spectrograms of several resolutions.

Each is a scalar for a whole batch, target and reconstruction (B, A, channels) in [-1, 1], the mean over rows and
channels; crops should be equally long, nothing is masked. All windows are Hann's, hops a quarter of the window.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaudio.ops import stft
from jaxaudio.ops.mel import filter_energies, mel_filters

Waveforms = Float[Array, "B A channels"]


def waveform_l1_loss(target: Waveforms, reconstruction: Waveforms) -> Float[Array, ""]:
    """Mean absolute difference of the samples (EnCodec's time loss)."""
    return jnp.mean(jnp.abs(target - reconstruction))


def soundstream_mel_loss(
    target: Waveforms,
    reconstruction: Waveforms,
    *,
    sample_rate: int,
    win_lengths: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
    num_mels: int = 64,
    floor: float = 1e-5,
) -> Float[Array, ""]:
    """Sum over windows s and frames of |S - S^|_1 + sqrt(s / 2) |log S - log S^|_2: SoundStream equations 6 and 7.

    The norms are over the mels of a frame; frames are summed as printed, rows averaged. The paper leaves open: S is of
    magnitudes, filters are Slaney's, the logarithm is natural and of at least `floor`, the ends are mirrored for
    A / hop frames.

    Args:
      target, reconstruction: samples, more than 3/8 of the longest window of them.
      sample_rate: in Hz.
      win_lengths, num_mels: of the spectrograms.
      floor: least mel under the logarithm.
    """

    def distance(win_length):
        filters = mel_filters(num_mels, win_length, sample_rate)
        ours, theirs = (
            filter_energies(_safe_sqrt(_power(_padded(x, win_length), win_length)), filters)
            for x in (reconstruction, target)
        )
        logs = jnp.log(jnp.maximum(ours, floor)) - jnp.log(jnp.maximum(theirs, floor))
        per_frame = jnp.sum(jnp.abs(ours - theirs), axis=-1) + np.sqrt(win_length / 2) * _safe_sqrt(
            jnp.sum(logs**2, axis=-1)
        )
        return jnp.mean(jnp.sum(per_frame, axis=-1))

    return sum(distance(win_length) for win_length in win_lengths)


def encodec_mel_loss(
    target: Waveforms,
    reconstruction: Waveforms,
    *,
    sample_rate: int,
    win_lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
    num_mels: int = 64,
    alpha: float = 1.0,
) -> Float[Array, ""]:
    """Mean over windows of mean |S - S^| + alpha mean (S - S^)^2, S mels of a normalized STFT: EnCodec equation 1.

    The paper leaves open: both distances are means over mels and frames, S is of powers as audiocraft's, the STFT is
    divided by the norm of its window, filters are HTK's without normalization, ends are mirrored for A / hop frames.

    Args:
      target, reconstruction, sample_rate, win_lengths, num_mels: as in `soundstream_mel_loss`.
      alpha: weight of the squares, 1 in the paper.
    """

    def distance(win_length):
        ours, theirs = (_torchaudio_mel(x, win_length, num_mels, sample_rate, 0.0) for x in (reconstruction, target))
        return jnp.mean(jnp.abs(ours - theirs)) + alpha * jnp.mean((ours - theirs) ** 2)

    return sum(distance(win_length) for win_length in win_lengths) / len(win_lengths)


def audiocraft_mel_loss(
    target: Waveforms,
    reconstruction: Waveforms,
    *,
    sample_rate: int,
    win_lengths: Sequence[int] = (64, 128, 256, 512, 1024),
    num_mels: int = 64,
    fmin: float = 64.0,
    floor: float = 1e-5,
) -> Float[Array, ""]:
    """Mean over windows of (mean |S - S^| + mean (log10(floor + S) - log10(floor + S^))^2) / 2: audiocraft's "msspec".

    S are mel powers of an STFT that is divided by the norm of its window.

    Args:
      target, reconstruction, sample_rate, win_lengths, num_mels: as in `soundstream_mel_loss`.
      fmin: lowest frequency of the filters in Hz.
      floor: added to the mels under the logarithm.
    """

    def distance(win_length):
        ours, theirs = (_torchaudio_mel(x, win_length, num_mels, sample_rate, fmin) for x in (reconstruction, target))
        logs = jnp.log10(floor + ours) - jnp.log10(floor + theirs)
        return jnp.mean(jnp.abs(ours - theirs)) + jnp.mean(logs**2)

    return sum(distance(win_length) for win_length in win_lengths) / (2 * len(win_lengths))


def dac_mel_loss(
    target: Waveforms,
    reconstruction: Waveforms,
    *,
    sample_rate: int,
    win_lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
    num_mels: Sequence[int] = (5, 10, 20, 40, 80, 160, 320),
    floor: float = 1e-5,
) -> Float[Array, ""]:
    """Sum over windows of the mean absolute difference of log10 mels of magnitudes, at least `floor`: DAC section 3.5.

    Filters are Slaney's; frames are centred, the ends mirrored.

    Args:
      target, reconstruction: samples, more than half the longest window of them.
      sample_rate: in Hz.
      win_lengths, num_mels: of the spectrograms, a number of mels for every window.
      floor: least mel under the logarithm.
    Raises:
      ValueError: not one number of mels for every window; the message carries both.
    """
    if len(win_lengths) != len(num_mels):
        raise ValueError(f"expected a number of mels for every window, got {num_mels} for windows {win_lengths}")

    def distance(win_length, num_mels):
        filters = mel_filters(num_mels, win_length, sample_rate)
        margin = win_length // 2
        ours, theirs = (
            jnp.log10(
                jnp.maximum(filter_energies(_safe_sqrt(_power(_reflected(x, margin), win_length)), filters), floor)
            )
            for x in (reconstruction, target)
        )
        return jnp.mean(jnp.abs(ours - theirs))

    return sum(distance(*scale) for scale in zip(win_lengths, num_mels, strict=True))


def _torchaudio_mel(waveform: jax.Array, win_length: int, num_mels: int, sample_rate: int, fmin: float) -> jax.Array:
    """(rows, T, M) mel powers as torchaudio's MelSpectrogram(normalized=True) gives them."""
    filters = mel_filters(num_mels, win_length, sample_rate, fmin, scale="htk", norm=None)
    energy = float(np.sum(np.square(stft.hann_window(win_length), dtype=np.float64)))
    return filter_energies(_power(_padded(waveform, win_length), win_length) / energy, filters)


def _power(rows: jax.Array, win_length: int) -> jax.Array:
    """(rows, T, F) of the frames that lie inside the rows."""
    return stft.power_spectrum(rows, n_fft=win_length, hop_length=win_length // 4, center=False)


def _padded(waveform: jax.Array, win_length: int) -> jax.Array:
    """(B, A, channels) -> (rows, A'), the ends mirrored, then zeros, for ceil(A / hop) frames."""
    hop_length = win_length // 4
    return jnp.pad(_reflected(waveform, (win_length - hop_length) // 2), ((0, 0), (0, -waveform.shape[1] % hop_length)))


def _reflected(waveform: jax.Array, margin: int) -> jax.Array:
    """(B, A, channels) -> (rows, A + 2 margin), each channel a row, in float32."""
    rows = jnp.swapaxes(waveform, 1, 2).reshape(-1, waveform.shape[1]).astype(jnp.float32)
    return jnp.pad(rows, ((0, 0), (margin, margin)), mode="reflect")


def _safe_sqrt(x: jax.Array) -> jax.Array:
    """sqrt whose gradient at 0 is 0, not infinite, which silence and equal spectra would make NaN."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)
