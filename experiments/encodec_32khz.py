r"""EnCodec at 32 kHz as audiocraft trains it for MusicGen: music at 2.2 kbps, four codebooks at 50 Hz.

Paper: Copet et al. 2023, MusicGen, https://arxiv.org/abs/2306.05284, section 3.1; the losses are those of audiocraft's
       published configs, which differ from EnCodec's paper
Run:   python -m experiments.encodec_32khz --workdir runs/encodec32 --set data_dir=FOLDER
CPU:   python -m experiments.encodec_32khz --workdir runs/small --set row=small data_dir=FOLDER
Pod:   python -m experiments.encodec_32khz --workdir /mnt/shared/encodec32 --set data_dir=FOLDER \
       cache_dir=/mnt/shared/cache mesh=data:16 distributed=true     (the same command on every host)
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
    average_codebooks,
    describe,
    load_splits,
    make_batches,
    make_evaluate,
    start_codebooks,
    train,
    without_codes,
)
from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.data.audio import AudioError
from jaxaudio.data.audio_crops import CropConfig, SourceConfig, SplitConfig
from jaxaudio.models.encodec import PRESETS, EnCodec, EnCodecConfig
from jaxaudio.nn import discriminator_config
from jaxaudio.nn.discriminator_config import DiscriminatorConfig, MultiScaleSTFTConfig
from jaxaudio.nn.discriminators import Discriminators
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.ops.adversarial_losses import feature_loss, hinge_discriminator_loss, hinge_generator_loss
from jaxaudio.ops.codebook_ema import CodebookConfig
from jaxaudio.ops.spectral_losses import audiocraft_mel_loss, waveform_l1_loss
from jaxaudio.report.card import Card
from jaxaudio.train.adversarial import AdversarialLosses, Generated, init_adversarial_state, make_adversarial_step
from jaxaudio.train.checkpoint import CheckpointError
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule


@dataclasses.dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
      row: name of the row that this config started from.
      model, discriminator, codebooks, crop, evaluation: see there.
      waveform_weight, spectral_weight, adversarial_weight, feature_weight: parts of the pull on the reconstruction,
        which the balancer makes true.
      commitment_weight: factor of the commitment loss.
      spectral_windows, spectral_mels: of the mel spectrograms.
      optimizer: of both sides.
      data_dir: folder, zip or list of recordings.
      cache_dir: keeps decoded recordings in one file that is mapped; None keeps them in memory.
      split, sources: which recordings are held out, and how the others share the crops.
      batch_size: crops a step over all devices.
      num_steps, log_every, evaluate_every, checkpoint_every: in steps.
      ema_decay: of the parameters that are evaluated.
      seed: of everything.
      mesh, rules: devices by axis, and the table that maps logical axes to them.
      cpu_devices: on a CPU, how many devices to simulate.
      distributed: True on every host of a pod.
    """

    row: str
    model: EnCodecConfig
    discriminator: DiscriminatorConfig = discriminator_config.PRESETS["audiocraft"]
    codebooks: CodebookConfig = CodebookConfig(dead_usage=0.1, dead_is_relative=True)
    waveform_weight: float = 0.1
    spectral_weight: float = 2.0
    adversarial_weight: float = 4.0
    feature_weight: float = 4.0
    commitment_weight: float = 1.0
    spectral_windows: tuple[int, ...] = (64, 128, 256, 512, 1024)
    spectral_mels: int = 64
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, b1=0.5, b2=0.9)
    data_dir: str = "data"
    cache_dir: str | None = None
    split: SplitConfig = SplitConfig()
    sources: tuple[SourceConfig, ...] = (SourceConfig("", 1.0),)
    crop: CropConfig = CropConfig(num_samples=32_000)
    evaluation: EvaluationConfig = EvaluationConfig(num_codebooks=(1, 2, 4))
    batch_size: int = 64
    num_steps: int = 400_000
    log_every: int = 100
    evaluate_every: int = 10_000
    checkpoint_every: int = 2_000
    ema_decay: float = 0.99
    seed: int = 0
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1
    distributed: bool = False

    def __post_init__(self):
        if self.optimizer.num_steps not in (None, self.num_steps):
            raise ValueError(f"num_steps is {self.num_steps}, but optimizer.num_steps {self.optimizer.num_steps}")


