r"""Music Transformer that accompanies melodies: the rows of Table 4, and small ones with and without the melody.

Paper: Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281, section 4.2.2 and Table 4 (validation
       NLL in nats per token, given the melody)
Run:   python -m experiments.music_transformer_accompaniment --workdir runs/accompaniment --set row=relative \
       dataset=maestro data_dir=maestro-v3.0.0-midi.zip
CPU:   python -m experiments.music_transformer_accompaniment --workdir runs/small --set row=small \
       dataset=asap data_dir=FOLDER
Pod:   python -m experiments.music_transformer_accompaniment --workdir /mnt/shared/accompaniment --set row=relative \
       dataset=maestro data_dir=FOLDER mesh=data:16,fsdp:16 rules=FSDP batch_size=256 distributed=true
       (the same command on every host)
Then:  jaxaudio music accompany MELODY.mid -o OUT.mid --model runs/accompaniment/model
"""

import dataclasses
import pathlib
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments import accompaniment_report, music_training
from experiments import music_transformer_piano as piano
from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.data.event_dataset import EventDatasetError
from jaxaudio.data.events import MAGENTA
from jaxaudio.data.melody import MELODY
from jaxaudio.data.melody_segments import MelodyDataset, SegmentConfig, evaluation_segment_batches, segment_batches
from jaxaudio.data.performances import PerformanceError
from jaxaudio.models.music_transformer import AccompanimentConfig, AccompanimentTransformer, MusicTransformerConfig
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.report.card import Card
from jaxaudio.train.checkpoint import CheckpointError
from jaxaudio.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """One run; fields that are not explained are those of experiments/music_transformer_piano.py.

    Attributes:
      segment: what a row is, and whether it has its melody.
      max_evaluation_segments: of validation and of test, at even distances; None takes all.
      sample_s: seconds of held-out melodies that the finished run accompanies.
      temperature: of the music that it writes.
    """

    row: str
    model: AccompanimentConfig
    optimizer: OptimizerConfig
    segment: SegmentConfig = SegmentConfig()
    dataset: Literal["asap", "maestro", "folder"] = "asap"
    data_dir: str | None = None
    cache_dir: str = "~/.cache/jaxaudio"
    num_workers: int | None = None
    batch_size: int = 16
    transpose: tuple[int, int] = (-3, 3)
    max_evaluation_segments: int | None = None
    num_steps: int = 100_000
    log_every: int = 20
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    accumulate_steps: int = 1
    ema_decay: float | None = None
    seed: int = 0
    prng: Literal["threefry2x32", "rbg"] = "threefry2x32"
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1
    distributed: bool = False
    sample_s: float = 20.0
    temperature: float = 1.0

    def __post_init__(self):
        if not 0.01 <= self.sample_s <= self.segment.max_s:
            raise ValueError(f"sample_s must be in 0.01..{self.segment.max_s} (segment.max_s), got {self.sample_s}")
        music_training.check_optimizer(self, self.model.decoder.transformer.embed_dim)


def accompaniment(decoder: TransformerConfig, num_encoder_layers: int) -> AccompanimentConfig:
    """The model with this decoder, and an encoder of its sizes without its positions."""
    encoder = dataclasses.replace(decoder, attention="full", positions="none", num_layers=num_encoder_layers)
    decoder = dataclasses.replace(decoder, cross_attention=True)
    return AccompanimentConfig(MELODY.size, encoder, MusicTransformerConfig(MAGENTA.size, decoder))


def paper_row(name: str, decoder: TransformerConfig) -> Config:
    """A row of Table 4, in the sizes of Table 3, with tensor2tensor's training defaults."""
    optimizer = music_training.noam(decoder.embed_dim)
    return Config(row=name, model=accompaniment(decoder, decoder.num_layers), optimizer=optimizer)


def small_row(name: str, *, has_melody: bool) -> Config:
    """A row for two cores; both have one budget."""
    return Config(
        row=name,
        model=accompaniment(piano.SMALL["small_relative_global"], num_encoder_layers=2),
        optimizer=piano.ROWS["small_relative_global"].optimizer,
        segment=SegmentConfig(length=1024, has_melody=has_melody),
        batch_size=2,
        max_evaluation_segments=128,
        num_steps=1800,
        evaluate_every=450,
        checkpoint_every=450,
        ema_decay=0.99,
        cpu_devices=2,
    )


