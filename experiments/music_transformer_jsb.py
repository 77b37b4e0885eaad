r"""Music Transformer on the JSB chorales: every row of Table 2, and a small one that a CPU trains.

Paper: Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281, Table 2 (validation
       NLL in nats per token)
Run:   python -m experiments.music_transformer_jsb --workdir runs/jsb --set row=relative data_dir=FOLDER
CPU:   python -m experiments.music_transformer_jsb --workdir runs/jsb_small --set row=small data_dir=FOLDER
Pod:   python -m experiments.music_transformer_jsb --workdir /mnt/shared/jsb --set row=relative data_dir=FOLDER \
       mesh=data:16,fsdp:16 rules=FSDP batch_size=256 distributed=true     (the same command on every host)
"""

import dataclasses
import pathlib
import sys
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import chorale_report, music_training
from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.data.chorales import VOCAB_SIZE, encode_grid
from jaxaudio.data.jsb_chorales import JsbError, load_jsb
from jaxaudio.data.pipelines import chorale_batches, evaluation_batches
from jaxaudio.models.music_transformer import MusicTransformer, MusicTransformerConfig
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.report.card import Card
from jaxaudio.train.checkpoint import CheckpointError
from jaxaudio.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
      row: name of the row that this config started from.
      model, optimizer: see there.
      data_dir: folder with Jsb16thSeparated.npz or .json; None downloads it.
      cache_dir: where the prepared data set is kept.
      length, batch_size: tokens a row, rows a step over all devices.
      transpose: random transposition of training chorales, (low, high) semitones; the paper names none.
      num_steps, log_every, evaluate_every, checkpoint_every: in steps.
      accumulate_steps: microbatches a step.
      ema_decay: of the parameters that are evaluated; None evaluates the raw ones.
      seed, prng: of all keys; prng is the generator behind them.
      mesh, rules: devices by axis, and the table that maps logical axes to them.
      cpu_devices: on a CPU, how many devices to simulate: two share a batch over two cores.
      distributed: True on every host of a pod.
      prime_tokens, sample_tokens, temperature: of the music that the finished run writes.
    """

    row: str
    model: MusicTransformerConfig
    optimizer: OptimizerConfig
    data_dir: str | None = None
    cache_dir: str = "~/.cache/jaxaudio"
    length: int = 1024
    batch_size: int = 16
    transpose: tuple[int, int] | None = None
    num_steps: int = 50_000
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 500
    accumulate_steps: int = 1
    ema_decay: float | None = None
    seed: int = 0
    prng: Literal["threefry2x32", "rbg"] = "threefry2x32"
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1
    distributed: bool = False
    prime_tokens: int = 128
    sample_tokens: int = 512
    temperature: float = 0.95

    def __post_init__(self):
        chorale_report.check_samples(self)
        music_training.check_optimizer(self, self.model.transformer.embed_dim)


BASELINE = TransformerConfig(num_layers=5, embed_dim=256, num_heads=8, mlp_dim=1024, **music_training.DROPOUT)
RELATIVE = TransformerConfig(
    num_layers=5,
    embed_dim=512,
    num_heads=8,
    mlp_dim=512,
    positions="relative",
    max_distance=256,
    **music_training.DROPOUT,
)
SMALL = dataclasses.replace(RELATIVE, num_layers=3, embed_dim=192, num_heads=4, mlp_dim=768)


def paper_row(name: str, transformer: TransformerConfig, **model) -> Config:
    """A row of Table 2 with tensor2tensor's training defaults."""
    optimizer = music_training.noam(transformer.embed_dim)
    return Config(row=name, model=MusicTransformerConfig(VOCAB_SIZE, transformer, **model), optimizer=optimizer)


CPSI = {"position_encoding": "concatenated", "label_period": 4}
ROWS = {
    config.row: config
    for config in (
        paper_row("baseline", BASELINE),
        paper_row("cps", BASELINE, position_encoding="concatenated"),
        paper_row("cpsi", BASELINE, **CPSI),
        paper_row("relative", RELATIVE),
        paper_row("relative_cpsi", RELATIVE, **CPSI),
        paper_row("relative_cpsi_pitch_time", dataclasses.replace(RELATIVE, pitch_time=True), **CPSI),
        Config(
            row="small",
            model=MusicTransformerConfig(VOCAB_SIZE, SMALL, position_encoding="concatenated", label_period=16),
            optimizer=OptimizerConfig(
                name="adamw",
                learning_rate=2e-3,
                schedule="cosine",
                warmup_steps=100,
                num_steps=6000,
                weight_decay=0.01,
                clip_norm=1.0,
            ),
            length=512,
            batch_size=2,
            transpose=(-5, 6),
            num_steps=6000,
            evaluate_every=500,
            checkpoint_every=250,
            ema_decay=0.99,
            cpu_devices=2,
        ),
    )
}


