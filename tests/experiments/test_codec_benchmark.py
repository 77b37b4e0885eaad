"""The codecs' benchmark, small: work by torch's own count, latencies by a made-up clock, every part once."""

import itertools
import json

import codec_peers as tiny
import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks import codec_accelerator, codec_limits, codec_parts, codecs
from experiments.benchmarks.codec_peers import make_peers
from jaxaudio.nn.transformer_config import TransformerConfig

MODELS = {
    "encodec_24khz": lambda: tiny.make_encodec("encodec_24khz"),
    "dac_44khz": lambda: tiny.make_dac("even"),
    "mimi": lambda: tiny.make_mimi("mimi"),
}


@pytest.fixture(autouse=True)
def keep_programs(monkeypatch):
    """No test reads the time of a first call, for which the parts forget what is compiled."""
    monkeypatch.setattr("jax.clear_caches", lambda: None)


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def peers(models):
    return {name: make_peers(name, model, 2) for name, model in models.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_work_is_what_torch_counts(name):
    model, num_frames = MODELS[name](), 20
    codec, num_codebooks, encode, decode = make_peers(name, model, 2)
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):  # which the counter cannot follow
            parametrize.remove_parametrizations(module, "weight")
    config = codec.config
    waveform = codec_parts.make_audio(config, num_frames * config.hop_length / config.sample_rate)
    counts = []
    with torch.backends.mkldnn.flags(enabled=False):  # whose LSTM is not counted
        for function, x in ((encode, waveform), (decode, np.zeros((num_codebooks, num_frames), np.int64))):
            with FlopCounterMode(display=False) as counter:
                function(x)
            counts.append(counter.get_total_flops())
    if name == "mimi":  # neither attention nor distances of pairs are counted
        attended = 7 * 40 - sum(range(7))  # by 40 steps, of 7 each but at the start
        counts = [count + 2 * 2 * 2 * 16 * attended for count in counts]
        counts[0] += 2 * num_codebooks * num_frames * 16 * 8
    assert codec_limits.encode_flops(config, num_frames, num_codebooks) == counts[0]
    assert codec_limits.decode_flops(config, num_frames, num_codebooks) == counts[1]


def test_the_work_of_a_transformer_by_hand():
    config = TransformerConfig(num_layers=3, embed_dim=4, num_heads=2, mlp_dim=5, window=2)
    weights = 3 * (4 * 16 + 2 * 20)
    attended = 3 * (1 + 2 + 2)  # the first step sees itself
    assert codec_limits.transformer_flops(config, 3) == 2 * (3 * weights + attended * 2 * 4)


def test_waits_are_from_piece_to_piece(monkeypatch):
    clock = itertools.accumulate([0.0, 1.0, 0.5, 3.0])  # the start, then each piece
    ticks = iter(clock)
    monkeypatch.setattr(codec_parts.time, "perf_counter", lambda: next(ticks))
    assert codec_parts._waits(lambda: iter("abc")) == [1.0, 0.5, 3.0]


def test_codes_and_audio_that_differ_are_refused(peers):
    arguments = codecs.parse(["--duration_s=0.02", "--repeats=1"])
    peak, codec = codec_parts.Peaks(1e9, 1e9), peers["dac_44khz"]
    with pytest.raises(ValueError, match="ours gives .*% of transformers's codes, not 99%; nothing is timed"):
        codec_parts.offline_part(codec._replace(encode=lambda x: (codec.encode(x) + 1) % 16), peak, arguments)
    with pytest.raises(ValueError, match=r"ours gives codes of shape \(2, 28\), expected \(2, 29\)"):
        codec_parts.offline_part(codec._replace(encode=lambda x: np.zeros((2, 29), np.int64)), peak, arguments)
    with pytest.raises(ValueError, match="ours differs from transformers by"):
        codec_parts.offline_part(codec._replace(decode=lambda x: 1.01 * codec.decode(x)), peak, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "gpu,latency"], "gpu runs alone, without the CPU's parts, got gpu,latency"),
        (["--codecs", "opus"], "unknown opus; one of encodec_24khz, dac_44khz, mimi"),
        (["--duration_s", "0"], "--duration_s must be positive, got 0"),
    ],
)
def test_wrong_options_are_refused(capsys, options, message):
    with pytest.raises(SystemExit):
        codecs.parse(options)
    assert message in capsys.readouterr().err


def test_the_part_for_accelerators_does_not_run_on_a_cpu():
    with pytest.raises(RuntimeError, match=r"jax.default_backend\(\) is cpu"):
        codecs.main(codecs.parse(["--parts", "gpu"]))


QUICK = ["--repeats=1", "--duration_s=0.03", "--num_codebooks=2", "--matmul_side=16"]


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path, capsys, models):
    found = codecs.main(codecs.parse([*QUICK, f"--out={tmp_path / 'found.json'}"]), models)
    assert json.loads((tmp_path / "found.json").read_text()).keys() == found.keys()
    assert [result["claims"][0]["wanted"] for result in found["offline"]] == [1.0] * 6
    for result in found["offline"][::2]:
        assert [row["codes equal"] for row in result["rows"]] == ["100.00%"] * 2
    encodec, mimi = found["latency"]
    assert encodec["encode"]["frames"] == encodec["decode"]["frames"] == 24 - 7  # of 30 samples; 7 come at once
    assert mimi["encode"]["frames"] == 59  # of 12 samples
    for what in ("encode", "decode"):
        assert 0 < mimi[what]["median_s"] <= mimi[what]["p95_s"] <= mimi[what]["max_s"]
    printed = capsys.readouterr().out
    for title in ("encodec_24khz, encode 0.03 s, 2 codebooks", "dac_44khz, decode", "mimi, a frame of 0.5 ms"):
        assert f"\n{title}" in printed


@pytest.mark.slow
def test_the_part_for_accelerators_in_small_shapes(capsys, peers):
    configs = {name: one.codec.config for name, one in peers.items()}
    found = codecs.main(codecs.parse([*QUICK, "--parts=gpu", "--batch_size=2"]), configs)["gpu"]
    assert [[row["who"] for row in result["rows"]] for result in found] == [["encode", "decode"]] * 3
    assert all(0 < row["of_limit"] < 1 for result in found for row in result["rows"])
    assert "2 recordings of 0.03 s, 2 codebooks" in capsys.readouterr().out
    assert codec_accelerator.PRESETS.keys() >= codecs.CODECS.keys()
