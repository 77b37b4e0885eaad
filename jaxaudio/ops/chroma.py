"""Chroma: the energy of each pitch class, over all octaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaudio.ops import stft
from jaxaudio.ops.mel import filter_energies
from jaxaudio.ops.stft import Form, PadMode

_A0_HZ = 27.5


@functools.lru_cache(maxsize=16)
def chroma_filters(sample_rate: int, n_fft: int, num_chroma: int = 12, *, tuning: float = 0.0) -> np.ndarray:
    """Filters from bins to pitch classes, (F, num_chroma) float32: librosa.filters.chroma transposed, class 0 is C.

    Ellis 2007, Chroma feature analysis and synthesis. A bin counts for each class by a Gaussian of their distance, as
    wide as the bin is in classes and at least one class; its weights have unit square sum, times a Gaussian two octaves
    wide around 880 Hz. The array is cached and read-only.

    Args:
      sample_rate: in Hz.
      n_fft: length of the transform; F = n_fft // 2 + 1.
      num_chroma: classes of an octave.
      tuning: how far the music's A4 lies above 440 Hz, in classes.
    Raises:
      ValueError: no class, or an n_fft below 2; the message carries the values.
    """
    if num_chroma < 1 or n_fft < 2:
        raise ValueError(f"expected num_chroma >= 1 and n_fft >= 2, got {num_chroma} and {n_fft}")
    hz = np.arange(1, n_fft) * (sample_rate / n_fft)
    pitch = num_chroma * np.log2(hz / _A0_HZ) - tuning  # in classes above A0
    pitch = np.concatenate([[pitch[0] - 1.5 * num_chroma], pitch])  # the bin at 0 Hz gets a place below the first
    width = np.append(np.maximum(np.diff(pitch), 1), 1)
    half = round(num_chroma / 2)
    distance = (pitch[:, None] - np.arange(num_chroma)[None] + half) % num_chroma - half
    weights = np.exp(-2 * (distance / width[:, None]) ** 2)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    weights *= np.exp(-0.5 * ((pitch / num_chroma - 5) / 2) ** 2)[:, None]
    filters = np.roll(weights, -3 * (num_chroma // 12), axis=1)[: n_fft // 2 + 1].astype(np.float32)  # from A to C
    filters.flags.writeable = False
    return filters


@functools.partial(
    jax.jit, static_argnames=("sample_rate", "n_fft", "hop_length", "num_chroma", "tuning", "pad_mode", "form")
)
def chroma(
    waveform: Float[Array, "B A"],
    *,
    sample_rate: int,
    n_fft: int = 2048,
    hop_length: int = 512,
    num_chroma: int = 12,
    tuning: float = 0.0,
    pad_mode: PadMode = "reflect",
    form: Form = "auto",
) -> Float[Array, "B T C"]:
    """Energy of each pitch class over time, each frame divided by its largest: librosa.feature.chroma_stft.

    Silent frames stay zero. MusicGen's melody (Copet et al. 2023, section 3.1) takes n_fft = 16384, hop_length = 4096
    at 32 kHz and keeps the argmax.

    Args:
      waveform: mono samples.
      sample_rate: in Hz.
      n_fft, hop_length, pad_mode, form: see `jaxaudio.ops.stft.power_spectrum`; librosa pads with "constant".
      num_chroma, tuning: see `chroma_filters`; librosa guesses the tuning unless it is told.
    Raises:
      ValueError: as `stft` and `chroma_filters`.
    """
    power = stft.power_spectrum(waveform, n_fft=n_fft, hop_length=hop_length, pad_mode=pad_mode, form=form)
    energies = filter_energies(power, chroma_filters(sample_rate, n_fft, num_chroma, tuning=tuning))
    largest = energies.max(axis=-1, keepdims=True)
    return energies / jnp.where(largest < jnp.finfo(jnp.float32).tiny, 1, largest)
