"""Every training of a codec, tiny, on recordings that the test writes: from files to a codec folder and a page."""

import contextlib
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import soundfile

from experiments import (
    codec_report,
    codec_training,
    dac_44khz,
    encodec_24khz,
    encodec_32khz,
    soundstream_24khz,
    soundstream_speech,
)
from jaxaudio import config as configs
from jaxaudio import sharding
from jaxaudio.convert.codec import load_codec
from jaxaudio.data.audio_crops import CropConfig, SourceConfig, SplitConfig
from jaxaudio.data.recordings import Recording
from jaxaudio.generate.codec import Codec
from jaxaudio.models.soundstream import SoundStream
from jaxaudio.nn.discriminator_config import DiscriminatorConfig, MultiScaleSTFTConfig
from jaxaudio.ops.codebook_ema import CodebookConfig
from jaxaudio.ops.metrics import si_snr

STFT = DiscriminatorConfig(multi_scale_stft=MultiScaleSTFTConfig(win_lengths=(64,), features=2, dilations=(1,)))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Twelve recordings of half a second, chirps in noise."""
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(12):
        rng = np.random.default_rng(number)
        time_s = np.arange(8000) / 16_000
        waveform = 0.3 * np.sin(2 * np.pi * (200 + 40 * number + 300 * time_s) * time_s) + 0.02 * rng.normal(size=8000)
        soundfile.write(folder / f"{number:02}.wav", waveform, 16_000, subtype="FLOAT")
    return folder


def tiny(config, data_dir, **fields):
    """The config with nets as small as they can be, for two steps on the test's recordings."""
    sizes = {"num_filters": 4, "embed_dim": 8, "strides": (4, 8), "dilations": (1,), "decoder_filters": None}
    seanet = dataclasses.replace(config.model.seanet, **sizes)
    rvq = dataclasses.replace(config.model.rvq, num_codebooks=3, codebook_size=16, codebook_dim=8, embed_dim=8)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, seanet=seanet, rvq=rvq, bandwidths=()),
        discriminator=STFT,
        spectral_windows=(64,),
        data_dir=str(data_dir),
        split=SplitConfig(valid=("0[01]",), test=("0[23]",), valid_rate=0.0, test_rate=0.0),
        sources=(SourceConfig("", 1.0),),
        crop=dataclasses.replace(config.crop, num_samples=512),
        evaluation=codec_training.EvaluationConfig(num_codebooks=(1, 3), crop_s=0.25, batch_size=8, num_examples=1),
        batch_size=8,
        num_steps=2,
        log_every=1,
        evaluate_every=2,
        mesh="data:4,fsdp:2",
        **fields,
    )


