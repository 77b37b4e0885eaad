"""Mel filter banks, Whisper's log-mel spectrogram, whole or block by block, and Kaldi's filterbank features."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxaudio.ops import stft
from jaxaudio.ops.stft import Form

Scale = Literal["slaney", "htk", "kaldi"]

# Whisper's front-end: 25 ms windows every 10 ms at 16 kHz.
_SAMPLE_RATE, _N_FFT, _HOP_LENGTH = 16_000, 400, 160
_MARGIN = _N_FFT // 2


def hz_to_mel(hz: np.ndarray, scale: Scale = "slaney") -> np.ndarray:
    """Mels of frequencies: "slaney" is linear below 1 kHz, logarithmic above; the others are log(1 + f/700), scaled."""
    if scale == "slaney":
        return np.where(hz < 1000, 3 * hz / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))
    return (1127 if scale == "kaldi" else 2595 / np.log(10)) * np.log1p(hz / 700)


def mel_to_hz(mel: np.ndarray, scale: Scale = "slaney") -> np.ndarray:
    """Inverse of `hz_to_mel`."""
    if scale == "slaney":
        return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(np.log(6.4) * (np.maximum(mel, 15) - 15) / 27))
    return 700 * np.expm1(mel / (1127 if scale == "kaldi" else 2595 / np.log(10)))


@functools.lru_cache(maxsize=32)
def mel_filters(
    num_mels: int,
    n_fft: int,
    sample_rate: int,
    fmin: float = 0.0,
    fmax: float | None = None,
    *,
    scale: Scale = "slaney",
    norm: Literal["slaney"] | None = "slaney",
) -> np.ndarray:
    """Triangular filters evenly spaced in mels, (F, M) float32 with F = n_fft // 2 + 1: librosa.filters.mel transposed.

    A filter that is narrower than the distance of two bins can miss them all; its column is then zero. The array is
    cached and read-only.

    Args:
      num_mels: number of filters.
      n_fft: length of the transform.
      sample_rate: in Hz.
      fmin, fmax: outer edges of the first and last filter in Hz; fmax is half the sample rate if None.
      scale: "slaney" (Auditory Toolbox; librosa, Whisper), "htk" (torchaudio), or "kaldi", whose triangles are straight
        in mels, not in Hz.
      norm: "slaney" divides each filter by half its width in Hz; None leaves peaks of 1.
    Raises:
      ValueError: not 0 <= fmin < fmax <= sample_rate / 2, or no filter; the message carries the values.
    """
    fmax = sample_rate / 2 if fmax is None else fmax
    if not 0 <= fmin < fmax <= sample_rate / 2 or num_mels < 1:
        raise ValueError(
            f"expected 0 <= fmin < fmax <= sample_rate / 2 = {sample_rate / 2:g} and at least one filter, "
            f"got fmin = {fmin}, fmax = {fmax}, num_mels = {num_mels}"
        )
    bins = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    edges = np.linspace(*hz_to_mel(np.array([fmin, fmax], np.float64), scale), num_mels + 2)
    edges_hz = mel_to_hz(edges, scale)
    if scale == "kaldi":
        bins = hz_to_mel(bins, scale)
    else:
        edges = edges_hz
    widths = np.diff(edges)
    rising = (bins[:, None] - edges[None, :-2]) / widths[None, :-1]
    falling = (edges[None, 2:] - bins[:, None]) / widths[None, 1:]
    filters = np.maximum(np.minimum(rising, falling), 0).astype(np.float32)
    if norm == "slaney":
        filters *= 2 / (edges_hz[2:] - edges_hz[:-2])
    filters.flags.writeable = False
    return filters


def filter_energies(power: Float[Array, "B T F"], filters: np.ndarray) -> Float[Array, "B T M"]:
    """power @ filters, in full float32 also where products are rounded to fewer bits by default (GPU, TPU)."""
    return jnp.einsum("BTF,FM->BTM", power, jnp.asarray(filters), precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("num_mels", "form"))
def log10_mel(samples: Float[Array, "B A"], num_mels: int = 80, form: Form = "auto") -> Float[Array, "B T M"]:
    """log10 of Whisper's mel energies, at least 1e-10, of the frames that lie wholly inside the samples.

    Whisper's spectrogram before normalisation and without padding: T = 1 + (A - 400) // 160. A block of a longer signal
    gives the frames of that signal that lie in the block.

    Args:
      samples: mono at 16 kHz, at least 400.
      num_mels: 80, or 128 since large-v3.
      form: see `jaxaudio.ops.stft.power`.
    """
    frames = stft.frame(samples.astype(jnp.float32), _N_FFT, _HOP_LENGTH) * stft.hann_window(_N_FFT)[None, None]
    energies = filter_energies(stft.power(frames, form=form), mel_filters(num_mels, _N_FFT, _SAMPLE_RATE))
    return jnp.log10(jnp.maximum(energies, 1e-10))


def normalize_log_mel(log_mel: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
    """Clips each example to 8 decades below its own maximum, then (x + 4) / 4: a range of 2 at most."""
    floor = jnp.max(log_mel, axis=(1, 2), keepdims=True) - 8
    return (jnp.maximum(log_mel, floor) + 4) / 4


@functools.partial(jax.jit, static_argnames=("num_mels", "form"))
def whisper_log_mel(waveform: Float[Array, "B A"], num_mels: int = 80, form: Form = "auto") -> Float[Array, "B T M"]:
    """Whisper's log-mel features: 25 ms periodic Hann window, 10 ms hop, power, Slaney's mels, log10.

    Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.2, and the released code: the ends are reflected,
    and the last frame is dropped, so T = A // 160. Unlike there, each example of a batch is normalised by its own
    maximum, so that its features do not depend on its neighbours.

    Args:
      waveform: mono samples in [-1, 1] at 16 kHz. Whisper's window is 30 s: pad shorter ones with zeros to 480000
        samples first.
      num_mels: 80, or 128 since large-v3.
      form: see `jaxaudio.ops.stft.power`.
    Raises:
      ValueError: fewer than 201 samples, which cannot be reflected; the message carries the number.
    """
    num_samples = waveform.shape[1]
    _check_reflectable(num_samples)
    padded = jnp.pad(waveform, ((0, 0), (_MARGIN, _MARGIN)), mode="reflect")
    kept = num_samples // _HOP_LENGTH * _HOP_LENGTH + _N_FFT - _HOP_LENGTH  # without the last frame
    return normalize_log_mel(log10_mel(padded[:, :kept], num_mels, form))


def _check_reflectable(num_samples: int) -> None:
    if num_samples <= _MARGIN:
        raise ValueError(
            f"reflecting the ends needs at least {_MARGIN + 1} samples, got {num_samples}; pad with zeros first, "
            "Whisper's own window to 480000 samples"
        )


def log10_mel_block(
    tail: Float[Array, "B R"], block: Float[Array, "B A"], num_mels: int = 80, form: Form = "auto"
) -> tuple[Float[Array, "B T M"], Float[Array, "B S"]]:
    """The frames that a block of a stream completes; all of a stream's blocks give the frames of the whole.

        tail = jnp.zeros((batch, 0))
        for block in blocks:
            log_mel, tail = log10_mel_block(tail, block)
        log_mel = log10_mel_end(tail)

    Together these are `whisper_log_mel` before normalisation. Blocks may have any length, none included; equal blocks
    of a multiple of 160 samples compile once they flow, others once for every pair of lengths.

    Args:
      tail: the samples of earlier blocks that later frames need, fewer than 400; none at first.
      block: the next samples, mono at 16 kHz.
      num_mels: 80, or 128 since large-v3.
      form: see `jaxaudio.ops.stft.power`.
    Returns:
      The new frames, T >= 0, and the tail for the next block.
    """
    raw = tail.shape[1] <= _MARGIN  # nothing was reflected yet: after that, a tail has 240 samples or more
    samples = jnp.concatenate([tail.astype(jnp.float32), block.astype(jnp.float32)], axis=1)
    if raw and samples.shape[1] > _MARGIN:
        samples = jnp.pad(samples, ((0, 0), (_MARGIN, 0)), mode="reflect")
    if samples.shape[1] < _N_FFT:
        return jnp.zeros((samples.shape[0], 0, num_mels)), samples
    log_mel = log10_mel(samples, num_mels, form)
    return log_mel, samples[:, log_mel.shape[1] * _HOP_LENGTH :]


def log10_mel_end(tail: Float[Array, "B R"], num_mels: int = 80, form: Form = "auto") -> Float[Array, "B T M"]:
    """The last frame of a stream, if it still lacks one: T is 0 or 1. Its end is reflected.

    Args:
      tail: from the last `log10_mel_block`.
      num_mels, form: as before.
    Raises:
      ValueError: the whole stream had fewer than 201 samples; the message carries the number.
    """
    batch, length = tail.shape
    _check_reflectable(length)
    missing = _N_FFT - length
    if missing > _N_FFT // 10:  # the frame that Whisper drops is centred on the last whole hop
        return jnp.zeros((batch, 0, num_mels))
    return log10_mel(jnp.pad(tail, ((0, 0), (0, missing)), mode="reflect"), num_mels, form)


@functools.partial(
    jax.jit,
    static_argnames=(
        "sample_rate", "num_mels", "frame_length", "hop_length", "window", "preemphasis", "fmin", "fmax", "snip_edges",
        "gain", "floor", "form",
    ),
)  # fmt: skip
def kaldi_fbank(
    waveform: Float[Array, "B A"],
    *,
    sample_rate: int = 16_000,
    num_mels: int = 80,
    frame_length: int = 400,
    hop_length: int = 160,
    window: Literal["povey", "hann"] = "povey",
    preemphasis: float = 0.97,
    fmin: float = 20.0,
    fmax: float | None = None,
    snip_edges: bool = True,
    gain: float = 2.0**15,
    floor: float = 2.0**-23,
    form: Form = "auto",
) -> Float[Array, "B T M"]:
    """Kaldi's log filterbank energies as compute-fbank-feats and torchaudio.compliance.kaldi.fbank give them.

    Conventions: samples in the range of 16-bit integers; each frame on its own loses its mean, is pre-emphasised
    (its first sample as if it stood before itself), windowed, and padded with zeros to a power of two; power; triangles
    straight in mels = 1127 ln(1 + f/700) without normalisation; natural logarithm. No dither, no energy column,
    no mean subtraction over the utterance.

    Args:
      waveform: mono samples in [-1, 1].
      sample_rate: in Hz.
      num_mels: number of filters.
      frame_length, hop_length: in samples.
      window: "povey" is a symmetric Hann window to the power 0.85; "hann" is symmetric too.
      preemphasis: how much of the sample before is subtracted.
      fmin, fmax: edges of the filters in Hz; fmax is half the sample rate if None.
      snip_edges: True keeps the frames that lie inside the waveform, T = 1 + (A - frame_length) // hop_length; False
        gives (A + hop_length // 2) // hop_length frames, centred on their hops, the ends mirrored, edge samples twice.
      gain: 2^15 makes 16-bit values of [-1, 1]; 1 where a model was fed [-1, 1] itself (AST).
      floor: smallest energy before the logarithm; Kaldi's is float32's epsilon.
      form: see `jaxaudio.ops.stft.power`.
    Raises:
      ValueError: the waveform is shorter than a frame, or a bad range of frequencies; the message carries the values.
    """
    samples = waveform.astype(jnp.float32) * gain
    if not snip_edges:
        num_frames = (samples.shape[1] + hop_length // 2) // hop_length
        before = frame_length // 2 - hop_length // 2
        after = (num_frames - 1) * hop_length + frame_length - before - samples.shape[1]
        samples = jnp.pad(samples, ((0, 0), (max(before, 0), max(after, 0))), mode="symmetric")
        samples = samples[:, max(-before, 0) :]
    frames = stft.frame(samples, frame_length, hop_length)
    frames -= frames.mean(axis=-1, keepdims=True)
    previous = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    frames = (frames - preemphasis * previous) * _symmetric_window(window, frame_length)[None, None]
    n_fft = 1 << (frame_length - 1).bit_length()
    filters = mel_filters(num_mels, n_fft, sample_rate, fmin, fmax, scale="kaldi", norm=None)
    return jnp.log(jnp.maximum(filter_energies(stft.power(frames, n_fft=n_fft, form=form), filters), floor))


def _symmetric_window(name: str, length: int) -> np.ndarray:
    return (np.hanning(length) ** (0.85 if name == "povey" else 1.0)).astype(np.float32)
