"""What a recording looks like: its waveform, its spectrogram, and the log-mel features that Whisper hears."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxaudio.data.audio import check_block
from jaxaudio.data.files import atomic_path
from jaxaudio.ops.mel import hz_to_mel, log10_mel
from jaxaudio.ops.resample import resample
from jaxaudio.ops.stft import frame, hann_window, power_spectrum
from jaxaudio.report.plots import COLOURS, INK, style_axes

_SEGMENT_S = 30
_MAX_COLUMNS = 3000  # more than a picture has pixels; all the 10 ms frames of 30 s
_WHISPER_RATE, _WHISPER_HOP = 16_000, 160
_RANGE_DB = 80  # as Whisper's features: 8 decades of power


def plot_spectrogram(
    waveform_or_blocks: np.ndarray | Iterable[np.ndarray],
    sample_rate: int,
    out_path: str | os.PathLike,
    *,
    start_s: float = 0.0,
) -> None:
    """Writes `spectrogram_figure` to a file in the format of its suffix: .png, .svg or .pdf.

    Raises:
      ValueError: audio that cannot be drawn (see `spectrogram_figure`), or an unknown suffix; the message has it.
    """
    figure = spectrogram_figure(waveform_or_blocks, sample_rate, start_s=start_s)
    with atomic_path(out_path) as path:
        figure.savefig(path, dpi=150, transparent=True)


def spectrogram_figure(
    waveform_or_blocks: np.ndarray | Iterable[np.ndarray], sample_rate: int, *, num_mels: int = 80, start_s: float = 0.0
) -> Figure:
    """Waveform, spectrogram in decibels and Whisper's log-mel features of a recording, over one time axis.

    The recording is read in segments of 30 s, each transformed on its own with its ends reflected, so that memory does
    not grow with its length. Frames of 10 ms are merged where a picture cannot show them all: the extremes of the
    samples, the means of power and log-mel.

    Args:
      waveform_or_blocks: mono samples in [-1, 1]: an array (A,), or consecutive ones.
      sample_rate: in Hz; for the log-mel the samples are brought to 16 kHz.
      num_mels: bands of the log-mel.
      start_s: where in the recording the samples begin; the time axis begins with it.
    Raises:
      ValueError: no samples, a sample that is not finite (with the second where it is), or an array that is not one
        channel of floats.
    """
    envelope, power, log_mel = _Columns(_extremes), _Columns(_mean), _Columns(_mean)
    num_samples = 0
    for segment in _segments(waveform_or_blocks, sample_rate):
        num_samples += len(segment)
        parts = _transform(segment[None], sample_rate, num_mels)
        for columns, rows in zip((envelope, power, log_mel), parts, strict=True):
            columns.add(np.asarray(rows[0]))
    if not num_samples:
        raise ValueError("the audio has no samples; expected at least one")
    level_db = 10 * np.log10(np.maximum(power.rows(), 1e-12))
    features = log_mel.rows()
    features = (np.maximum(features, features.max() - _RANGE_DB / 10) + 4) / 4
    return _draw(envelope.rows(), level_db, features, (start_s, start_s + num_samples / sample_rate), sample_rate)


def compare_spectrograms(waveforms: Mapping[str, np.ndarray], sample_rate: int) -> Figure:
    """Spectrograms one below the other, with one scale: decibels below the loudest place of the first.

    Args:
      waveforms: (A,) by title, seconds long rather than minutes; the first is what the others are compared with.
      sample_rate: in Hz.
    """
    figure = Figure(figsize=(9.6, 1.8 * len(waveforms)), layout="constrained")
    n_fft = 1 << (sample_rate // 40 - 1).bit_length()  # 25 ms, rounded up to a power of two
    panels = figure.subplots(len(waveforms), 1, squeeze=False)[:, 0]
    top_db = None
    for axes, (title, waveform) in zip(panels, waveforms.items(), strict=True):
        power = power_spectrum(jnp.asarray(waveform)[None], n_fft=n_fft, hop_length=max(1, sample_rate // 100))[0]
        level_db = 10 * np.log10(np.maximum(power, 1e-12))
        top_db = level_db.max() if top_db is None else top_db
        style_axes(axes).grid(visible=False)
        extent = (0, len(waveform) / sample_rate, 0, sample_rate / 2000)
        limits = {"vmin": top_db - _RANGE_DB, "vmax": top_db}
        axes.imshow(level_db.T, origin="lower", aspect="auto", extent=extent, cmap="magma", **limits)
        axes.set_title(title, loc="left", color=INK, fontsize=9)
        axes.set_ylabel("kHz")
    panels[-1].set_xlabel("seconds")
    return figure


@functools.partial(jax.jit, static_argnames=("sample_rate", "num_mels"))
def _transform(waveform, sample_rate, num_mels):
    """Rows of each started 10 ms of (1, A) samples: extremes (1, T, 2), power (1, T, F) and log10 mel (1, T, M)."""
    hop_length = max(1, round(sample_rate / 100))
    n_fft = 1 << (sample_rate // 40 - 1).bit_length()  # 25 ms, rounded up to a power of two
    frames = frame(_filled(waveform, hop_length, 0), hop_length, hop_length)
    extremes = jnp.stack([frames.min(axis=-1), frames.max(axis=-1)], axis=-1)
    power = power_spectrum(_filled(waveform, hop_length, n_fft), n_fft=n_fft, hop_length=hop_length)
    power = power[:, : frames.shape[1]] / (hann_window(n_fft).sum() / 2) ** 2

    samples = resample(waveform, _WHISPER_RATE, sample_rate)
    num_mel_frames = -(-samples.shape[1] // _WHISPER_HOP)
    samples = jnp.pad(_filled(samples, _WHISPER_HOP, 201), ((0, 0), (200, 200)), mode="reflect")
    return extremes, power, log10_mel(samples, num_mels)[:, :num_mel_frames]


def _filled(waveform, multiple, shortest):
    """The waveform with zeros after it, up to a multiple of one length and at least another."""
    length = max(-(-waveform.shape[1] // multiple) * multiple, shortest)
    return jnp.pad(waveform, ((0, 0), (0, length - waveform.shape[1])))


def _segments(waveform_or_blocks: np.ndarray | Iterable[np.ndarray], sample_rate: int) -> Iterator[np.ndarray]:
    """The samples as float32 arrays of 30 s, the last one shorter."""
    size = _SEGMENT_S * sample_rate
    blocks = [waveform_or_blocks] if isinstance(waveform_or_blocks, np.ndarray) else waveform_or_blocks
    held, done = np.zeros(0, np.float32), 0
    for block in blocks:
        check_block(block, done + len(held), sample_rate)
        held = np.concatenate([held, block.astype(np.float32)])
        whole = len(held) // size * size
        yield from held[:whole].reshape(-1, size)
        held, done = held[whole:], done + whole
    if len(held):
        yield held


class _Columns:
    """A stream of rows, one each 10 ms, as at most 2 * _MAX_COLUMNS columns: when there are more, pairs are merged."""

    def __init__(self, merge: Callable[[np.ndarray], np.ndarray]):
        self._merge = merge  # (T, n, F) -> (T, F)
        self._columns: np.ndarray | None = None
        self._rest: np.ndarray | None = None  # rows too few for a column
        self._stride = 1

    def add(self, rows: np.ndarray) -> None:
        rows = rows if self._rest is None else np.concatenate([self._rest, rows])
        whole = len(rows) // self._stride * self._stride
        new = self._merge(rows[:whole].reshape(-1, self._stride, rows.shape[1]))
        self._columns = new if self._columns is None else np.concatenate([self._columns, new])
        self._rest = rows[whole:]
        while len(self._columns) > 2 * _MAX_COLUMNS:
            even = len(self._columns) // 2 * 2
            odd = np.repeat(self._columns[even:], self._stride, axis=0)  # stands for as many rows
            self._rest = np.concatenate([odd, self._rest])
            self._columns = self._merge(self._columns[:even].reshape(even // 2, 2, -1))
            self._stride *= 2

    def rows(self) -> np.ndarray:
        """All columns, the last one perhaps of fewer rows."""
        return np.concatenate([self._columns, self._merge(self._rest[None])]) if len(self._rest) else self._columns


def _mean(rows: np.ndarray) -> np.ndarray:
    return rows.mean(axis=1)


def _extremes(rows: np.ndarray) -> np.ndarray:
    return np.stack([rows[..., 0].min(axis=1), rows[..., 1].max(axis=1)], axis=1)


def _draw(envelope, level_db, features, span_s, sample_rate) -> Figure:
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 2))
    minutes = span_s[1] > 300
    start, end = (time_s / 60 if minutes else time_s for time_s in span_s)
    wave, spectrum, mel = (style_axes(axes) for axes in panels)

    edges = np.linspace(start, end, len(envelope) + 1)
    wave.stairs(envelope[:, 1], edges, baseline=envelope[:, 0], fill=True, color=COLOURS[0])
    wave.set_ylabel("waveform")
    peak = max(float(np.abs(envelope).max()), 1e-3)
    wave.set_ylim(-1.05 * peak, 1.05 * peak)

    top_db = max(float(level_db.max()), -40.0)
    extent = (start, end, 0, sample_rate / 2000)
    _image(figure, spectrum, level_db, extent, (top_db - _RANGE_DB, top_db), "dB (0: a sine of full scale)")
    spectrum.set_ylabel("frequency (kHz)")

    num_mels = features.shape[1]
    low = max(float(features.max()) - 2, -1.5)
    _image(figure, mel, features, (start, end, 0, num_mels), (low, low + 2), "log-mel as Whisper hears it")
    bands = np.linspace(0, float(hz_to_mel(np.array(8000.0))), num_mels + 2)[1:-1]
    ticks = np.array([250.0, 500, 1000, 2000, 4000])
    places = np.interp(hz_to_mel(ticks), bands, np.arange(num_mels) + 0.5)
    mel.set_yticks(places, [f"{hz / 1000:g}" for hz in ticks])
    mel.set_ylabel(f"{num_mels} mel bands (kHz)")
    mel.set_xlabel("minutes" if minutes else "seconds")
    mel.set_xlim(start, end)
    return figure


def _image(figure, axes, rows, extent, limits, label) -> None:
    axes.grid(visible=False)
    image = axes.imshow(
        rows.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=limits[0], vmax=limits[1]
    )
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label(label, color=INK)
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_visible(False)
