r"""Whisper from scratch, from a list of recordings: the paper's settings for every size.

Paper: Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356, sections 2.2 to 2.4, tables 17 to 19
Run:   python -m experiments.whisper_pretrain --workdir runs/tiny --set row=tiny manifest=train.jsonl tokenizer=FOLDER
Pod:   python -m experiments.whisper_pretrain --workdir /mnt/shared/large --set row=large manifest=train.jsonl \
       tokenizer=FOLDER mesh=data:16,fsdp:16 rules=FSDP distributed=true     (the same command on every host)

The list is one of data/manifests.py. Recordings with timed segments may be of any length, those with a text alone at
most 30 s. The tokenizer is a folder or file of a published multilingual vocabulary, such as multilingual.tiktoken.
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
from jaxaudio.convert.whisper import save_whisper
from jaxaudio.data.audio import AudioError
from jaxaudio.data.manifests import ManifestError, read_manifest
from jaxaudio.data.whisper_batches import (
    WhisperData,
    evaluation_batches,
    manifest_windows,
    subsample_speechless,
    whisper_batches,
)
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.models.whisper import FRAME_RATE, SIZES, Whisper, WhisperConfig
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.ops.mel import whisper_log_mel
from jaxaudio.ops.spec_augment import SpecAugmentConfig, spec_augment
from jaxaudio.report.card import Card
from jaxaudio.train.checkpoint import Checkpointer, CheckpointError
from jaxaudio.train.loop import MetricsWriter, train_loop
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxaudio.train.state import init_state, num_parameters
from jaxaudio.train.step import make_eval_step, make_train_step, mean_metrics

NO_AUGMENTATION = SpecAugmentConfig(time_warp=0, num_frequency_masks=0, num_time_masks=0)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
      row: name of the row that this config started from.
      model, data, augment, optimizer: see there; the encoder's table of positions stays as it is.
      manifest: the list of recordings to train on.
      valid_manifest: of those to evaluate on; None evaluates nothing.
      tokenizer: folder or file of the vocabulary.
      batch_size: windows a step over all devices.
      num_steps, log_every, evaluate_every, checkpoint_every: in steps.
      accumulate_steps: microbatches a step.
      seed, prng: of all keys; prng is the generator behind them.
      mesh, rules: devices by axis, and the table that maps logical axes to them.
      cpu_devices: on a CPU, how many devices to simulate.
      distributed: True on every host of a pod.
    """

    row: str
    model: WhisperConfig
    optimizer: OptimizerConfig
    data: WhisperData = WhisperData()
    augment: SpecAugmentConfig = NO_AUGMENTATION
    manifest: str = "train.jsonl"
    valid_manifest: str | None = None
    tokenizer: str = "tokenizer"
    batch_size: int = 256
    num_steps: int = 2**20
    log_every: int = 100
    evaluate_every: int = 10_000
    checkpoint_every: int = 2_000
    accumulate_steps: int = 1
    seed: int = 0
    prng: Literal["threefry2x32", "rbg"] = "rbg"
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1
    distributed: bool = False

    def __post_init__(self):
        if self.optimizer.num_steps not in (None, self.num_steps):
            raise ValueError(f"num_steps is {self.num_steps}, but optimizer.num_steps {self.optimizer.num_steps}")


PLACEMENT = ("manifest", "valid_manifest", "tokenizer", "mesh", "rules", "cpu_devices", "distributed")


def paper_row(name: str, size: str, learning_rate: float, num_steps: int = 2**20, **fields) -> Config:
    """A row of tables 17 to 19; activations are recomputed as in section 2.4."""
    optimizer = OptimizerConfig(
        name="adamw",
        learning_rate=learning_rate,
        schedule="linear",
        warmup_steps=2048,
        num_steps=num_steps,
        b2=0.98,
        epsilon=1e-6,
        weight_decay=0.1,
        clip_norm=1.0,
        frozen=("encoder/position_embedding",),
    )
    model = dataclasses.replace(SIZES[size], remat_policy="nothing_saveable", dtype="bfloat16")
    model = dataclasses.replace(model, **fields.pop("model", {}))
    return Config(row=name, model=model, optimizer=optimizer, num_steps=num_steps, **fields)


ROWS = {
    config.row: config
    for config in (
        paper_row("tiny", "tiny", 1.5e-3),
        paper_row("base", "base", 1e-3),
        paper_row("small", "small", 5e-4),
        paper_row("medium", "medium", 2.5e-4),
        paper_row("large", "large-v1", 1.75e-4),
        paper_row(
            "large-v2",
            "large-v2",
            2e-4,
            655_360,
            batch_size=1024,
            model={"stochastic_depth_rate": 0.1},
            data=WhisperData(bpe_dropout=0.1),
            augment=SpecAugmentConfig(),
        ),
    )
}

