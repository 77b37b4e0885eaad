import importlib.resources
import io
import math
import os
import pathlib
import sys
import zipfile

import numpy as np
import pytest
import scipy.io.wavfile
import soxr

from jaxaudio.data import voice_activity
from jaxaudio.data.audio import load_audio
from jaxaudio.data.voice_activity import EnergyDetector, SileroDetector, merge_spans

RATE = 16000


@pytest.fixture(scope="module")
def data_dir():
    if "JAXAUDIO_DATA" not in os.environ:
        pytest.skip("JAXAUDIO_DATA does not name the folder of real recordings")
    return pathlib.Path(os.environ["JAXAUDIO_DATA"])


@pytest.fixture(scope="module")
def silero_folder():
    return importlib.resources.files("silero_vad") / "data"


@pytest.fixture(scope="module")
def jfk(data_dir):
    return load_audio(data_dir / "speech" / "jfk.flac")


@pytest.fixture(scope="module")
def digits(data_dir):
    """Eight spoken digits, pauses of 0.6 to 3 s of faint noise between them, and where each (start_s, end_s) is."""
    rng = np.random.default_rng(0)
    pieces, spans, at = [], [], 0
    with zipfile.ZipFile(data_dir / "fsdd" / "recordings.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith("_0.wav"))
        for name in rng.choice(names, 8, replace=False):
            rate, integers = scipy.io.wavfile.read(io.BytesIO(archive.read(name)))
            speech = soxr.resample(integers / np.float32(32768), rate, RATE)
            pause = 1e-4 * rng.standard_normal(int(rng.uniform(0.6, 3) * RATE))
            spans.append(((at + len(pause)) / RATE, (at + len(pause) + len(speech)) / RATE))
            pieces += [pause, speech]
            at += len(pause) + len(speech)
    return np.concatenate([*pieces, 1e-4 * rng.standard_normal(RATE)]).astype(np.float32), spans


def _bursts(num_samples, *spans_s, level=0.1, noise=1e-4):
    waveform = noise * np.random.default_rng(0).standard_normal(num_samples)
    for start, end in spans_s:
        burst = slice(round(start * RATE), round(end * RATE))
        waveform[burst] += level * np.random.default_rng(1).standard_normal(num_samples)[burst]
    return waveform.astype(np.float32)


def _in_blocks(waveform, size):
    return (waveform[i : i + size] for i in range(0, len(waveform), size))


# Energy


def test_bursts_are_found_with_their_padding():
    waveform = _bursts(10 * RATE, (2.0, 3.0), (3.3, 4.0), (7.0, 7.05), (8.0, 10.0))
    detector = EnergyDetector(pad_s=0.2, min_silence_s=0.5, min_speech_s=0.1)
    # A level is that of 30 ms, so that a burst reaches a hop further on both sides. The pause of 0.3 s is bridged, the
    # click of 0.05 s dropped.
    assert detector([waveform]) == [(pytest.approx(1.79), pytest.approx(4.21)), (pytest.approx(7.79), 10.0)]
    apart = EnergyDetector(pad_s=0.2, min_silence_s=0.1, min_speech_s=0.0)([waveform])
    # 0.28 s of silence are left between the first two: they meet in the middle.
    expected = [(1.79, 3.15), (3.15, 4.21), (6.79, 7.26), (7.79, 10.0)]
    np.testing.assert_allclose(apart, expected, atol=1e-9)


def test_a_long_stretch_is_cut_at_its_last_silence_or_hard():
    waveform = _bursts(50 * RATE, (1.0, 8.0), (8.2, 15.0), (15.15, 45.0))
    detector = EnergyDetector(pad_s=0.0, min_silence_s=1.0, max_speech_s=20.0)
    spans = detector([waveform])
    # 0.99 to 15.01, cut where the second short silence begins; then 20 s less the hop that is looked at; then the rest.
    np.testing.assert_allclose(spans, [(0.99, 15.01), (15.14, 35.14), (35.15, 45.01)], atol=1e-9)
    padded = EnergyDetector(pad_s=0.3, min_silence_s=1.0, max_speech_s=20.0)([waveform])
    assert max(end - start for start, end in padded) <= 20.0
    assert len(padded) == 3


def test_levels_thresholds_and_hysteresis_equal_a_slow_loop():
    rng = np.random.default_rng(0)
    envelope = np.repeat(10 ** rng.uniform(-3.5, -0.5, 40), 1600)[: 63 * 1000 + 77]
    waveform = (envelope * rng.standard_normal(len(envelope))).astype(np.float32)
    num_hops = math.ceil(len(waveform) / 160)
    levels = np.empty(num_hops)
    for i in range(num_hops):
        around = waveform[max(0, i - 1) * 160 : (i + 2) * 160].astype(np.float64)
        levels[i] = max(10 * math.log10(np.mean(around**2)), -80.0)
    noise, speech = np.percentile(levels, 10), np.percentile(levels, 99)
    on, off = noise + 0.6 * (speech - noise), noise + 0.4 * (speech - noise)
    is_speech, current = np.zeros(num_hops, bool), False
    for i, level in enumerate(levels):
        current = level >= on or (current and level >= off)
        is_speech[i] = current
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_speech.astype(int), [0]])))
    expected = np.minimum(edges.reshape(-1, 2) * 0.01, len(waveform) / RATE)
    detector = EnergyDetector(0.6, 0.4, min_speech_s=0.0, min_silence_s=0.0, pad_s=0.0)
    spans = detector([waveform])
    assert len(spans) > 5
    np.testing.assert_allclose(spans, expected, atol=1e-9)


