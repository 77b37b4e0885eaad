"""Whisper's trainings, small: rows train, what must not move does not, what is written is what was trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import linen as nn

from experiments import whisper_finetune, whisper_pretrain
from jaxaudio import config as configs
from jaxaudio.convert.export import inspect_checkpoint, load, to_tree
from jaxaudio.convert.whisper import load_whisper, save_whisper
from jaxaudio.data.byte_pair import train_byte_pairs
from jaxaudio.data.manifests import read_manifest
from jaxaudio.data.whisper_batches import WhisperData, manifest_windows, whisper_batches
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.models.whisper import Whisper, WhisperConfig
from jaxaudio.ops.mel import whisper_log_mel
from jaxaudio.ops.positions import sinusoids
from jaxaudio.ops.spec_augment import SpecAugmentConfig

MODEL = WhisperConfig(
    vocab_size=371,
    num_mels=32,
    embed_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_frames=200,
    text_length=24,
)
TINY = [f"model.{name}={getattr(MODEL, name)}" for name in (
    "vocab_size", "num_mels", "embed_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "num_frames",
    "text_length",
)]  # fmt: skip
TINY += ["model.alignment_heads=None", "data.speechless_rate=1.0"]
STEPS = ["num_steps=2", "optimizer.num_steps=2", "optimizer.warmup_steps=1", "log_every=1", "batch_size=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recordings with a list, a vocabulary, and a checkpoint with random parameters."""
    folder = tmp_path_factory.mktemp("whisper")
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 3.0), ("b", 1.5)):
        soundfile.write(folder / f"{name}.wav", rng.uniform(-0.3, 0.3, round(16000 * seconds)), 16000)
    segments = [{"start_s": 0.2, "end_s": 1.0, "text": "one two"}, {"start_s": 1.6, "end_s": 2.8, "text": "two"}]
    lines = [
        {"audio": "a.wav", "language": "en", "segments": segments},
        {"audio": "b.wav", "language": "en", "text": "one"},
    ]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = WhisperTokenizer.for_ranks(train_byte_pairs([" one", " two"], 5), ("en",), 101)
    tokenizer.save(folder / "tokenizer")
    params = jax.jit(Whisper(MODEL).init)(jax.random.key(5), jnp.zeros((1, 200, 32)), jnp.zeros((1, 1), jnp.int32))
    save_whisper(folder / "base", MODEL, nn.meta.unbox(params)["params"], tokenizer)
    return folder


@jax.jit
def apply(params, mel, tokens):
    return Whisper(MODEL).apply({"params": params}, mel, tokens)