DEVIATIONS = (
    "Whoever trains it brings the recordings: the paper's 680,000 hours are not public.",
    "bfloat16 instead of float16 with dynamic loss scaling.",
    "Half of the windows with known times write them; the paper does not say how many.",
    "The next window begins where a segment is cut; the paper does not say where.",
)
CARDS = tuple(
    Card(
        system=f"Whisper {name} from scratch",
        paper="Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356, tables 8 and 17 to 19",
        metric="WER on LibriSpeech test-clean, greedy, %",
        reported=reported,
        reached=None,
        status="not trained here",
        steps=0,
        hardware="",
        command=f"python -m experiments.whisper_pretrain --workdir runs/{name} --set manifest=LIST tokenizer=FOLDER "
        f"row={name}",
        deviations=DEVIATIONS,
    )
    for name, reported in zip(ROWS, (7.6, 5.0, 3.4, 2.9, 2.7, 2.7), strict=True)
)


def main(config: Config, workdir: pathlib.Path) -> None:
    """Trains, evaluates, writes the model and a page."""
    config_lib.claim_workdir(config, workdir, may_change=PLACEMENT)
    mesh, rules = sharding.make_mesh(config.mesh), sharding.TABLES[config.rules]
    init_key, train_key = jax.random.split(jax.random.key(config.seed, impl=config.prng), 2)

    path = pathlib.Path(config.tokenizer)
    read_tokenizer = WhisperTokenizer.from_folder if path.is_dir() else WhisperTokenizer.from_file
    tokenizer = read_tokenizer(path, vocab_size=config.model.vocab_size)
    window = {"window_s": config.model.num_frames / FRAME_RATE, "text_length": config.model.text_length}
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

    model = Whisper(config.model)

    def loss_fn(params, batch, key):
        deterministic = key is None
        mel, rngs = whisper_log_mel(batch["waveform"], config.model.num_mels), None
        if not deterministic:
            augment_key, dropout_key = jax.random.split(key)
            mel, rngs = spec_augment(augment_key, mel, config.augment), {"dropout": dropout_key}
        logits = model.apply({"params": params}, mel, batch["inputs"], deterministic=deterministic, rngs=rngs)
        nats, weight = cross_entropy(logits, batch["targets"], batch["mask"])
        return nats, {"weight": weight}

    def init_params(key):
        mel = jnp.zeros((1, config.model.num_frames, config.model.num_mels))
        return model.init(key, mel, jnp.zeros((1, 1), jnp.int32))["params"]

    optimizer, schedule = make_optimizer(config.optimizer), make_schedule(config.optimizer)
    state, shardings = init_state(init_params, optimizer, init_key, mesh, rules)
    batch_sharding = sharding.batch_sharding(mesh, rules)
    train_step = make_train_step(
        loss_fn,
        optimizer,
        shardings=shardings,
        batch_sharding=batch_sharding,
        accumulate_steps=config.accumulate_steps,
        schedule=schedule,
    )
    eval_step = make_eval_step(loss_fn, shardings=shardings, batch_sharding=batch_sharding)
    put = functools.partial(sharding.shard_batch, mesh=mesh, rules=rules)

    def evaluate(state):
        batches = evaluation_batches(held_out, tokenizer, **rows)
        return mean_metrics(eval_step(state.eval_params, put(batch)) for batch in batches)

    is_first = jax.process_index() == 0
    if is_first:
        print(f"{config.row}: {num_parameters(state.params):,} parameters on {mesh.size} devices")
        print(f"{len(kept)} windows, {len(windows) - len(kept)} without speech left out; {len(held_out)} held out")
    checkpoints = Checkpointer(workdir / "checkpoints", config=config_lib.to_dict(config))
    with sharding.use(mesh, rules), checkpoints, MetricsWriter(workdir, checkpoints.latest_step or 0) as writer:
        if checkpoints.latest_step == config.num_steps and (workdir / "report.html").exists():
            print(f"complete: open {workdir / 'report.html'}; another --workdir starts a new run")
            return
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
        last = evaluate(state)["loss"] if held_out else None
    if not is_first:
        return
    parameters = workdir / "parameters.safetensors"
    export_checkpoint(workdir / "checkpoints" / str(config.num_steps), parameters)
    save_whisper(workdir / "model", config.model, to_tree(load(parameters)), tokenizer, overwrite=True)
    loss = "no recordings held out" if last is None else f"{last:.4f} nats per token on the recordings held out"
    changed = config_lib.differences(config_lib.to_dict(ROWS[config.row]), config_lib.to_dict(config))
    changed = ", ".join(name for name in changed if name not in PLACEMENT)
    card = next(card for card in CARDS if card.command.endswith(f"row={config.row}"))
    page = whisper_report.write_page(
        workdir,
        headline=f"Whisper {config.row}, {config.num_steps} steps: {loss}.",
        about=f"{len(kept)} windows of {config.manifest} trained the model in folder model; experiments.whisper_eval "
        "counts its word errors.",
        card=dataclasses.replace(
            card,
            status="trained by this run; its WER is for experiments.whisper_eval to say",
            steps=config.num_steps,
            hardware=f"{mesh.size} x {jax.devices()[0].device_kind}",
            deviations=(*card.deviations, *([f"Fields unlike the row's: {changed}."] if changed else [])),
        ),
        config=config_lib.to_json(config),
    )
    print(f"wrote {workdir / 'model'} and {page}: open it in a browser")


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, ROWS)
    raise_malloc_thresholds()
    sharding.split_cpu(config.cpu_devices)
    if config.distributed:
        jax.distributed.initialize()
    try:
        main(config, workdir)
    except (config_lib.ConfigError, sharding.ShardingError, ManifestError, AudioError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