def test_spans_do_not_depend_on_the_blocks():
    waveform = _bursts(8 * RATE + 77, (1.0, 2.0), (3.0, 3.7), (5.0, 8.0))
    whole = EnergyDetector()([waveform])
    assert len(whole) == 3
    for size in (37, 160, 1000, 30 * RATE):
        assert EnergyDetector()(_in_blocks(waveform, size)) == whole


def test_every_digit_lies_in_a_span(digits):
    waveform, spoken = digits
    spans = EnergyDetector()([waveform])
    assert len(spans) == len(spoken)
    for (start, end), (first, last) in zip(spans, spoken, strict=True):
        assert start <= first + 0.05
        assert end >= last - 0.05
        assert end - start <= last - first + 2 * 0.2 + 0.05


def test_silence_noise_and_short_audio():
    assert EnergyDetector()([]) == []
    assert EnergyDetector()([np.zeros(0, np.float32)]) == []
    assert EnergyDetector()([np.zeros(5 * RATE, np.float32)]) == []
    assert EnergyDetector()([_bursts(5 * RATE, noise=1e-5)]) == []  # -100 dB
    assert EnergyDetector()([_bursts(5 * RATE, noise=0.01)]) == [(0.0, 5.0)]  # no pauses: nothing is lost
    assert EnergyDetector(min_speech_s=0.05)([_bursts(1600, noise=0.01)]) == [(0.0, 0.1)]
    assert EnergyDetector(min_speech_s=0.0)([np.full(7, 0.5, np.float32)]) == [(0.0, 7 / RATE)]


# Silero


@pytest.mark.parametrize("file", ["silero_vad.onnx", "silero_vad_openvino_16k.onnx", "silero_vad_16k_sequence.onnx"])
def test_silero_equals_its_own_package(file, silero_folder, jfk, digits):
    import silero_vad
    import torch

    peer = silero_vad.load_silero_vad(onnx=True)
    kwargs = {"min_speech_duration_ms": 250, "min_silence_duration_ms": 100, "speech_pad_ms": 30}
    detector = SileroDetector(
        str(silero_folder / file), min_speech_s=0.25, min_silence_s=0.1, pad_s=0.03, max_speech_s=math.inf
    )
    for waveform in (jfk, digits[0]):
        stamps = silero_vad.get_speech_timestamps(torch.from_numpy(waveform), peer, **kwargs)
        expected = [(stamp["start"] / RATE, stamp["end"] / RATE) for stamp in stamps]
        assert len(expected) > 2
        assert detector(_in_blocks(waveform, 5000)) == expected