def metrics(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
def test_the_row_with_every_option_trains_two_steps_from_scratch(folder, tmp_path, capsys):
    paths = [f"manifest={folder}/list.jsonl", f"valid_manifest={folder}/list.jsonl", f"tokenizer={folder}/tokenizer"]
    config = configs.override(whisper_pretrain.ROWS["large-v2"], [*TINY, *STEPS, *paths])
    whisper_pretrain.main(config, tmp_path)
    losses = metrics(tmp_path, "train/loss")
    assert len(losses) == 2
    # Untrained, the loss is near that of guessing among all ids.
    assert all(abs(loss - np.log(MODEL.vocab_size)) < 1.5 for loss in [*losses, *metrics(tmp_path, "validation/loss")])
    assert "3 windows, 0 without speech left out; 3 held out" in capsys.readouterr().out
    checkpoint = load_whisper(tmp_path / "model")
    assert (
        dataclasses.replace(checkpoint.config, remat_policy=None, dtype="float32", stochastic_depth_rate=0.0) == MODEL
    )
    # The table of sinusoids, by the formula of the release, is there to the last bit, whatever the weight decay.
    positions, channels = np.arange(100)[:, None], np.exp(-np.log(1e4) / 7 * np.arange(8))[None]
    table = np.concatenate([np.sin(positions * channels), np.cos(positions * channels)], axis=1)
    np.testing.assert_allclose(checkpoint.params["encoder"]["position_embedding"], table, atol=1e-5)
    untrained = sinusoids(jnp.arange(100), 16)
    np.testing.assert_array_equal(checkpoint.params["encoder"]["position_embedding"], untrained)
    page = (tmp_path / "report.html").read_text()
    assert "not public" in page
    assert "model.embed_dim" in page


def test_rows_are_those_of_tables_17_to_19():
    found = {
        name: (row.optimizer.learning_rate, row.num_steps, row.batch_size, row.model.embed_dim)
        for name, row in whisper_pretrain.ROWS.items()
    }
    v1 = (1_048_576, 256)
    assert found == {
        "tiny": (1.5e-3, *v1, 384),
        "base": (1e-3, *v1, 512),
        "small": (5e-4, *v1, 768),
        "medium": (2.5e-4, *v1, 1024),
        "large": (1.75e-4, *v1, 1280),
        "large-v2": (2e-4, 655_360, 1024, 1280),
    }
    for name, row in whisper_pretrain.ROWS.items():
        o = row.optimizer
        assert (o.name, o.b1, o.b2, o.epsilon, o.weight_decay, o.clip_norm) == ("adamw", 0.9, 0.98, 1e-6, 0.1, 1.0)
        assert (o.schedule, o.warmup_steps, o.final_fraction) == ("linear", 2048, 0.0)
        assert (row.data.speechless_rate, row.data.previous_text_rate) == (0.1, 0.5)
        v2 = name == "large-v2"
        assert row.data.bpe_dropout == row.model.stochastic_depth_rate == (0.1 if v2 else 0.0)
        assert (row.augment == SpecAugmentConfig()) == v2
        assert row.model.dropout_rate == 0


NO_AUGMENTATION = ["augment.time_warp=0", "augment.num_frequency_masks=0", "augment.num_time_masks=0"]


def finetune(row, folder, workdir, *overrides):
    lists = [f"checkpoint={folder}/base", f"manifest={folder}/list.jsonl", f"valid_manifest={folder}/list.jsonl"]
    fields = dict(text.split("=") for text in [*lists, *STEPS, *NO_AUGMENTATION, *overrides])  # the last one counts
    config = configs.override(whisper_finetune.ROWS[row], [f"{name}={value}" for name, value in fields.items()])
    whisper_finetune.main(config, workdir)
    return config


def base_loss(folder, config):
    """Nats per token of the base model on the first batch, in numpy."""
    base = load_whisper(folder / "base")
    examples = manifest_windows(read_manifest(folder / "list.jsonl"), base.tokenizer, 2.0)
    window = {"window_s": 2.0, "text_length": 24}
    batch = next(whisper_batches(examples, base.tokenizer, config.data, batch_size=8, seed=config.seed, **window))
    mel = whisper_log_mel(jnp.asarray(batch["waveform"]), 32)
    logits = np.asarray(apply(base.params, mel, jnp.asarray(batch["inputs"])), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_probabilities, batch["targets"][..., None], axis=-1)[..., 0]
    return nats[batch["mask"]].mean()


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    return workdir, finetune("lora", folder, workdir, "lora.rank=2", "optimizer.learning_rate=0.1")


def test_lora_begins_with_the_loss_of_the_base_model(folder, lora):
    workdir, config = lora
    assert metrics(workdir, "train/loss")[0] == pytest.approx(base_loss(folder, config), abs=1e-5)


def test_lora_leaves_the_base_bit_for_bit_and_has_state_for_the_factors_alone(folder, lora):
    workdir, _ = lora
    base, trained = leaves(load_whisper(folder / "base").params), to_tree(load(workdir / "parameters.safetensors"))
    for name, leaf in leaves(trained["base"]).items():
        np.testing.assert_array_equal(leaf, base[name], err_msg=name)
    # Three attentions of width 16 in one layer each: query and value, a (16, 2) and b (2, 16).
    num_factors, num_base = 3 * 2 * 2 * 32, sum(leaf.size for leaf in base.values())
    assert sum(leaf.size for leaf in leaves(trained["lora"]).values()) == num_factors
    counters = 3  # the run's steps, Adam's and the schedule's
    assert inspect_checkpoint(workdir).state_size == num_base + 3 * num_factors + counters


def test_the_written_model_is_the_merged_one(folder, lora):
    workdir, _ = lora
    trained = to_tree(load(workdir / "parameters.safetensors"))
    merged = jax.tree.map(np.array, trained["base"])
    for stack, name in (("encoder", "attention"), ("decoder", "attention"), ("decoder", "cross_attention")):
        for target in ("query", "value"):
            factors = trained["lora"][stack]["transformer"]["layers"][name][target]
            kernel = merged[stack]["transformer"]["layers"][name][target]["kernel"]
            kernel += 16 / 2 * np.einsum("LDr,LrNH->LDNH", factors["a"], factors["b"])
    checkpoint = load_whisper(workdir / "model")
    mel = jnp.asarray(np.random.default_rng(1).standard_normal((1, 200, 32)), jnp.float32)
    tokens = jnp.asarray([[1, 2, 3]], jnp.int32)
    logits = [
        apply(params, mel, tokens) for params in (checkpoint.params, merged, load_whisper(folder / "base").params)
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert float(jnp.max(jnp.abs(logits[0] - logits[2]))) > 1e-2
    assert checkpoint.tokenizer == load_whisper(folder / "base").tokenizer


@pytest.mark.slow
def test_the_whole_model_is_tuned_until_it_knows_one_batch_by_heart(folder, tmp_path):
    steps = ["num_steps=100", "optimizer.num_steps=100", "optimizer.warmup_steps=5", "optimizer.learning_rate=0.03"]
    rates = ["data.timestamps_rate=1.0", "data.previous_text_rate=0.0", "evaluate_every=100", "checkpoint_every=100"]
    config = finetune("full", folder, tmp_path, *steps, *rates, "remat_policy=None")
    losses = metrics(tmp_path, "train/loss")
    assert losses[0] == pytest.approx(base_loss(folder, config), abs=1e-5)
    assert losses[-1] < 0.1
    assert metrics(tmp_path, "validation/loss")[-1] < 0.1
    base, tuned = (leaves(load_whisper(path).params) for path in (folder / "base", tmp_path / "model"))
    same = [name for name in base if np.array_equal(base[name], tuned[name])]
    assert same == ["encoder/position_embedding"]


def test_what_a_run_needs_is_checked_before_it_trains(folder, tmp_path):
    with pytest.raises(configs.ConfigError, match="num_steps is 3, but optimizer.num_steps 4000"):
        configs.override(whisper_finetune.ROWS["full"], ["num_steps=3"])
    with pytest.raises(configs.ConfigError, match="num_steps is 3, but optimizer.num_steps 1048576"):
        configs.override(whisper_pretrain.ROWS["tiny"], ["num_steps=3"])
    (folder / "bad.jsonl").write_text(json.dumps({"audio": "b.wav", "text": "one"}) + "\n")
    with pytest.raises(ValueError, match="b.wav: has no language"):
        finetune("full", folder, tmp_path, f"manifest={folder}/bad.jsonl")
    assert not (tmp_path / "metrics.jsonl").exists()
    assert WhisperData() == whisper_pretrain.ROWS["tiny"].data
