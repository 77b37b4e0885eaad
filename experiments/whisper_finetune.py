"""Whisper fine-tuned on a list of recordings, as a whole or by LoRA; timestamps stay where the list has segments.

Paper: Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356; Hu et al. 2021, LoRA,
       https://arxiv.org/abs/2106.09685; no row
Run:   python -m experiments.whisper_finetune --workdir runs/mine --set checkpoint=small manifest=train.jsonl
LoRA:  python -m experiments.whisper_finetune --workdir runs/lora --set row=lora checkpoint=small manifest=train.jsonl
Use:   jaxaudio transcribe talk.wav --model runs/mine/model

The checkpoint is a folder, file, hub id or size that `jaxaudio convert` reads. The list is one of data/manifests.py.
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import whisper_report
from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.convert.export import export_checkpoint, load, to_tree
from jaxaudio.convert.whisper import ConvertError, load_whisper, save_whisper
from jaxaudio.data.audio import AudioError
from jaxaudio.data.manifests import ManifestError, read_manifest
from jaxaudio.data.whisper_batches import (
    WhisperData,
    evaluation_batches,
    manifest_windows,
    subsample_speechless,
    whisper_batches,
)
from jaxaudio.models.whisper import FRAME_RATE, Whisper
from jaxaudio.nn.adapters import LoraConfig, init_lora, merge_lora
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.ops.mel import whisper_log_mel
from jaxaudio.ops.spec_augment import SpecAugmentConfig, spec_augment
from jaxaudio.report.card import Card
from jaxaudio.train.checkpoint import Checkpointer, CheckpointError
from jaxaudio.train.loop import MetricsWriter, train_loop
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxaudio.train.state import init_state, num_parameters
from jaxaudio.train.step import make_eval_step, make_train_step, mean_metrics


@dataclasses.dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
      row: "full" or "lora".
      checkpoint: what to start from, see `convert.whisper.load_whisper`.
      lora: used by row "lora" alone: the other parameters stay as they are and have no optimizer state.
      data, augment, optimizer: see there; the encoder's table of positions stays as it is.
      dropout_rate, stochastic_depth_rate, remat_policy, dtype: of the model, in training.
      manifest, valid_manifest: lists of recordings to train on and to evaluate on; without the latter nothing is.
      batch_size, num_steps, log_every, evaluate_every, checkpoint_every, accumulate_steps: as in whisper_pretrain.
      seed, mesh, rules, cpu_devices, distributed: as there.
    """

    row: Literal["full", "lora"]
    optimizer: OptimizerConfig
    checkpoint: str = "tiny"
    lora: LoraConfig = LoraConfig()
    data: WhisperData = WhisperData(speechless_rate=1.0)
    augment: SpecAugmentConfig = SpecAugmentConfig()
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    remat_policy: str | None = "nothing_saveable"
    dtype: Literal["float32", "bfloat16"] = "float32"
    manifest: str = "train.jsonl"
    valid_manifest: str | None = None
    batch_size: int = 16
    num_steps: int = 4000
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 500
    accumulate_steps: int = 1
    seed: int = 0
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1
    distributed: bool = False

    def __post_init__(self):
        if self.optimizer.num_steps not in (None, self.num_steps):
            raise ValueError(f"num_steps is {self.num_steps}, but optimizer.num_steps {self.optimizer.num_steps}")


PLACEMENT = ("checkpoint", "manifest", "valid_manifest", "mesh", "rules", "cpu_devices", "distributed")


def row(name: Literal["full", "lora"], learning_rate: float, weight_decay: float) -> Config:
    """A row: warm-up and linear decay to zero, as in the paper's training."""
    optimizer = OptimizerConfig(
        name="adamw",
        learning_rate=learning_rate,
        schedule="linear",
        warmup_steps=200,
        num_steps=4000,
        b2=0.98,
        epsilon=1e-6,
        weight_decay=weight_decay,
        clip_norm=1.0,
    )
    return Config(row=name, optimizer=optimizer)


ROWS = {"full": row("full", 1e-5, 0.1), "lora": row("lora", 1e-3, 0.01)}
CARDS = tuple(
    Card(
        system=f"Whisper fine-tuned, {name}",
        paper="Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356; Hu et al. 2021, LoRA; no row",
        metric="loss on recordings of the user's own, nats per token",
        reported=None,
        reached=None,
        status="not trained here",
        steps=0,
        hardware="",
        command="python -m experiments.whisper_finetune --workdir runs/finetuned --set checkpoint=SIZE manifest=LIST "
        f"row={name}",
        deviations=("The paper fine-tunes only to remove speakers' names, and does not say how.",),
    )
    for name in ROWS
)


