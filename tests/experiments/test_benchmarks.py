import dataclasses
import itertools
import math
import re

import jax
import numpy as np
import pytest
import torch

from experiments.benchmarks import music_transformer, relative_attention, timing
from experiments.benchmarks.torch_music_transformer import TorchMusicTransformer
from jaxaudio.models.music_transformer import MusicTransformer, MusicTransformerConfig
from jaxaudio.nn.transformer_config import TransformerConfig

TRANSFORMER = TransformerConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, positions="relative", max_distance=8, block_size=8
)
CPSI = {"position_encoding": "concatenated", "label_period": 4}
SIZES = {
    "added": music_transformer.Size(
        MusicTransformerConfig(48, dataclasses.replace(TRANSFORMER, num_layers=1)), length=24, batch_size=2, context=24
    ),
    "cpsi": music_transformer.Size(MusicTransformerConfig(48, TRANSFORMER, **CPSI), length=24, batch_size=2),
}


def test_interleaved_calls_in_turn_and_sets_the_first_call_apart(monkeypatch):
    clock = itertools.accumulate([0, 9, 0, 8, 0, 1, 0, 5, 0, 2, 0, 7, 0, 6, 0, 3])  # starts and ends of the calls
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []
    found = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert found == {"a": (9, 1, 2, 3), "b": (8, 3, 5, 3)}
    with pytest.raises(ValueError, match="got 0"):
        timing.interleaved({}, repeats=0)


def test_table_aligns_its_columns():
    assert (
        timing.table(["name", "s"], [["a", 1.5], ["long name", 10]]) == "name         s\na          1.5\nlong name   10"
    )


def test_relative_attention_benchmark(capsys):
    arguments = relative_attention.parse(["--lengths=16", "--block_size=8", "--repeats=1", "--fit_gb=0.001"])
    found = relative_attention.main(arguments)
    assert found.growth <= 2.2
    assert found.gather_to_blockwise >= 50
    # Gathering stores at least one embedding of 64 floats for each of 8 heads and 16 x 16 pairs.
    assert found.executables["gather", 16].temporary_bytes > 8 * 16**2 * 64 * 4
    assert [form for form, _ in found.timings] == ["skew", "blockwise", "local"]
    printed = capsys.readouterr().out
    assert re.search(r"^L=16 gather +does not fit", printed, re.MULTILINE)
    for form in ("skew", "blockwise", "local"):
        assert re.search(rf"^L=16 {form} +\d+\.\d ", printed, re.MULTILINE)


def test_the_paper_is_beside_our_memory():
    ours = dict.fromkeys(
        itertools.product(relative_attention.FORMS, [650, 8192]), relative_attention.Executable(None, 8e6, 1.0)
    )
    lines = relative_attention.memory_table(ours, [650, 8192]).splitlines()
    assert lines[1].split() == ["gather", "1.00", "1.00"]
    assert lines[2].split() == ["Table", "1,", "gather", "108", "+", "1.7", "-"]
    assert [line.split()[0] for line in lines[3:]] == ["skew", "Table", "blockwise", "local"]


def test_a_form_that_cannot_be_compiled_has_no_memory_figure(monkeypatch):
    def fails(*_):
        def run(*_):
            raise jax.errors.JaxRuntimeError(message)

        return run

    monkeypatch.setattr(relative_attention, "forward_backward", fails)
    message = "RESOURCE_EXHAUSTED: out of memory"
    found = relative_attention.compile_form("gather", 16, 8)
    assert found.run is None
    assert math.isnan(found.temporary_bytes)
    message = "INTERNAL: other"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: other"):
        relative_attention.compile_form("gather", 16, 8)


def test_music_transformer_benchmark(capsys):
    options = [
        "--sizes=added",
        "--steps=1",
        "--decodes=1",
        "--cores=2",
        "--matmul_side=16",
        "--dropout_generators=hash",
    ]
    found = music_transformer.main(music_transformer.parse(options, SIZES), SIZES)
    assert list(found["training"]["added"]) == ["ours, hash", "torch"]
    assert all(rate > 0 for rate in found["decoding"]["added"])
    printed = capsys.readouterr().out
    assert "logits without dropout agree to" in printed
    for row in ("ours, hash", "torch", "cached", "full sequence for each token"):
        assert f"\n{row} " in printed


@pytest.fixture(scope="module")
def cpsi():
    """A model with labels, its parameters, a batch, and what it gives."""
    size = SIZES["cpsi"]
    model, batch = MusicTransformer(size.model), music_transformer.make_batch(size)
    params = music_transformer.random_params(size.model)
    return params, batch, music_transformer.our_outputs(model, params, batch)


def test_the_peer_is_the_same_function_also_with_labels(cpsi):
    params, batch, ours = cpsi
    peer = TorchMusicTransformer(SIZES["cpsi"].model, 24).load(params)
    assert music_transformer.require_same(ours, music_transformer.torch_outputs(peer, batch)) < 1e-5


def test_a_peer_with_one_other_weight_is_refused(cpsi):
    params, batch, ours = cpsi
    peer = TorchMusicTransformer(SIZES["cpsi"].model, 24).load(params)
    with torch.no_grad():
        peer.blocks[1].relative_embeddings[0, -1, 0] += 0.1
    with pytest.raises(ValueError, match=r"the models differ, logits by \d.*nothing is timed"):
        music_transformer.require_same(ours, music_transformer.torch_outputs(peer, batch))


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_models_that_differ_in_one_figure_alone_are_refused(cpsi, name):
    ours = cpsi[2]
    for wrong in (1.001 * getattr(ours, name), math.nan):
        with pytest.raises(ValueError, match=rf"{name.replace('_', ' ')} by (\d|nan)"):
            music_transformer.require_same(ours, ours._replace(**{name: wrong}))


def test_a_peer_that_lacks_a_parameter_is_refused(cpsi):
    with pytest.raises(RuntimeError, match="concatenated.weight"):
        TorchMusicTransformer(SIZES["added"].model, 24).load(cpsi[0])


def test_the_flops_of_a_step_by_hand():
    size = music_transformer.Size(MusicTransformerConfig(48, TRANSFORMER), length=10, batch_size=3)
    forward = 0
    for _, _, position in np.ndindex(3, 2, 10):  # rows, layers, positions; a product and a sum each
        forward += 2 * (4 * 16 * 16 + 2 * 16 * 24)  # q, k, v, out; up, down
        forward += 2 * 2 * 8 * (2 * (position + 1) + min(position + 1, 8))  # heads, head_dim; logits, values, relative
    forward += 3 * 10 * 2 * 16 * 48
    assert music_transformer.step_flops(size) == 3 * forward


def test_decoding_that_differs_from_the_full_pass_is_refused():
    logits = {0: np.array([0.0, 1.0]), 2: np.array([0.5, 0.5])}
    music_transformer.require_greedy(np.array([1, 9, 0]), logits)
    with pytest.raises(ValueError, match="cached decoding chose 0 at 0, a full pass 1"):
        music_transformer.require_greedy(np.array([0, 9, 0]), logits)


def test_an_unknown_size_is_refused(capsys):
    with pytest.raises(SystemExit):
        music_transformer.parse(["--sizes", "huge"])
    assert "unknown huge; one of small, paper" in capsys.readouterr().err
