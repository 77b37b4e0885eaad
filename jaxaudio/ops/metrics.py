"""How far a reconstruction is from its reference, and how a quantizer uses its codebooks."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxaudio.ops.mel import filter_energies, mel_filters
from jaxaudio.ops.stft import power_spectrum

_LEAST = 1e-5  # before a logarithm


@jax.jit
def si_sdr(estimate: Float[Array, "B A"], reference: Float[Array, "B A"]) -> Float[Array, "B"]:
    """Scale-invariant signal-to-distortion ratio in decibels; more is better.

    Le Roux et al. 2019, https://arxiv.org/abs/1811.02508, equation 3: the estimate is the reference times the scale
    that fits it best, the signal, and a rest, the distortion. The means stay in; see `si_snr`.

    Returns:
      10 log10(|signal|^2 / |distortion|^2) of each row: inf where the estimate is the reference times a number, -inf
      where it has nothing of it or is silent, NaN where the reference is silent.
    """
    estimate, reference = estimate.astype(jnp.float32), reference.astype(jnp.float32)
    scale = _products(estimate, reference) / _products(reference, reference)
    signal = scale[:, None] * reference
    distortion = estimate - signal
    signal, distortion = _products(signal, signal), _products(distortion, distortion)
    # A silent estimate has neither, and is as bad as one that has nothing of the reference.
    return jnp.where(signal == 0, -jnp.inf, 10 * (jnp.log10(signal) - jnp.log10(distortion)))


@jax.jit
def si_snr(estimate: Float[Array, "B A"], reference: Float[Array, "B A"]) -> Float[Array, "B"]:
    """`si_sdr` after each waveform has lost its mean: what EnCodec's paper calls SI-SNR, and DAC's SI-SDR."""
    return si_sdr(_centred(estimate), _centred(reference))


def _products(a, b):
    return jnp.einsum("BA,BA->B", a, b, precision=lax.Precision.HIGHEST)


def _centred(waveform):
    waveform = waveform.astype(jnp.float32)
    return waveform - waveform.mean(axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("sample_rate", "num_mels", "win_lengths"))
def multi_scale_mel_distance(
    estimate: Float[Array, "B A"],
    reference: Float[Array, "B A"],
    *,
    sample_rate: int,
    num_mels: Sequence[int] = (5, 10, 20, 40, 80, 160, 320),
    win_lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
) -> Float[Array, "B"]:
    """DAC's mel distance: the mean absolute difference of log10 mel magnitudes, summed over the scales; less is better.

    Kumar et al. 2023, https://arxiv.org/abs/2306.06546, sections 3.5 and 4.3. Hann windows, hops of a quarter, ends
    reflected; mels of magnitudes, not of powers, and at least 1e-5; Slaney's filters from 0 Hz to half the sample rate.
    A distance belongs to its sample rate: compare at one.

    Args:
      estimate, reference: samples in [-1, 1]; the channels of a stereo recording are rows of their own.
      sample_rate: in Hz.
      num_mels, win_lengths: one of each for every scale.
    Raises:
      ValueError: not one number of mels for every window, or a waveform of half the longest window or less, which
        cannot be reflected; the message carries the values.
    """
    if len(num_mels) != len(win_lengths):
        raise ValueError(f"expected one of num_mels for each of win_lengths, got {num_mels} and {win_lengths}")
    distance = jnp.zeros(estimate.shape[0])
    for num, win_length in zip(num_mels, win_lengths, strict=True):
        filters = mel_filters(num, win_length, sample_rate)
        mels = [filter_energies(_magnitudes(waveform, win_length), filters) for waveform in (estimate, reference)]
        distance += _mean_difference(*(jnp.log10(jnp.maximum(mel, _LEAST)) for mel in mels))
    return distance


@functools.partial(jax.jit, static_argnames=("win_lengths",))
def multi_scale_stft_distance(
    estimate: Float[Array, "B A"],
    reference: Float[Array, "B A"],
    *,
    win_lengths: Sequence[int] = (2048, 512),
) -> Float[Array, "B"]:
    """DAC's STFT distance: mean absolute differences of log10 powers and of magnitudes, summed over the windows.

    Kumar et al. 2023, section 4.3, as its released evaluation has it (the paper names the logarithms alone). Hann
    windows, hops of a quarter, ends reflected; magnitudes under the logarithm are at least 1e-5. Less is better.

    Args:
      estimate, reference: samples in [-1, 1]; the channels of a stereo recording are rows of their own.
      win_lengths: in samples.
    Raises:
      ValueError: a waveform of half the longest window or less; the message carries both.
    """
    distance = jnp.zeros(estimate.shape[0])
    for win_length in win_lengths:
        magnitudes = [_magnitudes(waveform, win_length) for waveform in (estimate, reference)]
        logs = [2 * jnp.log10(jnp.maximum(magnitude, _LEAST)) for magnitude in magnitudes]
        distance += _mean_difference(*logs) + _mean_difference(*magnitudes)
    return distance


def _magnitudes(waveform, win_length):
    return jnp.sqrt(power_spectrum(waveform, n_fft=win_length, hop_length=win_length // 4))


def _mean_difference(a, b):
    return jnp.abs(a - b).mean(axis=(1, 2))


@functools.partial(jax.jit, static_argnames=("codebook_size",))
def codebook_perplexity(codes: Int[Array, "B Q T"], codebook_size: int) -> Float[Array, "Q"]:
    """exp of the entropy of each codebook's use: codebook_size where all codes are equally frequent, 1 where it is one.

    NaN for a codebook of which a code is not from 0 to codebook_size - 1.
    """
    counts = jax.vmap(lambda level: jnp.bincount(level.ravel(), length=codebook_size), in_axes=1)(codes)
    share = counts / (codes.shape[0] * codes.shape[2])
    nats = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=1)
    is_code = ((codes >= 0) & (codes < codebook_size)).all(axis=(0, 2))
    return jnp.where(is_code, jnp.exp(nats), jnp.nan)