def main(config: Config, workdir: pathlib.Path) -> None:
    """Trains, evaluates, writes the model, merged, and a page."""
    config_lib.claim_workdir(config, workdir, may_change=PLACEMENT)
    mesh, rules = sharding.make_mesh(config.mesh), sharding.TABLES[config.rules]
    init_key, train_key = jax.random.split(jax.random.key(config.seed), 2)

    checkpoint = load_whisper(config.checkpoint)
    tokenizer, num_mels = checkpoint.tokenizer, checkpoint.config.num_mels
    window = {
        "window_s": checkpoint.config.num_frames / FRAME_RATE,
        "text_length": checkpoint.config.text_length,
    }
    shard, num_shards = sharding.process_shard(mesh, rules)
    if config.batch_size % num_shards:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of the {num_shards} processes that read data"
        )
    rows = window | {
        "process_index": shard,
        "process_count": num_shards,
        "batch_size": config.batch_size // num_shards,
    }
    windows = manifest_windows(read_manifest(config.manifest), tokenizer, window["window_s"])
    kept = subsample_speechless(windows, config.data.speechless_rate, config.seed)
    held_out = []
    if config.valid_manifest is not None:
        held_out = manifest_windows(read_manifest(config.valid_manifest), tokenizer, window["window_s"])
    batches = whisper_batches(kept, tokenizer, config.data, seed=config.seed, **rows)

    names = ("dropout_rate", "stochastic_depth_rate", "remat_policy", "dtype")
    model = Whisper(dataclasses.replace(checkpoint.config, **{name: getattr(config, name) for name in names}))
    by_lora = config.row == "lora"

    def model_params(params):
        """The model's parameters from the state's; by LoRA these are the frozen "base" and the factors beside it."""
        if not by_lora:
            return params
        return merge_lora(jax.lax.stop_gradient(params["base"]), params["lora"], config.lora)

    def loss_fn(params, batch, key):
        deterministic = key is None
        mel, rngs = whisper_log_mel(batch["waveform"], num_mels), None
        if not deterministic:
            augment_key, dropout_key = jax.random.split(key)
            mel, rngs = spec_augment(augment_key, mel, config.augment), {"dropout": dropout_key}
        variables = {"params": model_params(params)}
        logits = model.apply(variables, mel, batch["inputs"], deterministic=deterministic, rngs=rngs)
        nats, weight = cross_entropy(logits, batch["targets"], batch["mask"])
        return nats, {"weight": weight}

    def init_params(key):
        base_key, lora_key = jax.random.split(key)
        mel = jnp.zeros((1, checkpoint.config.num_frames, num_mels))
        base = model.init(base_key, mel, jnp.zeros((1, 1), jnp.int32))["params"]
        return {"base": base, "lora": init_lora(lora_key, base, config.lora)} if by_lora else base

    frozen = (*config.optimizer.frozen, "^base/" if by_lora else "^encoder/position_embedding$")
    optimizer = make_optimizer(dataclasses.replace(config.optimizer, frozen=frozen))
    state, shardings = init_state(init_params, optimizer, init_key, mesh, rules)
    loaded = {**state.params, "base": checkpoint.params} if by_lora else checkpoint.params
    state = state.replace(params=jax.device_put(loaded, shardings.params))
    batch_sharding = sharding.batch_sharding(mesh, rules)
    train_step = make_train_step(
        loss_fn,
        optimizer,
        shardings=shardings,
        batch_sharding=batch_sharding,
        accumulate_steps=config.accumulate_steps,
        schedule=make_schedule(config.optimizer),
    )
    eval_step = make_eval_step(loss_fn, shardings=shardings, batch_sharding=batch_sharding)
    put = functools.partial(sharding.shard_batch, mesh=mesh, rules=rules)

    def evaluate(state):
        batches = evaluation_batches(held_out, tokenizer, **rows)
        return mean_metrics(eval_step(state.eval_params, put(batch)) for batch in batches)

    is_first = jax.process_index() == 0
    if is_first:
        trained = num_parameters(state.params["lora"] if by_lora else state.params)
        print(f"{config.row}: {trained:,} of {num_parameters(state.params):,} parameters on {mesh.size} devices")
        print(f"{len(kept)} windows, {len(windows) - len(kept)} without speech left out; {len(held_out)} held out")
    checkpoints = Checkpointer(workdir / "checkpoints", config=config_lib.to_dict(config))
    with sharding.use(mesh, rules), checkpoints, MetricsWriter(workdir, checkpoints.latest_step or 0) as writer:
        if checkpoints.latest_step == config.num_steps and (workdir / "report.html").exists():
            print(f"complete: open {workdir / 'report.html'}; another --workdir starts a new run")
            return
        before = evaluate(state)["loss"] if held_out else None
        state = train_loop(
            state,
            train_step,
            batches,
            train_key,
            num_steps=config.num_steps,
            workdir=workdir,
            checkpointer=checkpoints,
            writer=writer,
            put=put,
            evaluate=evaluate if held_out else None,
            log_every=config.log_every,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
        )
        best = checkpoints.best_step or config.num_steps
        after = evaluate(checkpoints.restore(state, step=best))["loss"] if held_out else None
    if not is_first:
        return
    parameters = workdir / "parameters.safetensors"
    export_checkpoint(workdir / "checkpoints" / str(best), parameters)
    params = jax.jit(model_params)(to_tree(load(parameters)))
    save_whisper(workdir / "model", checkpoint.config, params, tokenizer, overwrite=True)
    loss = f"{before:.4f} to {after:.4f} nats per token on the recordings held out" if held_out else "none held out"
    page = whisper_report.write_page(
        workdir,
        headline=f"{config.checkpoint}, {config.row} fine-tuning, step {best}: {loss}.",
        about=f"{len(kept)} windows of {config.manifest} trained the model in folder model.",
        card=dataclasses.replace(
            next(card for card in CARDS if card.command.endswith(f"row={config.row}")),
            reached=after,
            status="trained by this run",
            steps=best,
            hardware=f"{mesh.size} x {jax.devices()[0].device_kind}",
        ),
        config=config_lib.to_json(config),
    )
    print(f"{loss}\nwrote {workdir / 'model'} and {page}: open it in a browser")


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, ROWS)
    raise_malloc_thresholds()
    sharding.split_cpu(config.cpu_devices)
    if config.distributed:
        jax.distributed.initialize()
    errors = (config_lib.ConfigError, sharding.ShardingError, ConvertError, ManifestError, AudioError, CheckpointError)
    try:
        main(config, workdir)
    except errors as error:
        sys.exit(f"{type(error).__name__}: {error}")