ROWS = {
    config.row: config
    for config in (
        paper_row("baseline", piano.BASELINE),
        paper_row("relative", piano.RELATIVE_GLOBAL),
        small_row("small", has_melody=True),
        small_row("small_without_melody", has_melody=False),
    )
}


def card(row: str, reported: float | None = None, **reached: Any) -> Card:
    """The card of a row; `reached` holds what a training measured: reached, status, steps, hardware."""
    if row.startswith("small"):
        metric, dataset = "ASAP validation NLL given the melody, nats per token", "asap"
        deviations = (
            "Not a row of the paper: 2 layers for the melody, 3 with relative attention for the performance, 192 "
            "hidden, no dropout, AdamW with a cosine schedule, the average of parameters evaluated.",
            "ASAP, split by composition; 128 segments of 15 s at even distances are evaluated.",
            *(("The melody is one step in which nothing happens.",) if row == "small_without_melody" else ()),
        )
    else:
        metric, dataset = "piano validation NLL given the melody, nats per token", "maestro"
        deviations = (
            "MAESTRO, split as released, since the paper's six years of Piano-e-Competition are not published as such.",
            "Sizes of Table 3, segments of 5 to 30 s, evaluated on 15 s, batches of 16; the paper does not say.",
        )
    untrained = {"reached": None, "status": "not trained", "steps": 0, "hardware": ""}
    return Card(
        system=f"Music Transformer, accompaniment, {row}",
        paper="Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281, Table 4",
        metric=metric,
        reported=reported,
        command=f"python -m experiments.music_transformer_accompaniment --workdir runs/{row} --set dataset={dataset} "
        f"data_dir=FOLDER row={row}",
        deviations=deviations,
        **(untrained | reached),
    )


CARDS = (card("baseline", 2.066), card("relative", 1.786), card("small"), card("small_without_melody"))


def main(config: Config, workdir: pathlib.Path) -> None:
    """Trains, evaluates on both held-out splits, writes the model's folder, accompanies and reports."""
    config_lib.claim_workdir(config, workdir, may_change=piano.PLACEMENT)
    mesh, rules = sharding.make_mesh(config.mesh), sharding.TABLES[config.rules]
    run_key = jax.random.key(config.seed, impl=config.prng)
    init_key, dropout_key, sample_key = jax.random.split(run_key, 3)

    dataset = MelodyDataset(piano.write_tokens(config))
    rows = music_training.rows_of_process(config, mesh, rules)
    batches = segment_batches(dataset, config.segment, seed=config.seed, transpose=config.transpose, **rows)

    def evaluation(split):
        return evaluation_segment_batches(
            dataset, split, config.segment, max_segments=config.max_evaluation_segments, **rows
        )

    for split in ("valid", "test"):
        evaluation(split)  # one without performances is an error now, not after the training

    model = AccompanimentTransformer(config.model)

    def loss_fn(params, batch, key):
        deterministic = key is None
        rngs = None if deterministic else {"dropout": key}
        logits = model.apply(
            {"params": params}, batch["melody"], batch["inputs"], deterministic=deterministic, rngs=rngs
        )
        nats, weight = cross_entropy(logits, batch["targets"], batch["mask"])
        return nats, {"weight": weight}

    def init_params(key):
        lengths = (config.segment.melody_length, config.segment.length)
        return model.init(key, *(jnp.ones((1, length), jnp.int32) for length in lengths))["params"]

    result = music_training.train(
        config,
        workdir,
        init_params,
        loss_fn,
        batches,
        evaluation,
        init_key=init_key,
        dropout_key=dropout_key,
        mesh=mesh,
        rules=rules,
    )
    if result is None or jax.process_index():
        return
    accompaniment_report.finish(
        workdir,
        model,
        sample_key,
        config=config,
        dataset=dataset,
        result=result,
        card=music_training.trained_card(config, ROWS, CARDS, result, mesh),
        cards=CARDS,
    )


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, ROWS)
    raise_malloc_thresholds()
    sharding.split_cpu(config.cpu_devices)
    if config.distributed:
        jax.distributed.initialize()
    try:
        main(config, workdir)
    except (
        config_lib.ConfigError,
        sharding.ShardingError,
        PerformanceError,
        EventDatasetError,
        CheckpointError,
    ) as error:
        sys.exit(f"{type(error).__name__}: {error}")
