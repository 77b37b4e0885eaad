import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr
import tiny_codec

from experiments import codec_eval, codec_eval_report
from experiments.codec_eval import ROWS, Config
from jaxaudio import config as config_lib
from jaxaudio.convert.codec import save_codec
from jaxaudio.data.audio import load_audio
from jaxaudio.data.codec_header import header_bytes
from jaxaudio.generate.compression import file_header
from jaxaudio.ops.metrics import si_snr

RATE = 16_000


def row(family, system, kbps, mel, snr=1.0):
    return {"family": family, "system": system, "kbps": kbps, "measures": {"SI-SNR": snr, "mel distance": mel}}


def test_rivals_spend_no_fewer_bits():
    opus = [row("Opus", f"Opus {kbps}", kbps, 1.0) for kbps in (24.0, 5.0, 8.0)]
    codec2 = [row("Codec2", "Codec2 700", 0.7, 4.0), row("Codec2", "Codec2 3200", 3.2, 3.0)]
    summary = [*opus, *codec2, row("ours", "ours 1", 1.0, 2.0)]
    found = [
        [rival["system"] for rival in codec_eval_report.rivals(summary, {"kbps": kbps})] for kbps in (0.5, 1, 5, 6, 25)
    ]
    assert found == [["Opus 5.0", "Codec2 700"], ["Opus 5.0", "Codec2 3200"], ["Opus 5.0"], ["Opus 8.0"], []]
    assert "better in 1 of 2" in codec_eval_report.headline(summary)  # 2.0 is not below Opus's 1.0, but Codec2's 3.0
    assert codec_eval_report.is_better("ViSQOL", 3.0, 2.0)
    assert not codec_eval_report.is_better("mel distance", 3.0, 2.0)


