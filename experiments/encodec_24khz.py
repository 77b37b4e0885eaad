r"""EnCodec at 24 kHz as in its paper: 1.5 to 24 kbps in one model, with the balancer of its losses.

Paper: Défossez et al. 2022, EnCodec, https://arxiv.org/abs/2210.13438, sections 3 and 4; tables 1 and 3
Run:   python -m experiments.encodec_24khz --workdir runs/encodec --set data_dir=FOLDER
CPU:   python -m experiments.encodec_24khz --workdir runs/small --set row=small data_dir=FOLDER
Pod:   python -m experiments.encodec_24khz --workdir /mnt/shared/encodec --set data_dir=FOLDER \
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
from jaxaudio.data.audio_crops import ENCODEC_CROPS, CropConfig, SourceConfig, SplitConfig
from jaxaudio.models.encodec import PRESETS, EnCodec, EnCodecConfig
from jaxaudio.nn import discriminator_config
from jaxaudio.nn.discriminator_config import DiscriminatorConfig, MultiScaleSTFTConfig
from jaxaudio.nn.discriminators import Discriminators
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.ops.adversarial_losses import feature_loss, hinge_discriminator_loss, hinge_generator_loss
from jaxaudio.ops.codebook_ema import CodebookConfig
from jaxaudio.ops.spectral_losses import encodec_mel_loss, waveform_l1_loss
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
      num_levels: one of them is drawn for each batch, all equally likely: the bandwidths of section 3.2. Each has
        discriminators of its own that only its batches meet (section 3.4).
      waveform_weight, spectral_weight, adversarial_weight, feature_weight: lambda_t, lambda_f, lambda_g, lambda_feat:
        parts of the pull on the reconstruction, which the balancer makes true (section 3.4).
      commitment_weight: factor of the commitment loss, lambda_w; the paper has no number.
      spectral_windows, spectral_mels: of the mel spectrograms.
      optimizer: of both sides.
      disc_probability: that the discriminators learn from a step.
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
    model: EnCodecConfig
    discriminator: DiscriminatorConfig = discriminator_config.PRESETS["encodec_24khz"]
    codebooks: CodebookConfig = CodebookConfig()
    num_levels: tuple[int, ...] = (2, 4, 8, 16, 32)
    waveform_weight: float = 0.1
    spectral_weight: float = 1.0
    adversarial_weight: float = 3.0
    feature_weight: float = 3.0
    commitment_weight: float = 1.0
    spectral_windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    spectral_mels: int = 64
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, b1=0.5, b2=0.9)
    disc_probability: float = 2 / 3
    data_dir: str = "data"
    cache_dir: str | None = None
    split: SplitConfig = SplitConfig()
    sources: tuple[SourceConfig, ...] = (SourceConfig("", 1.0),)
    crop: CropConfig = ENCODEC_CROPS
    evaluation: EvaluationConfig = EvaluationConfig(num_codebooks=(2, 4, 8, 16, 32))
    batch_size: int = 64
    num_steps: int = 600_000
    log_every: int = 100
    evaluate_every: int = 10_000
    checkpoint_every: int = 2_000
    seed: int = 0
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1
    distributed: bool = False

    def __post_init__(self):
        if self.optimizer.num_steps not in (None, self.num_steps):
            raise ValueError(f"num_steps is {self.num_steps}, but optimizer.num_steps {self.optimizer.num_steps}")
        if not 1 <= min(self.num_levels) <= max(self.num_levels) <= self.model.num_codebooks:
            raise ValueError(f"num_levels={self.num_levels}; the model has 1 to {self.model.num_codebooks}")


PLACEMENT = ("data_dir", "cache_dir", "mesh", "rules", "cpu_devices", "distributed")
PAPER = PRESETS["encodec_24khz"]
PAPER = dataclasses.replace(PAPER, seanet=dataclasses.replace(PAPER.seanet, weight_norm=True))
SMALL = dataclasses.replace(
    PAPER,
    seanet=dataclasses.replace(PAPER.seanet, num_filters=8, embed_dim=64, num_lstm_layers=1),
    rvq=RVQConfig(num_codebooks=8, codebook_size=256, codebook_dim=64, embed_dim=64),
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
            codebooks=CodebookConfig(dead_usage=0.1, dead_is_relative=True),
            num_levels=(1, 2, 4, 8),
            crop=dataclasses.replace(ENCODEC_CROPS, num_samples=9600),
            evaluation=EvaluationConfig(num_codebooks=(2, 4, 8)),
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
    "The commitment loss has weight 1, where the paper has no number.",
    "Levels get their k-means one after the other, from the batches of the first steps; dead codes get new sums and "
    "usages with their vectors.",
    "No reverberation; mixtures are of any recordings; gains that clip are not drawn, where the paper rejects.",
)


def card(row: str, metric: str, reported: float | None, *deviations: str) -> Card:
    """The card of a row that nobody trained here."""
    return Card(
        system=f"EnCodec 24 kHz, {row}",
        paper="Défossez et al. 2022, EnCodec, https://arxiv.org/abs/2210.13438, tables 1 and 3",
        metric=metric,
        reported=reported,
        reached=None,
        status="not trained",
        steps=0,
        hardware="",
        command=f"python -m experiments.encodec_24khz --workdir runs/{row} --set row={row} data_dir=FOLDER",
        deviations=(*DEVIATIONS, *deviations),
    )


CARDS = (
    card("paper", "SI-SNR at 6 kbps, dB", 6.67),
    card("paper", "ViSQOL at 6 kbps", 4.35),
    card("paper", "MUSHRA of clean speech at 3 kbps", 67.0),
    card("paper", "MUSHRA of clean speech at 6 kbps", 83.1),
    card(
        "small",
        "mel distance at 4.8 kbps on held-out recordings",
        None,
        "Not a row of the paper: 8 filters, one LSTM layer, 8 codebooks of 256 codes, two narrow discriminators "
        "for each bitrate, 20 000 steps of 8 crops.",
    ),
)


def make_losses(config: Config) -> AdversarialLosses:
    """Each by its part of the whole, and the commitment beside the balancer."""
    spectral = functools.partial(
        encodec_mel_loss,
        sample_rate=config.model.sample_rate,
        win_lengths=config.spectral_windows,
        num_mels=config.spectral_mels,
    )
    return AdversarialLosses(
        reconstruction={"waveform": waveform_l1_loss, "spectral": spectral},
        adversarial={
            "adversarial": lambda real, fake: hinge_generator_loss(fake),
            "feature": functools.partial(feature_loss, form="relative"),
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
        bandwidth = jax.random.choice(key, len(config.num_levels))  # one for the whole batch, section 3.2
        num_levels = jnp.full(len(waveform), jnp.array(config.num_levels)[bandwidth])
        reconstruction, quantized = model.apply({"params": params}, waveform, num_levels)
        used = jnp.arange(num_codebooks)[None] < num_levels[:, None]
        learned = quantized.residuals, quantized.codes, used
        return Generated(waveform, reconstruction, {"commitment": quantized.commitment}, learned, bandwidth)

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
        num_discriminators=len(config.num_levels),
        init_codebooks=start_codebooks,
    )
    train_step = make_adversarial_step(
        generate,
        discriminate,
        losses,
        optimizer,
        optimizer,
        shardings=shardings,
        batch_sharding=sharding.batch_sharding(mesh, rules),
        disc_probability=config.disc_probability,
        update_codebooks=average_codebooks(config.codebooks),
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
