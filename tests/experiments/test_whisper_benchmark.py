"""The Whisper benchmark, small: formulas by hand, checks that refuse what differs, every part once in tiny shapes."""

import dataclasses
import itertools
import json
import math
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import soundfile

from experiments.benchmarks import (
    comparison,
    timing,
    whisper,
    whisper_accelerator,
    whisper_limits,
    whisper_parts,
    whisper_peers,
)
from experiments.benchmarks.whisper_limits import Peaks
from jaxaudio.models.whisper import SIZES, Whisper, WhisperConfig

TINY = WhisperConfig(
    vocab_size=51865, num_mels=80, embed_dim=32, num_heads=2, num_encoder_layers=2, num_decoder_layers=1
)
# Other numbers for everything, so that none stands in for another.
ODD = WhisperConfig(
    vocab_size=50, num_mels=7, embed_dim=12, num_heads=3, num_encoder_layers=2, num_decoder_layers=3, num_frames=20
)


@pytest.fixture(autouse=True)
def keep_programs(monkeypatch):
    """No test reads the time of a first call, for which the parts forget what is compiled."""
    monkeypatch.setattr("jax.clear_caches", lambda: None)


@pytest.fixture(scope="module")
def kernels():
    """The parameters of ODD with two axes or more, by path and layer: shapes from the model itself."""
    mel, tokens = jax.ShapeDtypeStruct((1, 20, 7), np.float32), jax.ShapeDtypeStruct((1, 3), np.int32)
    tree = jax.eval_shape(Whisper(ODD).init, jax.random.key(0), mel, tokens)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_the_flops_of_the_encoder_by_the_models_shapes(kernels):
    flops = 0
    for path, leaf in kernels.items():
        if path.startswith("encoder") and "kernel" in path:
            positions = 20 if "conv1" in path else 10
            flops += 2 * positions * leaf.size  # each weight is multiplied and added once a position
    for _, _, _ in np.ndindex(2, 10, 10):  # layers, queries, keys
        flops += 2 * 2 * 12  # logits and values, over all heads together
    assert whisper_limits.encoder_flops(ODD, 5) == 5 * flops


def test_the_decoders_work_by_the_models_shapes(kernels):
    cross = sum(x.size for p, x in kernels.items() if "cross_attention/key/k" in p or "cross_attention/value/k" in p)
    assert whisper_limits.cross_flops(ODD, 5) == 5 * 2 * 10 * cross
    weights = sum(x.size for path, x in kernels.items() if path.startswith("decoder") and "kernel" in path) - cross
    weights += kernels[next(path for path in kernels if "token_embedding" in path)].size
    assert whisper_limits.step_weights(ODD) == weights
    values = 3 * 2 * (10 + 4) * 12  # layers, keys and values, positions of audio and text
    assert whisper_limits.step_bytes(ODD, 5, 4, weight_bytes=1, value_bytes=2) == weights + 5 * 2 * values
    assert whisper_limits.step_flops(ODD, 5, 4) == 5 * 2 * (weights + values)


def test_the_limit_of_decoding_is_bytes_or_operations():
    read = sum(whisper_limits.step_bytes(ODD, 2, seen) for seen in (4, 5, 6))  # three tokens after a prompt of four
    assert whisper_limits.decoding_s(ODD, 2, 3, Peaks(math.inf, 10.0)) == pytest.approx(read / 10)
    flops = sum(whisper_limits.step_flops(ODD, 2, seen) for seen in (4, 5, 6))
    least_s = whisper_limits.decoding_s(ODD, 2, 3, Peaks(10.0, math.inf))
    assert least_s == pytest.approx((flops + whisper_limits.cross_flops(ODD, 2)) / 10)
    assert whisper_limits.decoding_s(ODD, 2, 3, Peaks(10.0, math.inf), cross=False) == pytest.approx(flops / 10)
    with_cross = whisper_limits.encoder_s(ODD, 2, Peaks(10.0, 1.0), cross=True)
    flops = whisper_limits.encoder_flops(ODD, 2) + whisper_limits.cross_flops(ODD, 2)
    assert with_cross == pytest.approx(flops / 10)


def test_the_flops_of_a_log_mel():
    # 100 frames a second: 5/2 * 400 * log2(400) for the transform, 201 bins times 80 filters.
    assert whisper_limits.log_mel_flops(80, 2.0) == pytest.approx(200 * (8643.86 + 2 * 201 * 80), rel=1e-5)