def test_summary_adds_bits_and_leaves_out_what_cannot_be_judged():
    results = [
        {"index": i, "recording": "r", "system": "Opus 6", "family": "Opus", "nominal_kbps": 6.0} | numbers
        for i, numbers in enumerate(
            [
                {"duration_s": 1.0, "num_bits": 5000, "SI-SNR": 2.0, "STOI": float("nan")},
                {"duration_s": 3.0, "num_bits": 21_000, "SI-SNR": 4.0, "STOI": 0.5},
            ]
        )
    ]
    [summary] = codec_eval_report.summarise(results)
    assert summary["kbps"] == 6.5
    assert summary["measures"] == {"SI-SNR": 3.0, "STOI": 0.5}
    assert summary["num_left_out"] == {"SI-SNR": 0, "STOI": 1}
    [summary] = codec_eval_report.summarise([result | {"family": "Codec2"} for result in results[:1]])
    assert summary["measures"] == {"SI-SNR": None, "STOI": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recordings of a gliding tone in noise, of one length so that little is compiled."""
    folder, time = tmp_path_factory.mktemp("recordings"), np.arange(RATE) / RATE
    for name, frequency in (("a", 200), ("b", 310)):
        tone = sum(np.sin(2 * np.pi * k * frequency * time * (1 + 0.1 * time)) / k for k in range(1, 12))
        noise = 0.002 * np.random.default_rng(0).standard_normal(RATE)
        soundfile.write(folder / f"{name}.wav", 0.1 * tone * np.sin(2 * np.pi * 1.5 * time) ** 2 + noise, RATE)
    return folder


@pytest.fixture
def config(folder, monkeypatch):
    scores = {"STOI": lambda reference, estimate, sample_rate: float(len(estimate) / sample_rate)}
    monkeypatch.setattr(codec_eval, "perceptual_scores", lambda speech: (scores, ["ViSQOL was left out: it is slow."]))
    return Config("speech", str(folder), (), (), (6.0, 32.0), (), sample_rate=RATE)


def test_opus_alone_from_recordings_to_page(config, tmp_path, monkeypatch):
    codec_eval.main(config, tmp_path)
    few, many = json.loads((tmp_path / "summary.json").read_text())
    assert (few["system"], few["nominal_kbps"], few["num_recordings"], few["duration_s"]) == ("Opus 6", 6.0, 2, 2.0)
    assert 4 < few["kbps"] < 8 < 20 < many["kbps"] < 42
    assert few["measures"]["SI-SNR"] < many["measures"]["SI-SNR"]
    assert few["measures"]["mel distance"] > many["measures"]["mel distance"] > 0
    assert few["measures"]["STOI"] == 1.0
    page = (tmp_path / "report.html").read_text()
    assert "ViSQOL was left out: it is slow." in page
    assert page.count("<audio") == 2 * 3  # both recordings: the original, and Opus at two rates
    assert "Opus 6, " in page

    # The samples are what was measured; and a second start finds all of it done.
    heard, _ = soundfile.read(tmp_path / "samples" / "a.wav.Opus_32.flac", dtype="float32")
    original, _ = soundfile.read(f"{config.data}/a.wav", dtype="float32")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    measured = next(line for line in lines if (line["recording"], line["system"]) == ("a.wav", "Opus 32"))
    again = float(si_snr(jnp.asarray(heard)[None], jnp.asarray(original)[None])[0])
    np.testing.assert_allclose(again, measured["SI-SNR"], atol=0.05)  # 16 bits
    monkeypatch.setattr(codec_eval, "measure", None)
    codec_eval.main(config, tmp_path)


def test_another_config_does_not_go_on(config, tmp_path):
    codec_eval.main(dataclasses.replace(config, opus_kbps=(6.0,), max_recordings=1), tmp_path)
    with pytest.raises(ValueError, match="max_s None there, 0.5 now"):
        codec_eval.main(dataclasses.replace(config, opus_kbps=(6.0,), max_recordings=1, max_s=0.5), tmp_path)


def test_a_codec_goes_through_its_files(config, tmp_path):
    """Beside Opus: its bits are those of the files, and its waveform is what the codec gives without any file."""
    save_codec(tiny_codec.make_codec(), tmp_path / "tiny")
    config = dataclasses.replace(config, codecs=(str(tmp_path / "tiny"),), num_codebooks=(2,), max_recordings=1)
    codec_eval.main(config, tmp_path / "run")
    tiny, *opus = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (tiny["system"], tiny["nominal_kbps"], len(opus)) == ("tiny 3.2", 3.2, 2)
    codec = tiny_codec.to_codec(tiny_codec.make_codec())
    header = header_bytes(dataclasses.replace(file_header(codec, 2), num_samples=8000))
    # 400 frames of two codes of 4 bits, 20 bytes about the chunk, and the header twice.
    assert tiny["kbps"] == pytest.approx((400 * 2 * 4 + 8 * (20 + 2 * len(header))) / 1000)
    expected = codec.decode(codec.encode(load_audio(f"{config.data}/a.wav", 8000), num_codebooks=2))[:, 0]
    expected = soxr.resample(np.clip(expected, -1, 1), 8000, RATE, quality="VHQ")
    heard, _ = soundfile.read(tmp_path / "run" / "samples" / "a.wav.tiny_3.2.flac", dtype="float32")
    np.testing.assert_allclose(heard, np.clip(expected, -1, 1), atol=1e-4)  # 16 bits


def test_two_codecs_of_one_name_are_refused(config, tmp_path):
    for folder in ("x", "y"):
        save_codec(tiny_codec.make_codec(), tmp_path / folder)
    config = dataclasses.replace(config, codecs=(str(tmp_path / "x"), str(tmp_path / "y")))
    with pytest.raises(ValueError, match="y is the second that is called tiny"):
        codec_eval.main(config, tmp_path / "run")


def test_levels_of_a_codec():
    codec = tiny_codec.to_codec(tiny_codec.make_codec())
    assert codec_eval._levels(codec, ()) == [2, 4]
    assert codec_eval._levels(codec, (1, 3, 5)) == [1, 3]
    untold = dataclasses.replace(codec.config, bandwidths=())
    assert codec_eval._levels(dataclasses.replace(codec, model=codec.model.clone(config=untold)), ()) == [1, 2, 4]


def test_max_s_cuts(config):
    recordings = codec_eval.Recordings(dataclasses.replace(config, max_s=0.25, max_recordings=1))
    assert recordings.names == ["a.wav"]
    assert recordings.read("a.wav", 8000).shape == (2000, 1)


def test_silence_is_refused(config, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(4000), RATE)
    with pytest.raises(ValueError, match=r"silent.wav is silent, which no measure can judge"):
        codec_eval.main(dataclasses.replace(config, data=str(tmp_path)), tmp_path / "run")


def test_codec2_is_for_speech_alone():
    with pytest.raises(ValueError, match=r"codec2_bits_per_second is \(700,\), but speech is false"):
        config_lib.override(ROWS["music"], ["codec2_bits_per_second=700"])