def card(row: str, reported: float | None, **reached) -> Card:
    """The card of a row; `reached` holds what a training measured: reached, status, steps, hardware."""
    deviations = (
        "Crops and evaluation windows of 1024 tokens, the latter without left context; the paper does not say.",
        "Batches of 16 rows; the paper does not say.",
        "Distances beyond the 256 of the relative table get a zero logit.",
    )
    if row == "small":
        deviations = (
            "Not a row of the paper: 3 layers, 192 hidden, 4 heads, 768 in the MLP, 256 relative distances.",
            "Sinusoids are concatenated, with labels of the voice and of the 16th within the beat.",
            "Windows of 512 tokens, the evaluated ones without left context.",
            "Random transposition by -5 to 6 semitones; AdamW with a cosine schedule; the average of parameters is "
            "evaluated.",
        )
    untrained = {"reached": None, "status": "not trained", "steps": 0, "hardware": ""}
    return Card(
        system=f"Music Transformer, {row}",
        paper="Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281, Table 2",
        metric="JSB validation NLL, nats per token",
        reported=reported,
        command=f"python -m experiments.music_transformer_jsb --workdir runs/{row} --set data_dir=FOLDER row={row}",
        deviations=deviations,
        **(untrained | reached),
    )


RAN_20_STEPS = {
    "status": "not trained: ran 20 steps with batch_size=2",
    "steps": 20,
    "hardware": "2 cores of an AMD EPYC",
}
CARDS = (
    card("baseline", 0.417, **RAN_20_STEPS),
    card("cps", 0.398, **RAN_20_STEPS),
    card("cpsi", 0.370, **RAN_20_STEPS),
    card("relative", 0.357, **RAN_20_STEPS),
    card("relative_cpsi", 0.347, **RAN_20_STEPS),
    card("relative_cpsi_pitch_time", 0.335, **RAN_20_STEPS),
    card("small", None, reached=0.407, status="trained", steps=6000, hardware="2 cores of an AMD EPYC, 19 minutes"),
)


def main(config: Config, workdir: pathlib.Path) -> None:
    """Trains, evaluates on both held-out splits, samples, exports and reports."""
    config_lib.claim_workdir(config, workdir, may_change=music_training.PLACEMENT)
    mesh, rules = sharding.make_mesh(config.mesh), sharding.TABLES[config.rules]
    run_key = jax.random.key(config.seed, impl=config.prng)
    init_key, dropout_key, sample_key = jax.random.split(run_key, 3)

    grids = load_jsb(config.data_dir, pathlib.Path(config.cache_dir).expanduser())
    tokens = {split: [encode_grid(grid) for grid in pieces] for split, pieces in grids.items()}
    rows = music_training.rows_of_process(config, mesh, rules)
    batches = chorale_batches(
        tokens["train"], length=config.length, seed=config.seed, transpose=config.transpose, **rows
    )

    model = MusicTransformer(config.model)

    def loss_fn(params, batch, key):
        deterministic = key is None
        rngs = None if deterministic else {"dropout": key}
        logits, _ = model.apply({"params": params}, batch["inputs"], deterministic=deterministic, rngs=rngs)
        nats, weight = cross_entropy(logits, batch["targets"], batch["mask"])
        return nats, {"weight": weight}

    def init_params(key):
        return model.init(key, jnp.zeros((1, config.length), jnp.int32))["params"]

    result = music_training.train(
        config,
        workdir,
        init_params,
        loss_fn,
        batches,
        lambda split: evaluation_batches(tokens[split], length=config.length, **rows),
        init_key=init_key,
        dropout_key=dropout_key,
        mesh=mesh,
        rules=rules,
    )
    if result is None or jax.process_index():
        return
    chorale_report.finish(
        workdir,
        result.checkpoint,
        model,
        sample_key,
        config=config,
        ema=config.ema_decay is not None,
        tokens=tokens,
        split="valid",
        primes={"valid_1": tokens["valid"][0], "valid_2": tokens["valid"][1]},
        nats=result.nats["valid"],
        about=f"JSB chorales, canonical split. Validation {result.nats['valid']:.4f}, test {result.nats['test']:.4f} "
        f"nats per token over windows of {config.length} tokens without left context.",
        card=music_training.trained_card(config, ROWS, CARDS, result, mesh),
    )


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, ROWS)
    raise_malloc_thresholds()
    sharding.split_cpu(config.cpu_devices)
    if config.distributed:
        jax.distributed.initialize()
    try:
        main(config, workdir)
    except (config_lib.ConfigError, sharding.ShardingError, JsbError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