def test_interleaved_stops_within_its_budget_and_checks_before_it_times(monkeypatch):
    clock = itertools.count()  # every call takes one second
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    seen = []
    found = timing.interleaved({"a": lambda: 1, "b": lambda: 2}, 9, budget_s=3.5, check=seen.append)
    assert seen == [{"a": 1, "b": 2}]
    assert found == {"a": (1, 1, 1, 2), "b": (1, 1, 1, 2)}  # 2 s after a round, 4 s after two

    def refuse(outputs):
        raise ValueError(f"outputs are {outputs}")

    calls = []
    with pytest.raises(ValueError, match=r"outputs are \{'a': None\}"):
        timing.interleaved({"a": lambda: calls.append(0)}, 9, check=refuse)
    assert calls == [0]


def test_a_report_shows_rates_ratios_and_shares_of_the_limit(capsys):
    timings = {"ours": timing.Timing(9.0, 1.0, 2.0, 5), "peer": timing.Timing(4.0, 3.0, 4.0, 5)}
    amounts, least_s = {"ours": 8, "peer": 4}, {"ours": 0.5, "peer": 1.0}
    same = {"same": {"ours": "3/4", "peer": "4/4"}}
    found = comparison.report("title", timings, amounts, "tokens", least_s, "peer", same, ["other"], "a note")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["title", "reference: peer; a note"]
    assert lines[4].split() == ["ours", "1", "2", "4", "4.00", "25%", "9", "5", "3/4"]
    assert lines[5].split() == ["peer", "3", "4", "1", "1.00", "25%", "4", "5", "4/4"]
    assert lines[6].split() == ["other", "not", "installed"]
    first = found["rows"][0]
    assert (first["of_reference"], first["of_limit"], first["same"]) == (4.0, 0.25, "3/4")
    assert comparison.claim("a / b", 1.234, 1.5) == {"name": "a / b", "ratio": 1.234, "wanted": 1.5}
    assert capsys.readouterr().out == "a / b: 1.23 times (wanted: at least 1.5)\n"


def test_arrays_that_differ_are_refused():
    exact = np.array([3.0, 4.0])
    outputs = {"peer": exact, "ours": exact + [0.0, 5e-4], "int8": exact + 1}
    comparison.require_close(outputs, "peer", tolerance=1.1e-4, ignore=("int8", "absent"))
    with pytest.raises(ValueError, match="ours differs from peer by 1.0e-04"):
        comparison.require_close(outputs, "peer", tolerance=0.9e-4, ignore=("int8",))
    with pytest.raises(ValueError, match="ours differs from peer by nan"):
        comparison.require_close({"peer": exact, "ours": exact * math.nan}, "peer", tolerance=1.0)
    with pytest.raises(ValueError, match=r"ours gives shape \(1, 2\), peer \(2,\)"):
        comparison.require_close({"peer": exact, "ours": exact[None]}, "peer", tolerance=1.0)


def test_texts_that_differ_are_refused_unless_at_a_tie():
    scores = {(): [0.0, 9.0], (1,): [5.0, 5.0005]}

    def logits(row, tokens):
        assert row == 1
        return np.array(scores[tuple(tokens)])

    same = [[0, 0, 0], [1, 1, 0]]
    comparison.require_same_tokens(same, same, logits)
    comparison.require_same_tokens([[0, 0, 0], [1, 0, 1]], same, logits)
    with pytest.raises(ValueError, match=r"token 0 of row 1 is 0, the reference's 1, whose logits are 0\.0000 and 9"):
        comparison.require_same_tokens([[0, 0, 0], [0, 1, 0]], same, logits)
    assert comparison.count_same([[0, 0, 0], [1, 0, 0]], same) == 4
    comparison.require_lengths("ours", same, 3)
    with pytest.raises(ValueError, match="ours made 2 tokens in row 1, not 3"):
        comparison.require_lengths("ours", [[0, 0, 0], [1, 1]], 3)


def test_audio_is_synthetic_or_the_recordings_over_and_over(tmp_path):
    audio = whisper_parts.make_audio(1.5)
    assert (audio.shape, audio.dtype) == ((24_000,), np.float32)
    np.testing.assert_array_equal(audio, whisper_parts.make_audio(1.5))
    assert 0.05 < np.abs(audio).mean() < np.abs(audio).max() < 1
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds no file"):
        whisper_parts.make_audio(1.0, tmp_path)
    for name, value in (("b", 0.5), ("a", 0.25)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(6000, value, np.float32), 16_000)
    found = whisper_parts.make_audio(1.0, tmp_path)
    np.testing.assert_allclose(found, np.repeat([0.25, 0.5, 0.25], [6000, 6000, 4000]), atol=1e-4)


def test_windows_of_half_a_minute():
    assert whisper_peers.windows(70 * 16_000) == [(0, 30), (30, 60), (60, 70)]
    assert whisper_peers.windows(60 * 16_000) == [(0, 30), (30, 60)]