def test_silero_equals_faster_whisper(jfk, digits):
    vad = pytest.importorskip("faster_whisper.vad", reason="the extra bench (faster-whisper) is not installed")
    bundled = pathlib.Path(vad.get_assets_path()) / "silero_vad_v6.onnx"
    for options, rules in [
        ({}, {"max_speech_s": math.inf}),
        (
            {"threshold": 0.6, "neg_threshold": 0.3, "min_silence_duration_ms": 160, "max_speech_duration_s": 2.0,
             "speech_pad_ms": 100, "min_speech_duration_ms": 100},
            {"threshold": 0.6, "silence_threshold": 0.3, "min_silence_s": 0.16, "max_speech_s": 2.0,
             "pad_s": 0.1, "min_speech_s": 0.1},
        ),
    ]:  # fmt: skip
        for waveform in (jfk, digits[0]):
            stamps = vad.get_speech_timestamps(waveform, **options)
            expected = [(stamp["start"] / RATE, stamp["end"] / RATE) for stamp in stamps]
            assert SileroDetector(bundled, **rules)(_in_blocks(waveform, 7777)) == expected


def test_rules_equal_faster_whispers_on_random_probabilities(silero_folder, monkeypatch):
    vad = pytest.importorskip("faster_whisper.vad", reason="the extra bench (faster-whisper) is not installed")
    rng = np.random.default_rng(0)
    cases_with_cuts = 0
    for _ in range(60):
        num_samples = int(rng.integers(1, 60 * RATE))
        walk = np.cumsum(rng.normal(0, 0.35, num_samples // 512 + 1))
        scores = (1 / (1 + np.exp(-(walk - walk.mean())))).astype(np.float32)
        rules = {
            "threshold": float(rng.choice([0.5, 0.7])),
            "silence_threshold": float(rng.choice([0.2, 0.45])),
            "min_speech_s": float(rng.choice([0.0, 0.25])),
            "min_silence_s": float(rng.choice([0.0, 0.16, 2.0])),
            "pad_s": float(rng.choice([0.0, 0.03, 0.4])),
            "max_speech_s": float(rng.choice([3.0, 10.0, np.inf])),
        }

        def probabilities(_, batches, scores=scores):
            assert sum(len(batch) for batch in batches) == len(scores)
            return [scores]

        monkeypatch.setattr(voice_activity, "_probabilities", probabilities)
        monkeypatch.setattr(vad, "get_vad_model", lambda scores=scores: lambda _: scores)
        waveform = np.zeros(num_samples, np.float32)
        stamps = vad.get_speech_timestamps(
            waveform,
            threshold=rules["threshold"],
            neg_threshold=rules["silence_threshold"],
            min_speech_duration_ms=int(1000 * rules["min_speech_s"]),
            max_speech_duration_s=rules["max_speech_s"],
            min_silence_duration_ms=int(1000 * rules["min_silence_s"]),
            speech_pad_ms=int(1000 * rules["pad_s"]),
        )
        expected = [(stamp["start"] / RATE, stamp["end"] / RATE) for stamp in stamps]
        found = SileroDetector(str(silero_folder / "silero_vad_16k_sequence.onnx"), **rules)(
            _in_blocks(waveform, 10 * RATE)
        )
        assert found == expected, rules
        cases_with_cuts += any(end - start > 2.8 for start, end in found) and rules["max_speech_s"] == 3.0
    assert cases_with_cuts > 3


def test_silero_hears_no_speech_in_silence(silero_folder):
    for file in ("silero_vad.onnx", "silero_vad_16k_sequence.onnx"):
        detector = SileroDetector(str(silero_folder / file))
        assert detector([]) == []
        assert detector([np.zeros(5 * RATE, np.float32)]) == []
        assert detector([np.zeros(100, np.float32)]) == []


def test_wrong_models_are_errors(tmp_path, silero_folder, monkeypatch):
    with pytest.raises(ValueError, match=r"missing\.onnx: there is no such file"):
        SileroDetector(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ValueError, match=r"text\.onnx: onnxruntime cannot load it"):
        SileroDetector(tmp_path / "text.onnx")
    # The old layout, made from the new one: a name of equal length in the file's bytes.
    content = pathlib.Path(str(silero_folder / "silero_vad_half.onnx")).read_bytes()
    (tmp_path / "other.onnx").write_bytes(content.replace(b"input", b"audio"))
    with pytest.raises(ValueError, match=r"other\.onnx: the model's inputs are audio, state; expected input, state"):
        SileroDetector(tmp_path / "other.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime: pip install 'jaxaudio\[vad\]'"):
        SileroDetector(tmp_path / "any.onnx")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"threshold": 0.3, "silence_threshold": 0.4}, "EnergyDetector: threshold=0.3 and silence_threshold=0.4"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"pad_s": -0.1}, "pad_s=-0.1"),
        ({"min_silence_s": math.nan}, "min_silence_s=nan"),
        ({"min_speech_s": -1.0}, "min_speech_s=-1.0"),
        ({"max_speech_s": 0.5}, r"max_speech_s=0.5 .* more than 2 \* pad_s \+ 0.1 = 0.5"),
    ],
)
def test_rules_that_make_no_sense_are_errors(rules, message):
    with pytest.raises(ValueError, match=message):
        EnergyDetector(**rules)
    with pytest.raises(ValueError, match="SileroDetector: threshold=0.1"):
        SileroDetector("missing.onnx", threshold=0.1)