PLACEMENT = ("data_dir", "cache_dir", "mesh", "rules", "cpu_devices", "distributed")
PAPER = PRESETS["encodec_32khz"]
PAPER = dataclasses.replace(PAPER, seanet=dataclasses.replace(PAPER.seanet, weight_norm=True))
SMALL = dataclasses.replace(
    PAPER,
    seanet=dataclasses.replace(PAPER.seanet, num_filters=8, embed_dim=64, num_lstm_layers=1),
    rvq=RVQConfig(num_codebooks=4, codebook_size=256, codebook_dim=64, embed_dim=64),
    bandwidths=(),
)
ROWS = {
    config.row: config
    for config in (
        Config("paper", PAPER),
        Config(
            "small",
            SMALL,
            discriminator=DiscriminatorConfig(
                multi_scale_stft=MultiScaleSTFTConfig(win_lengths=(1024, 256), features=4)
            ),
            crop=CropConfig(num_samples=12_800),
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
    "The commitment loss has weight 1.",
    "Levels get their k-means one after the other, from the batches of the first steps; codes are dead below a tenth "
    "of the mean usage, where audiocraft's threshold is more than a batch has for each code; they are replaced, where "
    "audiocraft's are not.",
)


def card(row: str, metric: str, *deviations: str) -> Card:
    """The card of a row that nobody trained here."""
    return Card(
        system=f"EnCodec 32 kHz, {row}",
        paper="Copet et al. 2023, MusicGen, https://arxiv.org/abs/2306.05284, section 3.1; no result of the codec",
        metric=metric,
        reported=None,
        reached=None,
        status="not trained",
        steps=0,
        hardware="",
        command=f"python -m experiments.encodec_32khz --workdir runs/{row} --set row={row} data_dir=FOLDER",
        deviations=(*DEVIATIONS, *deviations),
    )


CARDS = (
    card("paper", "mel distance at 2.2 kbps on held-out recordings"),
    card(
        "small",
        "mel distance at 1.6 kbps on held-out recordings",
        "Not a row of the paper: 8 filters, one LSTM layer, 4 codebooks of 256 codes, two narrow discriminators, "
        "20 000 steps of 8 crops.",
    ),
)


def make_losses(config: Config) -> AdversarialLosses:
    """Each by its part of the whole, and the commitment beside the balancer."""
    spectral = functools.partial(
        audiocraft_mel_loss,
        sample_rate=config.model.sample_rate,
        win_lengths=config.spectral_windows,
        num_mels=config.spectral_mels,
    )
    return AdversarialLosses(
        reconstruction={"waveform": waveform_l1_loss, "spectral": spectral},
        adversarial={
            "adversarial": lambda real, fake: hinge_generator_loss(fake, form="linear"),
            "feature": feature_loss,
        },
        discriminator=hinge_discriminator_loss,
        weights={
            "waveform": config.waveform_weight,
            "spectral": config.spectral_weight,
            "adversarial": config.adversarial_weight,
            "feature": config.feature_weight,
        },
        penalty_weights={"commitment": config.commitment_weight},
        rescale=True,
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
    model, discriminators = EnCodec(config.model), Discriminators(config.discriminator)
    num_codebooks = config.model.num_codebooks

    def generate(params, batch, key):
        waveform = batch["waveform"]
        num_levels = jnp.full(len(waveform), jax.random.randint(key, (), 1, num_codebooks + 1))  # one for the batch
        reconstruction, quantized = model.apply({"params": params}, waveform, num_levels)
        used = jnp.arange(num_codebooks)[None] < num_levels[:, None]
        learned = quantized.residuals, quantized.codes, used
        return Generated(waveform, reconstruction, {"commitment": quantized.commitment}, learned)

    def discriminate(disc_params, waveform):
        return discriminators.apply({"params": disc_params}, waveform)

    crop = jnp.zeros((1, config.crop.num_samples, config.model.channels))
    losses = make_losses(config)
    optimizer, schedule = make_optimizer(config.optimizer), make_schedule(config.optimizer)
    state, shardings = init_adversarial_state(
        lambda key: without_codes(model.init(key, crop, jnp.ones(1, jnp.int32))["params"]),
        lambda key: discriminators.init(key, crop)["params"],
        losses,
        optimizer,
        optimizer,
        init_key,
        mesh,
        rules,
        init_codebooks=start_codebooks,
        ema=True,
    )
    train_step = make_adversarial_step(
        generate,
        discriminate,
        losses,
        optimizer,
        optimizer,
        shardings=shardings,
        batch_sharding=sharding.batch_sharding(mesh, rules),
        update_codebooks=average_codebooks(config.codebooks),
        ema_decay=config.ema_decay,
        schedule=schedule,
    )
    evaluate = make_evaluate(model, recordings["valid"], config.evaluation, mesh, rules)

    trained = train(config, workdir, state, train_step, batches, train_key, evaluate, mesh, rules)
    if trained is None or jax.process_index() != 0:
        return
    params, best = trained
    hardware = f"{mesh.size} x {jax.devices()[0].device_kind}, {(time.perf_counter() - started) / 60:.1f} minutes"
    codec_report.finish(
        workdir,
        "encodec",
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
