"""Opus and Codec2, which neural codecs are compared with: a recording there and back, and the bits it took on the way.

What a codec delays is taken back, so that sample-by-sample measures are fair to it. Containers are not counted: for
Opus the bytes of its packets are, for Codec2 the bits of its frames.
"""

import dataclasses
import fractions
import math

import numpy as np

OPUS_SAMPLE_RATES = (8000, 12_000, 16_000, 24_000, 48_000)
CODEC2_SAMPLE_RATE = 8000
CODEC2_BITS_PER_SECOND = (700, 1200, 1300, 1400, 1600, 2400, 3200)
_LONGEST_DELAY_S = 0.1
# In samples: where the levels of spoken sentences correlate best; the waveforms do not, its phases are made up.
_CODEC2_DELAY, _CODEC2_DELAY_700 = 160, 240


@dataclasses.dataclass(frozen=True, eq=False)
class Coded:
    """A decoded recording (A,), as long as the original and at its rate, and the bits that were sent."""

    waveform: np.ndarray
    num_bits: int


def opus(waveform: np.ndarray, sample_rate: int, kbps: float) -> Coded:
    """Through libopus at its defaults (variable rate, packets of 20 ms, "audio"), at the first of its rates that fits.

    Args:
      waveform: mono samples (A,) in [-1, 1].
      sample_rate: in Hz.
      kbps: what it is asked for; it spends more or less. Its documentation begins at 6, libopus takes 0.5.
    Raises:
      ImportError: PyAV is not installed.
      ValueError: a rate that libopus refuses; has it.
    """
    import av

    rate = next((rate for rate in OPUS_SAMPLE_RATES if rate >= sample_rate), OPUS_SAMPLE_RATES[-1])
    samples = _resample(waveform, sample_rate, rate)
    encoder = av.CodecContext.create("libopus", "w")
    encoder.sample_rate, encoder.layout, encoder.format = rate, "mono", "flt"
    encoder.bit_rate = round(1000 * kbps)
    encoder.time_base = fractions.Fraction(1, rate)
    try:
        encoder.open()
    except av.FFmpegError as error:
        raise ValueError(f"libopus refuses {kbps} kbps: {error.strerror}") from error
    size = encoder.frame_size
    # Whole packets, and one more for what the encoder holds back.
    samples = np.pad(samples, (0, -len(samples) % size + size)).astype(np.float32)
    packets = []
    for start in range(0, len(samples), size):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + size], format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, encoder.time_base
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    decoder = av.CodecContext.create("libopus", "r")
    decoder.extradata = encoder.extradata
    decoder.sample_rate, decoder.layout = rate, "mono"
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    decoded = np.concatenate([_samples(frame) for frame in frames])
    decoded = _resample(decoded, frames[0].sample_rate, sample_rate)
    num_sent = math.ceil(len(waveform) / sample_rate * rate / size) + 1  # the packet after the end is needed for it
    return Coded(align(decoded, waveform, sample_rate), 8 * sum(packet.size for packet in packets[:num_sent]))


def codec2(waveform: np.ndarray, sample_rate: int, bits_per_second: int) -> Coded:
    """Through Codec2, which is for speech at 8 kHz. It makes phases up, so that its SI-SNR says nothing.

    Args:
      waveform: mono speech (A,) in [-1, 1].
      sample_rate: in Hz.
      bits_per_second: one of `CODEC2_BITS_PER_SECOND`.
    Raises:
      ImportError: pycodec2 is not installed.
      ValueError: another rate; has it.
    """
    import pycodec2

    if bits_per_second not in CODEC2_BITS_PER_SECOND:
        raise ValueError(f"Codec2 has no {bits_per_second} bits per second; expected one of {CODEC2_BITS_PER_SECOND}")
    coder = pycodec2.Codec2(bits_per_second)
    size = coder.samples_per_frame()
    samples = _resample(waveform, sample_rate, CODEC2_SAMPLE_RATE)
    num_frames = math.ceil(len(samples) / size)
    # A frame more, whose bits are not counted: what the decoder delays comes out of it.
    samples = np.pad(samples, (0, (num_frames + 1) * size - len(samples)))
    samples = np.round(32767 * np.clip(samples, -1, 1)).astype(np.int16)
    sent = [coder.encode(frame) for frame in samples.reshape(-1, size)]
    decoder = pycodec2.Codec2(bits_per_second)
    decoded = np.concatenate([decoder.decode(frame) for frame in sent]).astype(np.float32) / 32767
    decoded = decoded[_CODEC2_DELAY_700 if bits_per_second == 700 else _CODEC2_DELAY :]
    decoded = _resample(decoded, CODEC2_SAMPLE_RATE, sample_rate)
    return Coded(fit(decoded, len(waveform)), num_frames * coder.bits_per_frame())


def align(decoded: np.ndarray, reference: np.ndarray, sample_rate: int) -> np.ndarray:
    """The decoded samples moved to where they correlate best with the reference, at most 0.1 s, and as many as it."""
    longest = round(_LONGEST_DELAY_S * sample_rate)
    n_fft = 1 << (len(decoded) + len(reference) + longest).bit_length()
    spectrum = np.fft.rfft(decoded, n_fft) * np.conj(np.fft.rfft(reference, n_fft))
    correlation = np.fft.irfft(spectrum, n_fft)
    delays = np.arange(-longest, longest + 1)
    delay = int(delays[np.argmax(correlation[delays])])
    moved = decoded[delay:] if delay >= 0 else np.pad(decoded, (-delay, 0))
    return fit(moved, len(reference))


def fit(samples: np.ndarray, length: int) -> np.ndarray:
    """So many samples, with zeros after them where they are fewer."""
    samples = samples[:length]
    return np.pad(samples, (0, length - len(samples))).astype(np.float32)


def _samples(frame) -> np.ndarray:
    samples = frame.to_ndarray()[0]
    return samples.astype(np.float32) / (32768 if samples.dtype.kind == "i" else 1)


def _resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    if rate == new_rate:
        return samples
    import soxr

    return soxr.resample(samples, rate, new_rate, quality="VHQ")
