r"""DAC at 44.1 kHz as in its paper and published config: 0.9 to 7.75 kbps in one model, codebooks with gradients.

Paper: Kumar et al. 2023, DAC, https://arxiv.org/abs/2306.06546, sections 3 and 4; table 3
Run:   python -m experiments.dac_44khz --workdir runs/dac --set data_dir=FOLDER
CPU:   python -m experiments.dac_44khz --workdir runs/small --set row=small data_dir=FOLDER
Pod:   python -m experiments.dac_44khz --workdir /mnt/shared/dac --set data_dir=FOLDER \
       cache_dir=/mnt/shared/cache mesh=data:8 distributed=true     (the same command on every host)
"""

import dataclasses
import functools
import pathlib
import sys
import time
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import codec_report
from experiments.codec_training import (
    EvaluationConfig,
    count_codes,
    describe,
    load_splits,
    make_batches,
    make_evaluate,
    train,
)
from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.data.audio import AudioError
from jaxaudio.data.audio_crops import DAC_CROPS, CropConfig, SourceConfig, SplitConfig
from jaxaudio.models.dac import DAC, PRESETS, DACConfig
from jaxaudio.nn import discriminator_config
from jaxaudio.nn.discriminator_config import DiscriminatorConfig, MultiBandConfig, PeriodConfig
from jaxaudio.nn.discriminators import Discriminators
from jaxaudio.ops.adversarial_losses import (
    feature_loss,
    least_squares_discriminator_loss,
    least_squares_generator_loss,
)
from jaxaudio.ops.spectral_losses import dac_mel_loss
from jaxaudio.report.card import Card
from jaxaudio.train.adversarial import AdversarialLosses, Generated, init_adversarial_state, make_adversarial_step
from jaxaudio.train.checkpoint import CheckpointError
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule


@dataclasses.dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
      row: name of the row that this config started from.
      model, discriminator, crop, evaluation: see there.
      dropout_rate: share of each batch whose rows use a random number of levels; the others use all (section 3.3).
      spectral_weight, feature_weight, adversarial_weight, commitment_weight, codebook_weight: factors of the losses.
      spectral_windows, spectral_mels: of the mel spectrograms.
      optimizer, disc_optimizer: of the codec and of the discriminators, each with its clipping.
      data_dir: folder, zip or list of recordings.
      cache_dir: keeps decoded recordings in one file that is mapped; None keeps them in memory.
      split, sources: which recordings are held out, and how the others share the crops.
      batch_size: crops a step over all devices.
      num_steps, log_every, evaluate_every, checkpoint_every: in steps.
      seed: of everything.
      mesh, rules: devices by axis, and the table that maps logical axes to them.
      cpu_devices: on a CPU, how many devices to simulate.
      distributed: True on every host of a pod.
    """

    row: str
    model: DACConfig
    optimizer: OptimizerConfig
    disc_optimizer: OptimizerConfig
    discriminator: DiscriminatorConfig = discriminator_config.PRESETS["dac"]
    dropout_rate: float = 0.5
    spectral_weight: float = 15.0
    feature_weight: float = 2.0
    adversarial_weight: float = 1.0
    commitment_weight: float = 0.25
    codebook_weight: float = 1.0
    spectral_windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    spectral_mels: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)
    data_dir: str = "data"
    cache_dir: str | None = None
    split: SplitConfig = SplitConfig()
    sources: tuple[SourceConfig, ...] = (SourceConfig("", 1.0),)
    crop: CropConfig = DAC_CROPS
    evaluation: EvaluationConfig = EvaluationConfig(num_codebooks=(2, 3, 6, 9))
    batch_size: int = 72
    num_steps: int = 400_000
    log_every: int = 100
    evaluate_every: int = 10_000
    checkpoint_every: int = 2_000
    seed: int = 0
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1
    distributed: bool = False

    def __post_init__(self):
        for optimizer in (self.optimizer, self.disc_optimizer):
            if optimizer.num_steps not in (None, self.num_steps):
                raise ValueError(f"num_steps is {self.num_steps}, but an optimizer's {optimizer.num_steps}")
        if not 0 <= self.dropout_rate <= 1:
            raise ValueError(f"dropout_rate={self.dropout_rate}; expected a share from 0 to 1")


PLACEMENT = ("data_dir", "cache_dir", "mesh", "rules", "cpu_devices", "distributed")


def adamw(num_steps: int, clip_norm: float) -> OptimizerConfig:
    """The published config's: the rate falls by the factor 0.999996 with every step."""
    return OptimizerConfig(
        name="adamw",
        learning_rate=1e-4,
        schedule="exponential",
        num_steps=num_steps,
        final_fraction=0.999996**num_steps,
        b1=0.8,
        b2=0.99,
        weight_decay=0.01,
        clip_norm=clip_norm,
    )


