"""Short-time Fourier transform: frames, spectra, power spectra and the way back."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

PadMode = Literal["reflect", "constant"]
Form = Literal["auto", "fft", "matmul"]
_LONGEST_MATMUL = 2048  # from here on the two (n_fft, F) matrices outweigh what they save, on a TPU too


def frame(waveform: Float[Array, "B A"], frame_length: int, hop_length: int) -> Float[Array, "B T {frame_length}"]:
    """Overlapping frames; frame t begins at sample t * hop_length and lies wholly inside the waveform.

    T = 1 + (A - frame_length) // hop_length. Built from blocks of one hop side by side, not by a gather, which reads
    and writes over twenty times as many bytes on a TPU.

    Raises:
      ValueError: the waveform is shorter than a frame, or a length is not positive; the message carries them.
    """
    batch, num_samples = waveform.shape
    if min(frame_length, hop_length) < 1 or num_samples < frame_length:
        raise ValueError(
            f"expected at least frame_length = {frame_length} samples and positive lengths, "
            f"got {num_samples} samples and hop_length = {hop_length}"
        )
    num_frames = 1 + (num_samples - frame_length) // hop_length
    whole, rest = divmod(frame_length, hop_length)
    num_blocks = num_frames + whole - (rest == 0)
    missing = max(num_blocks * hop_length - num_samples, 0)
    blocks = jnp.pad(waveform, ((0, 0), (0, missing)))[:, : num_blocks * hop_length]
    blocks = blocks.reshape(batch, num_blocks, hop_length)
    parts = [blocks[:, start : start + num_frames] for start in range(whole)]
    if rest:
        parts.append(blocks[:, whole : whole + num_frames, :rest])
    return jnp.concatenate(parts, axis=-1)


def hann_window(length: int, n_fft: int | None = None) -> np.ndarray:
    """The periodic Hann window, float32, with zeros around it up to n_fft."""
    window = np.zeros(n_fft or length, np.float32)
    left = (len(window) - length) // 2
    window[left : left + length] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    return window


def power(frames: Float[Array, "B T A"], *, n_fft: int | None = None, form: Form = "auto") -> Float[Array, "B T F"]:
    """|X|^2 of windowed frames, F = n_fft // 2 + 1; frames shorter than n_fft (A if None) are padded with zeros.

    Args:
      frames: windowed samples.
      n_fft: length of the transform.
      form: "fft"; "matmul", a product with cosines and sines at the highest precision; or "auto": on a TPU, where a
        real FFT takes long to compile and moves three times the bytes, "matmul" for n_fft up to 2048, else "fft".
        The choice is made when the program is compiled, for the platform it is compiled for. In a program sharded over
        several GPUs choose "matmul": XLA gathers the whole batch on each for an FFT.
    """
    real, imaginary = real_imaginary(frames, n_fft=n_fft, form=form)
    return real**2 + imaginary**2


def real_imaginary(
    frames: Float[Array, "B T A"], *, n_fft: int | None = None, form: Form = "auto"
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """Real and imaginary part of the spectrum of windowed frames: the arguments of `power`."""
    n_fft = n_fft or frames.shape[-1]

    def by_fft(frames):
        spectrum = jnp.fft.rfft(frames, n_fft)
        return spectrum.real, spectrum.imag

    def by_matmul(frames):
        waves = jnp.asarray(_fourier_matrix(frames.shape[-1], n_fft))
        parts = jnp.einsum("BTA,AF->BTF", frames, waves, precision=lax.Precision.HIGHEST)
        return tuple(jnp.split(parts, 2, axis=-1))

    if form == "matmul":
        return by_matmul(frames)
    if form == "fft" or n_fft > _LONGEST_MATMUL:
        return by_fft(frames)
    return lax.platform_dependent(frames, tpu=by_matmul, default=by_fft)


@functools.lru_cache(maxsize=16)
def _fourier_matrix(length: int, n_fft: int) -> np.ndarray:
    """(length, 2 F) float32: cosines, then minus sines, of the first `length` samples of an n_fft-point transform."""
    turns = np.outer(np.arange(length), np.arange(n_fft // 2 + 1)) % n_fft  # exact, unlike the cosine of a large angle
    phase = 2 * np.pi / n_fft * turns
    return np.concatenate([np.cos(phase), -np.sin(phase)], axis=1, dtype=np.float32, casting="same_kind")


def _windowed(waveform, n_fft, hop_length, win_length, center, pad_mode):
    """Frames times the window, in float32."""
    waveform = waveform.astype(jnp.float32)
    if center:
        margin = n_fft // 2
        if pad_mode == "reflect" and waveform.shape[1] <= margin:
            raise ValueError(
                f"reflecting {margin} samples at the ends needs at least {margin + 1} samples, "
                f"got {waveform.shape[1]}; pad the waveform with zeros first"
            )
        waveform = jnp.pad(waveform, ((0, 0), (margin, margin)), mode=pad_mode)
    return frame(waveform, n_fft, hop_length) * hann_window(_checked_window(win_length, n_fft), n_fft)[None, None]


def _checked_window(win_length, n_fft):
    if win_length is not None and not 0 < win_length <= n_fft:
        raise ValueError(f"expected 0 < win_length <= n_fft = {n_fft}, got {win_length}")
    return win_length or n_fft


@functools.partial(jax.jit, static_argnames=("n_fft", "hop_length", "win_length", "center", "pad_mode"))
def stft(
    waveform: Float[Array, "B A"],
    *,
    n_fft: int,
    hop_length: int,
    win_length: int | None = None,
    center: bool = True,
    pad_mode: PadMode = "reflect",
) -> Complex[Array, "B T F"]:
    """Short-time Fourier transform with a periodic Hann window, as torch.stft and librosa.stft (time before bins).

    T = 1 + A // hop_length when centred and n_fft is even; F = n_fft // 2 + 1.

    Args:
      waveform: mono samples.
      n_fft: points of each transform.
      hop_length: samples from one frame to the next.
      win_length: length of the window, in the middle of n_fft; n_fft if None.
      center: whether frame t is centred on sample t * hop_length, the ends padded by n_fft // 2, or begins there.
      pad_mode: what the ends are padded with ("reflect" as torch, "constant" zeros as librosa).
    Raises:
      ValueError: fewer samples than the padding or a frame needs, or a bad length; the message carries the values.
    """
    return jnp.fft.rfft(_windowed(waveform, n_fft, hop_length, win_length, center, pad_mode))


@functools.partial(jax.jit, static_argnames=("n_fft", "hop_length", "win_length", "center", "pad_mode", "form"))
def power_spectrum(
    waveform: Float[Array, "B A"],
    *,
    n_fft: int,
    hop_length: int,
    win_length: int | None = None,
    center: bool = True,
    pad_mode: PadMode = "reflect",
    form: Form = "auto",
) -> Float[Array, "B T F"]:
    """|stft|^2: the arguments of `stft`, and `form` as in `power`; differentiable everywhere, unlike |stft|."""
    return power(_windowed(waveform, n_fft, hop_length, win_length, center, pad_mode), form=form)


@functools.partial(jax.jit, static_argnames=("n_fft", "hop_length", "win_length", "center", "length"))
def istft(
    spectrum: Complex[Array, "B T F"],
    *,
    n_fft: int,
    hop_length: int,
    win_length: int | None = None,
    center: bool = True,
    length: int | None = None,
) -> Float[Array, "B A"]:
    """The waveform whose `stft` is nearest to the spectrum in least squares, hence the inverse of `stft`.

    Griffin and Lim 1984, equation 6: windowed frames are added up and divided by the sum of the squared windows.

    Args:
      spectrum: from `stft`, possibly changed.
      n_fft, hop_length, win_length, center: as they were for `stft`.
      length: samples to return; if None, up to the middle of the last frame (its end if not centred), so that a
        waveform of another length than a multiple of the hop needs it.
    Raises:
      ValueError: F is not n_fft // 2 + 1, length reaches beyond the last frame, or no window covers one of the samples
        (a hop too long, or the very first sample without centring); the message carries the values.
    """
    batch, num_frames, num_bins = spectrum.shape
    if num_bins != n_fft // 2 + 1:
        raise ValueError(f"expected n_fft // 2 + 1 = {n_fft // 2 + 1} bins for n_fft = {n_fft}, got {num_bins}")
    window = hann_window(_checked_window(win_length, n_fft), n_fft)
    margin = n_fft // 2 if center else 0
    total = n_fft + hop_length * (num_frames - 1)
    end = total - margin if length is None else margin + length
    if not margin < end <= total:
        raise ValueError(f"{num_frames} frames give 1 to {total - margin} samples, but length is {end - margin}")
    squares = np.broadcast_to(np.square(window, dtype=np.float64), (1, num_frames, n_fft))
    envelope = _overlap_add(np, squares, hop_length)[:, margin:end]
    if envelope.min() < 1e-11:
        raise ValueError(
            f"sample {envelope.argmin()} is under no window: win_length {win_length or n_fft}, "
            f"hop_length {hop_length}, center {center}; a shorter hop or center=True covers it"
        )
    frames = jnp.fft.irfft(spectrum, n_fft) * window[None, None]
    waveform = _overlap_add(jnp, frames, hop_length)[:, margin:end]
    return waveform * (1 / envelope).astype(np.float32)


def _overlap_add(xp, frames, hop_length):
    """(B, T, n) frames, each hop_length after the one before, summed to (B, (T - 1) * hop_length + n at least)."""
    batch, num_frames, length = frames.shape
    num_shifts = -(-length // hop_length)
    frames = xp.pad(frames, ((0, 0), (0, 0), (0, num_shifts * hop_length - length)))
    blocks = frames.reshape(batch, num_frames, num_shifts, hop_length)
    shifted = [
        xp.pad(blocks[:, :, shift], ((0, 0), (shift, num_shifts - 1 - shift), (0, 0))) for shift in range(num_shifts)
    ]
    return sum(shifted).reshape(batch, -1)