@pytest.mark.slow
def test_soundstream_on_speech(data_dir, tmp_path, capsys):
    config = soundstream_speech.Config()
    optimizer = dataclasses.replace(config.optimizer, num_steps=2, warmup_steps=1)
    config = tiny(config, data_dir, optimizer=optimizer, spectral_mels=(8,), adversarial_start=1)
    soundstream_speech.main(config, tmp_path)
    assert re.search(r"6 kbps: mel distance [\d.]+, SI-SNR -?[\d.]+ dB", capsys.readouterr().out)
    assert configs.from_json(soundstream_speech.Config, (tmp_path / "config.json").read_text()) == config

    checkpoint = load_codec(tmp_path / "codec", kind="soundstream")
    assert checkpoint.config == config.model
    assert checkpoint.params["quantizer"]["codebooks"].any()
    codec = Codec(checkpoint.name, SoundStream(checkpoint.config), checkpoint.params)
    assert codec.decode(codec.encode(np.zeros(1000, np.float32))).shape == (1000, 1)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    shares = [value for name, value in first.items() if name.startswith("train/share/")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert len(shares) == 4
    assert first["train/share/adversarial"] == first["train/share/feature"] == 0  # the discriminators join later
    assert lines[1]["train/share/adversarial"] > 0
    assert lines[1]["train/share/feature"] > 0
    assert {f"train/{name}/{level}" for name in ("perplexity", "dead_codes") for level in range(3)} <= set(first)
    assert {"validation/si_snr/2", "validation/mel_distance/6"} <= set(lines[-1])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<audio") == 3  # the original and two rates
    assert page.count("<svg") == 5
    assert "How much of the pull on the reconstruction comes from adversarial, feature, " in page
    assert "Codebook perplexity and dead codes of every level" in page

    soundstream_speech.main(config, tmp_path)
    assert "complete: open" in capsys.readouterr().out


ROWS = {
    "soundstream": (soundstream_24khz, "denoising", {"spectral_mels": 8}),
    "encodec": (encodec_24khz, "paper", {"spectral_mels": 8, "num_levels": (1, 3)}),
    "encodec 32 kHz": (encodec_32khz, "paper", {"spectral_mels": 8}),
    "dac": (
        dac_44khz,
        "paper",
        {
            "spectral_mels": (8,),
            "optimizer": dac_44khz.adamw(2, clip_norm=1000.0),
            "disc_optimizer": dac_44khz.adamw(2, clip_norm=10.0),
        },
    ),
}
LOSSES = {
    "soundstream": {"spectral", "adversarial", "feature"},
    "encodec": {"waveform", "spectral", "adversarial", "feature"},
    "encodec 32 kHz": {"waveform", "spectral", "adversarial", "feature"},
    "dac": {"spectral", "adversarial", "feature"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_paper_rows(name, data_dir, tmp_path):
    module, row, fields = ROWS[name]
    if name == "soundstream":
        fields = fields | {"noise_dir": str(data_dir)}
    if hasattr(module.ROWS[row], "codebooks"):
        fields = fields | {"codebooks": CodebookConfig(dead_usage=0.1, dead_is_relative=True, kmeans_iterations=2)}
    config = tiny(module.ROWS[row], data_dir, **fields)
    module.main(config, tmp_path)
    assert configs.from_json(module.Config, (tmp_path / "config.json").read_text()) == config
    checkpoint = load_codec(tmp_path / "codec", kind=name.split()[0])
    assert not checkpoint.config.seanet.weight_norm
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert {n.removeprefix("train/share/") for n in first if n.startswith("train/share/")} == LOSSES[name]
    assert {"train/commitment", "train/discriminator_loss", "train/perplexity/2", "train/learning_rate"} <= set(first)
    assert (tmp_path / "report.html").exists()


class Stopped(Exception):
    """Everything that was to be seen was seen."""


def drawn_levels(module, config, workdir, monkeypatch):
    """How many levels (draws, rows) a training asks its model for, batch after batch."""
    drawn = []

    class Asked:
        def __init__(self, config):
            self.config = config

        def apply(self, variables, waveform, num_levels):
            drawn.append(np.asarray(num_levels))
            raise Stopped

    def draw(generate, *rest, **options):
        for seed in range(60):
            with contextlib.suppress(Stopped):
                generate({}, {"waveform": np.zeros((config.batch_size, 64, 1), np.float32)}, jax.random.key(seed))
        raise Stopped

    for name in ("SoundStream", "EnCodec", "DAC"):
        monkeypatch.setattr(module, name, Asked, raising=False)
    monkeypatch.setattr(module, "init_adversarial_state", lambda *rest, **options: (None, None))
    monkeypatch.setattr(module, "make_adversarial_step", draw)
    with pytest.raises(Stopped):
        module.main(config, workdir)
    return np.stack(drawn)


@pytest.mark.parametrize("name", ["speech", *ROWS])
def test_levels_are_drawn_as_in_the_papers(name, data_dir, tmp_path, monkeypatch):
    """By example in SoundStream and in half of DAC's, by batch in EnCodec."""
    if name == "speech":
        module, config = soundstream_speech, soundstream_speech.Config()
        optimizer = dataclasses.replace(config.optimizer, num_steps=2, warmup_steps=1)
        fields = {"optimizer": optimizer, "spectral_mels": (8,)}
    else:
        module, _, fields = ROWS[name]
        config = module.ROWS["paper"]
    levels = drawn_levels(module, tiny(config, data_dir, **fields), tmp_path, monkeypatch)
    assert levels.shape == (60, 8)
    if name.startswith("encodec"):
        np.testing.assert_array_equal(levels, np.repeat(levels[:, :1], 8, axis=1))
        assert {*levels[:, 0].tolist()} == ({1, 3} if name == "encodec" else {1, 2, 3})
        return
    if name == "dac":
        assert (levels[:, 4:] == 3).all()
        levels = levels[:, :4]
    np.testing.assert_allclose(np.bincount(levels.ravel(), minlength=4) / levels.size, [0, *[1 / 3] * 3], atol=0.1)
    assert np.mean(levels != levels[:, :1]) > 0.4  # 3/4 or 7/8 of the rows are others, 2/3 of these differ


@pytest.mark.parametrize("module", [soundstream_24khz, encodec_24khz, encodec_32khz, dac_44khz])
def test_every_row_has_a_card(module):
    for row, config in module.ROWS.items():
        assert config.row == row
        card = codec_report.own_card(module.CARDS, row, steps=3, hardware="a cpu")
        assert (card.reported, card.steps) == (None, 3)
        assert max(config.evaluation.num_codebooks) <= config.model.num_codebooks


def test_splits_are_loaded_apart(data_dir):
    split = SplitConfig(test=("0[23]",), valid_rate=0.3, test_rate=0.0)
    splits = codec_training.load_splits(data_dir, split, sample_rate=8000, channels=1)
    names = {name: {recording.name for recording in found} for name, found in splits.items()}
    assert names["test"] == {"02.wav", "03.wav"}
    assert not names["train"] & (names["valid"] | names["test"])
    assert sum(map(len, names.values())) == 12
    assert codec_training.describe(splits).startswith(f"Recordings: {len(names['train'])} (0.0 minutes) in train, ")
    with pytest.raises(ValueError, match="in the split 'valid'"):
        codec_training.load_splits(data_dir, dataclasses.replace(split, valid_rate=0.0), sample_rate=8000, channels=1)
    soundfile.write(data_dir / "same.wav", soundfile.read(data_dir / "02.wav")[0], 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"02.wav of test has the samples of same.wav of train"):
        codec_training.load_splits(data_dir, dataclasses.replace(split, valid=("00",)), sample_rate=8000, channels=1)
    (data_dir / "same.wav").unlink()


class Louder:
    """A codec whose levels make everything louder: level n gives n times the waveform."""

    config = soundstream_speech.MODEL

    def apply(self, variables, waveform, num_levels):
        return variables["params"] * num_levels[:, None, None] * waveform, None


def test_evaluation_by_hand():
    """Scaling is nothing to SI-SNR, and log10(2) for each mel that is above the floor, over seven windows."""
    rng = np.random.default_rng(0)
    waveform = rng.normal(size=(40_000, 1)).astype(np.float32) * 0.3
    silent = np.zeros((16_000, 1), np.float32)
    recordings = [Recording("a", waveform, 16_000, 1.0), Recording("silent", silent, 16_000, 0.0)]
    config = codec_training.EvaluationConfig(num_codebooks=(1, 2), batch_size=8)
    mesh = sharding.make_mesh("data:-1")
    evaluate = codec_training.make_evaluate(Louder(), recordings, config, mesh, sharding.DATA)
    found = evaluate(np.float32(1.0))
    assert set(found) == {"loss", "si_snr/0.4", "si_snr/0.8", "mel_distance/0.4", "mel_distance/0.8"}
    assert found["mel_distance/0.4"] == pytest.approx(0, abs=1e-5)
    assert 6 * np.log10(2) < found["mel_distance/0.8"] <= 7 * np.log10(2) + 1e-5  # empty filters have no difference
    assert found["loss"] == pytest.approx(found["mel_distance/0.8"] / 2)
    assert found["si_snr/0.4"] == 100
    with pytest.raises(ValueError, match="no held-out crop of 1.0 s"):
        codec_training.make_evaluate(Louder(), recordings[1:], config, mesh, sharding.DATA)


def test_measures_of_joined_recordings():
    rng = np.random.default_rng(1)
    config = dataclasses.replace(soundstream_speech.MODEL, sample_rate=16_000)

    def pair(name, length, noise):
        waveform = rng.normal(size=(length, 1)).astype(np.float32)
        other = waveform + noise * rng.normal(size=waveform.shape).astype(np.float32)
        return Recording(name, waveform, 16_000, 1.0), {1.0: other, 2.0: waveform}

    coded = [pair("a/1.wav", 3000, 0.1), pair("a/2.wav", 5000, 0.1), pair("b/3.wav", 8000, 0.5)]
    results = {(r.folder, r.kbps): r for r in codec_report.measure(config, coded, piece_s=0.25)}
    assert [results[folder, 1.0].num_recordings for folder in ("a", "b", "all")] == [2, 1, 3]
    assert results["all", 1.0].duration_s == pytest.approx(1.0)
    snrs = [float(si_snr(x[1.0].T, recording.waveform.T)[0]) for recording, x in coded]
    assert results["a", 1.0].si_snr == pytest.approx(np.mean(snrs[:2]), abs=1e-3)
    assert results["all", 1.0].si_snr == pytest.approx(np.mean(snrs), abs=1e-3)
    assert results["all", 2.0].mel_distance == 0
    assert 0 < results["a", 1.0].mel_distance < results["all", 1.0].mel_distance < results["b", 1.0].mel_distance


def test_test_recordings_are_chosen_evenly():
    recordings = [Recording(f"d/{i}.wav", np.ones((4000, 1), np.float32), 16_000, 1.0) for i in range(10)]
    recordings.append(Recording("s/short.wav", np.ones((2000, 1), np.float32), 16_000, 1.0))
    recordings.append(Recording("s/silent.wav", np.zeros((4000, 1), np.float32), 16_000, 0.0))
    recordings.append(Recording("s/good.wav", np.ones((4000, 1), np.float32), 16_000, 1.0))
    assert [r.name for r in codec_report.choose(recordings, 4)] == [*(f"d/{i}.wav" for i in (0, 3, 6, 9)), "s/good.wav"]
    assert len(codec_report.choose(recordings, 20)) == 11


def test_codes_without_gradients_are_counted():
    codes = jax.numpy.asarray([[[0, 0, 1, 1]], [[0, 0, 1, 1]]])
    params, state, metrics = codec_training.count_codes(8)({"a": 1}, None, codes, None)
    assert (params, state) == ({"a": 1}, None)
    np.testing.assert_allclose(metrics["perplexity"], [2.0], rtol=1e-6)
    assert metrics["dead_codes"].tolist() == [6.0]


def test_fields_that_do_not_fit():
    with pytest.raises(ValueError, match="num_steps is 7, but optimizer.num_steps 5500"):
        dataclasses.replace(soundstream_speech.Config(), num_steps=7)
    with pytest.raises(ValueError, match="model.denoising=True, but crop.denoise_rate=None"):
        dataclasses.replace(soundstream_24khz.ROWS["denoising"], crop=CropConfig(100))
    with pytest.raises(ValueError, match=r"num_levels=\(0, 2\); the model has 1 to 32"):
        dataclasses.replace(encodec_24khz.ROWS["paper"], num_levels=(0, 2))
    with pytest.raises(ValueError, match="num_steps is 5, but an optimizer's 400000"):
        dataclasses.replace(dac_44khz.ROWS["paper"], num_steps=5)
    with pytest.raises(ValueError, match="dropout_rate=1.5"):
        dataclasses.replace(dac_44khz.ROWS["paper"], dropout_rate=1.5)