PAPER = PRESETS["dac_44khz"]
PAPER = dataclasses.replace(PAPER, seanet=dataclasses.replace(PAPER.seanet, weight_norm=True))
SMALL = dataclasses.replace(
    PAPER,
    seanet=dataclasses.replace(
        PAPER.seanet, num_filters=8, decoder_filters=8, embed_dim=64, dilations=(1, 3), compress=2
    ),
    rvq=dataclasses.replace(PAPER.rvq, codebook_size=256, embed_dim=64),
)
ROWS = {
    config.row: config
    for config in (
        Config("paper", PAPER, adamw(400_000, clip_norm=1000.0), adamw(400_000, clip_norm=10.0)),
        Config(
            "small",
            SMALL,
            dataclasses.replace(adamw(20_000, clip_norm=1000.0), learning_rate=5e-4),
            dataclasses.replace(adamw(20_000, clip_norm=10.0), learning_rate=5e-4),
            discriminator=DiscriminatorConfig(
                periods=PeriodConfig(periods=(2, 5), features=(4, 8, 16, 16)),
                multi_band=MultiBandConfig(win_lengths=(1024,), features=4, num_strided=2),
                normalize=True,
            ),
            batch_size=8,
            num_steps=20_000,
            log_every=20,
            evaluate_every=1000,
            checkpoint_every=500,
            cpu_devices=2,
        ),
    )
}

DEVIATIONS = (
    "Least squares and sums of feature maps as in the published code; the paper says hinge.",
    "Levels are measured by RMS, not by LUFS; sampling is not balanced by bandwidth and domain.",
)


def card(row: str, metric: str, reported: float | None, *deviations: str) -> Card:
    """The card of a row that nobody trained here."""
    return Card(
        system=f"DAC 44.1 kHz, {row}",
        paper="Kumar et al. 2023, DAC, https://arxiv.org/abs/2306.06546, table 3",
        metric=metric,
        reported=reported,
        reached=None,
        status="not trained",
        steps=0,
        hardware="",
        command=f"python -m experiments.dac_44khz --workdir runs/{row} --set row={row} data_dir=FOLDER",
        deviations=(*DEVIATIONS, *deviations),
    )


CARDS = (
    card("paper", "mel distance at 7.75 kbps", 0.93),
    card("paper", "mel distance at 2.58 kbps", 1.28),
    card("paper", "SI-SDR of centred waveforms at 7.75 kbps, dB", 10.75),
    card("paper", "ViSQOL at 7.75 kbps", 4.18),
    card(
        "small",
        "mel distance at 6.2 kbps on held-out recordings",
        None,
        "Not a row of the paper: 8 filters on both sides, 9 codebooks of 256 codes, narrow discriminators, 20 000 "
        "steps of 8 crops.",
    ),
)


