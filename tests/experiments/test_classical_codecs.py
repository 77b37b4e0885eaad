import jax.numpy as jnp
import numpy as np
import pytest
import soxr

from experiments.classical_codecs import CODEC2_BITS_PER_SECOND, align, codec2, opus
from jaxaudio.ops.metrics import si_snr

RATE = 24_000


def speech_like(seconds, rate=RATE):
    """Vowel-like harmonics of a gliding voice with a pause every half second."""
    time = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 1.3 * time)) / rate
    voice = sum(np.sin(k * phase) / (1 + ((k * 120 - 600) / 400) ** 2) for k in range(1, 25))
    return (0.1 * voice * (np.sin(2 * np.pi * time) ** 2)).astype(np.float32)


WAVEFORM = speech_like(2.0)


def snr(coded):
    return float(si_snr(jnp.asarray(coded.waveform)[None], jnp.asarray(WAVEFORM)[None])[0])


def test_align_finds_a_delay_and_an_advance():
    shifted = np.concatenate([np.zeros(37, np.float32), WAVEFORM])
    np.testing.assert_allclose(align(0.5 * shifted, WAVEFORM, RATE), 0.5 * WAVEFORM)
    early = align(WAVEFORM[50:], WAVEFORM, RATE)
    np.testing.assert_allclose(early[50:], WAVEFORM[50:])
    np.testing.assert_array_equal(early[:50], 0)


@pytest.mark.parametrize("rate", [RATE, 22_050])
def test_opus_spends_what_it_is_asked_for_and_is_in_time(rate):
    waveform = soxr.resample(WAVEFORM, RATE, rate) if rate != RATE else WAVEFORM
    coded = opus(waveform, rate, 32.0)
    assert coded.waveform.shape == waveform.shape
    assert coded.waveform.dtype == np.float32
    assert 0.5 * 64_000 < coded.num_bits < 1.3 * 64_000
    pair = jnp.asarray(coded.waveform)[None], jnp.asarray(waveform)[None]
    assert float(si_snr(*pair)[0]) > 15
    # A sample later or earlier it would be worse: the delay is gone to the sample.
    for shift in (-1, 1):
        assert float(si_snr(jnp.roll(pair[0], shift, axis=1), pair[1])[0]) < float(si_snr(*pair)[0])


def test_opus_is_worse_for_fewer_bits():
    few, many = opus(WAVEFORM, RATE, 6.0), opus(WAVEFORM, RATE, 48.0)
    assert few.num_bits < many.num_bits
    assert snr(few) < snr(many)
    with pytest.raises(ValueError, match="libopus refuses 0.1 kbps"):
        opus(WAVEFORM, RATE, 0.1)


def test_codec2_counts_its_frames():
    pytest.importorskip("pycodec2", reason="pycodec2 is in the extra bench")
    # 2 s are 50 frames of 40 ms, or 100 of 20 ms at the rates from 2400 on.
    assert codec2(WAVEFORM, RATE, 700).num_bits == 50 * 28
    coded = codec2(WAVEFORM, RATE, 3200)
    assert coded.num_bits == 100 * 64
    assert coded.waveform.shape == WAVEFORM.shape
    # Levels over time are kept, phases are not.
    levels = [np.sqrt(np.square(w.reshape(-1, 2400)).mean(axis=1)) for w in (coded.waveform, WAVEFORM)]
    assert np.corrcoef(*levels)[0, 1] > 0.9


def test_codec2_refuses_other_rates():
    pytest.importorskip("pycodec2", reason="pycodec2 is in the extra bench")
    with pytest.raises(ValueError, match=f"no 800 bits per second; expected one of .{CODEC2_BITS_PER_SECOND[0]},"):
        codec2(WAVEFORM, RATE, 800)