# Clips


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], []),
        ([(1.0, 5.0)], [(1.0, 5.0)]),
        ([(0.0, 4.0), (5.0, 10.0), (11.0, 12.0)], [(0.0, 10.0), (11.0, 12.0)]),
        ([(0.0, 10.0), (10.0, 20.0)], [(0.0, 10.0), (10.0, 20.0)]),
        ([(2.0, 27.0), (28.0, 30.0)], [(2.0, 12.0), (12.0, 22.0), (22.0, 30.0)]),
        ([(0.0, 20.0)], [(0.0, 10.0), (10.0, 20.0)]),
        ([(1.0, 4.0), (3.5, 9.0), (8.0, 15.0)], [(1.0, 9.0), (9.0, 15.0)]),
        ([(1.0, 9.0), (2.0, 3.0), (12.0, 13.0)], [(1.0, 9.0), (12.0, 13.0)]),
    ],
)
def test_clips_of_at_most_ten_seconds(spans, expected):
    assert merge_spans(spans, 10.0) == expected


def test_clips_lose_nothing_and_are_short_enough():
    rng = np.random.default_rng(0)
    for _ in range(50):
        edges = np.sort(rng.choice(100_000, 40, replace=False)) / 100
        spans = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        max_s = float(rng.choice([5.0, 30.0, 200.0]))
        clips = merge_spans(spans, max_s)
        assert all(end - start <= max_s + 1e-9 for start, end in clips)
        assert all(end <= start for (_, end), (start, _) in zip(clips[:-1], clips[1:], strict=True))
        times = np.arange(100_000) / 100 + 0.005
        spoken, heard = (
            np.any([(times > start) & (times < end) for start, end in some], axis=0) for some in (spans, clips)
        )
        assert not np.any(spoken & ~heard)


@pytest.mark.parametrize(
    ("spans", "max_s", "message"),
    [
        ([(1.0, 2.0)], 0.0, "max_s=0.0"),
        ([(1.0, 2.0)], math.nan, "max_s=nan"),
        ([(2.0, 2.0)], 10.0, r"\(2\.0, 2\.0\) is empty"),
        ([(-1.0, 2.0)], 10.0, r"\(-1\.0, 2\.0\)"),
        ([(5.0, 6.0), (1.0, 2.0)], 10.0, r"\(1\.0, 2\.0\) is empty or not sorted; expected 5\.0 <= start"),
    ],
)
def test_spans_that_make_no_sense_are_errors(spans, max_s, message):
    with pytest.raises(ValueError, match=message):
        merge_spans(spans, max_s)