def make_losses(config: Config) -> AdversarialLosses:
    """The sum of section 3.5 with the published weights."""
    spectral = functools.partial(
        dac_mel_loss,
        sample_rate=config.model.sample_rate,
        win_lengths=config.spectral_windows,
        num_mels=config.spectral_mels,
    )
    return AdversarialLosses(
        reconstruction={"spectral": spectral},
        adversarial={
            "adversarial": lambda real, fake: least_squares_generator_loss(fake),
            "feature": functools.partial(feature_loss, form="sum"),
        },
        discriminator=least_squares_discriminator_loss,
        weights={
            "spectral": config.spectral_weight,
            "adversarial": config.adversarial_weight,
            "feature": config.feature_weight,
        },
        penalty_weights={"commitment": config.commitment_weight, "codebook": config.codebook_weight},
        rescale=False,
    )


def main(config: Config, workdir: pathlib.Path) -> None:
    """Trains, writes the codec, codes the test recordings with it, reports."""
    started = time.perf_counter()
    config_lib.claim_workdir(config, workdir, may_change=PLACEMENT)
    mesh, rules = sharding.make_mesh(config.mesh), sharding.TABLES[config.rules]
    init_key, train_key = jax.random.split(jax.random.key(config.seed), 2)

    sizes = {"sample_rate": config.model.sample_rate, "channels": config.model.channels, "cache_dir": config.cache_dir}
    recordings = load_splits(config.data_dir, config.split, **sizes)
    batches = make_batches(config, recordings["train"], mesh, rules)
    model, discriminators = DAC(config.model), Discriminators(config.discriminator)
    num_codebooks = config.model.num_codebooks

    def generate(params, batch, key):
        waveform = batch["waveform"]
        drawn = jax.random.randint(key, (len(waveform),), 1, num_codebooks + 1)
        num_dropped = int(config.dropout_rate * len(waveform))  # the first rows, as rows are in random order
        is_dropped = jnp.arange(len(waveform)) < num_dropped
        num_levels = jnp.where(is_dropped, drawn, num_codebooks)
        reconstruction, quantized = model.apply({"params": params}, waveform, num_levels)
        penalties = {"commitment": quantized.commitment, "codebook": quantized.codebook_loss}
        return Generated(waveform, reconstruction, penalties, quantized.codes)

    def discriminate(disc_params, waveform):
        return discriminators.apply({"params": disc_params}, waveform)

    crop = jnp.zeros((1, config.crop.num_samples, config.model.channels))
    losses = make_losses(config)
    optimizer, disc_optimizer = make_optimizer(config.optimizer), make_optimizer(config.disc_optimizer)
    state, shardings = init_adversarial_state(
        lambda key: model.init(key, crop, jnp.ones(1, jnp.int32))["params"],
        lambda key: discriminators.init(key, crop)["params"],
        losses,
        optimizer,
        disc_optimizer,
        init_key,
        mesh,
        rules,
    )
    train_step = make_adversarial_step(
        generate,
        discriminate,
        losses,
        optimizer,
        disc_optimizer,
        shardings=shardings,
        batch_sharding=sharding.batch_sharding(mesh, rules),
        update_codebooks=count_codes(config.model.codebook_size),
        schedule=make_schedule(config.optimizer),
    )
    evaluate = make_evaluate(model, recordings["valid"], config.evaluation, mesh, rules)

    trained = train(config, workdir, state, train_step, batches, train_key, evaluate, mesh, rules)
    if trained is None or jax.process_index() != 0:
        return
    params, best = trained
    hardware = f"{mesh.size} x {jax.devices()[0].device_kind}, {(time.perf_counter() - started) / 60:.1f} minutes"
    codec_report.finish(
        workdir,
        "dac",
        model,
        params,
        recordings["test"],
        config.evaluation,
        card=codec_report.own_card(CARDS, config.row, steps=best, hardware=hardware),
        config_text=config_lib.to_json(config),
        about=describe(recordings),
    )


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, ROWS)
    raise_malloc_thresholds()
    sharding.split_cpu(config.cpu_devices)
    if config.distributed:
        jax.distributed.initialize()
    try:
        main(config, workdir)
    except (config_lib.ConfigError, sharding.ShardingError, AudioError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