def test_the_made_up_vocabulary_has_whispers_size():
    for size in (51865, SIZES["large-v3"].vocab_size):
        assert whisper_accelerator.made_up_tokenizer(size).vocab_size == size


def test_pin_comes_first_and_within_the_machine(monkeypatch):
    with pytest.raises(RuntimeError, match="pin must come before jax, numpy, torch"):
        whisper.pin(1)
    monkeypatch.setattr(whisper, "sys", types.SimpleNamespace(modules={}))
    with pytest.raises(ValueError, match=r"cores must be in 1\.\.\d+, .* got 100000"):
        whisper.pin(100_000)
    code = (
        "import os\nfrom experiments.benchmarks import whisper\nwhisper.pin(1)\n"
        "print(len(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'], os.environ['JAX_PLATFORMS'])"
    )
    root = pathlib.Path(whisper.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "1 1 cpu\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "gpu,long"], "gpu runs alone, without the CPU's parts, got gpu,long"),
        (["--parts", "speed"], "unknown speed; one of log_mel, encoder"),
        (["--sizes", "huge"], "unknown huge; one of tiny, base, small"),
        (["--tokens", "225"], r"--tokens must be in 1..224, half the decoder's context, got 225"),
        (["--batch_sizes", "0,8"], r"--batch_sizes must be positive, got \[0, 8\]"),
    ],
)
def test_wrong_options_are_refused(capsys, options, message):
    with pytest.raises(SystemExit):
        whisper.parse(options)
    assert message.replace("\\", "") in capsys.readouterr().err


def test_the_part_for_accelerators_does_not_run_on_a_cpu():
    with pytest.raises(RuntimeError, match=r"jax.default_backend\(\) is cpu"):
        whisper.main(whisper.parse(["--parts", "gpu"]))


QUICK = ["--repeats=1", "--tokens=5", "--windows=1", "--batch_sizes=1", "--minutes=0.8"]


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path, capsys):
    options = ["--sizes=tiny", *QUICK, "--matmul_side=16", "--read_megabytes=1", f"--out={tmp_path / 'found.json'}"]
    found = whisper.main(whisper.parse(options), {"tiny": TINY})
    assert json.loads((tmp_path / "found.json").read_text()).keys() == found.keys()
    assert found["machine"]["versions"]["jax"] == jax.__version__
    rows = {row["who"]: row for part in ("decoding", "long") for result in found[part] for row in result["rows"]}
    for who in ("ours", "openai-whisper", "transformers"):
        assert rows[f"{who}, batch 1"]["same"] == "5/5"
    for who in ("ours, batched", "ours, in sequence"):
        assert rows[who]["same"] == "2/2"
    if whisper_peers.has_faster_whisper():
        assert rows["faster-whisper float32, batch 1"]["same"] == "5/5"
    (int8,) = found["int8"]
    assert 0 < int8["logits_relative_rms"] < 0.05
    assert int8["decoder_bytes"]["float32"] > 3 * int8["decoder_bytes"]["int8"]
    claims = [
        claim for part in ("log_mel", "encoder", "decoding", "long") for x in found[part] for claim in x["claims"]
    ]
    assert [claim["wanted"] for claim in claims] == [1.7, 1.7, 1.0, None, 1.2, 3.0]
    assert all(claim["ratio"] > 0 for claim in claims)
    printed = capsys.readouterr().out
    for title in ("log-mel, 128 mels", "tiny, encoder, 1 x 30 s", "tiny, decoding 5 tokens", "tiny, 48 s of audio"):
        assert f"\n{title}" in printed


@pytest.mark.slow
def test_the_part_for_accelerators_in_small_shapes(capsys):
    config = dataclasses.replace(TINY, vocab_size=51866, num_mels=128, dtype="bfloat16")
    arguments = whisper.parse([*QUICK, "--batch_size=2"])
    windows, long = whisper_accelerator.accelerator_part(config, Peaks(1e15, 1e12), arguments)
    assert [row["who"] for row in windows["rows"]] == ["encode", "decode, bfloat16", "decode, int8 decoder"]
    assert long["seconds_per_hour"] == pytest.approx(75 * long["rows"][0]["median_s"])
    assert all(0 < row["of_limit"] < 1 for row in windows["rows"] + long["rows"])
    assert "s per hour of audio" in capsys.readouterr().out


def test_without_faster_whisper_its_rows_say_so(monkeypatch):
    monkeypatch.setattr(whisper_peers.importlib.util, "find_spec", lambda name: None)
    assert not whisper_peers.has_faster_whisper()
    assert list(whisper_peers.log_mels(80)) == ["openai-whisper", "transformers"]
    assert whisper_parts._absent({"ours"}) == ["faster-whisper float32", "faster-whisper int8"]
