r"""SoundStream at 24 kHz as in its paper: 3 to 18 kbps in one model, and one that takes noise out on request.

Paper: Zeghidour et al. 2021, SoundStream, https://arxiv.org/abs/2107.03312, sections 3 and 4.1; results in section 5
Run:   python -m experiments.soundstream_24khz --workdir runs/soundstream --set data_dir=FOLDER
Noise: python -m experiments.soundstream_24khz --workdir runs/denoising --set row=denoising data_dir=FOLDER \
       noise_dir=NOISE
CPU:   python -m experiments.soundstream_24khz --workdir runs/small --set row=small data_dir=FOLDER
Pod:   python -m experiments.soundstream_24khz --workdir /mnt/shared/soundstream --set data_dir=FOLDER \
       cache_dir=/mnt/shared/cache mesh=data:32 distributed=true     (the same command on every host)
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
    load_noises,
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
from jaxaudio.data.audio_crops import SOUNDSTREAM_CROPS, CropConfig, SourceConfig, SplitConfig
from jaxaudio.models.soundstream import PRESETS, SoundStream, SoundStreamConfig
from jaxaudio.nn import discriminator_config
from jaxaudio.nn.discriminator_config import DiscriminatorConfig, ResidualSTFTConfig, ScaleConfig
from jaxaudio.nn.discriminators import Discriminators
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.ops.adversarial_losses import feature_loss, hinge_discriminator_loss, hinge_generator_loss
from jaxaudio.ops.codebook_ema import CodebookConfig
from jaxaudio.ops.spectral_losses import soundstream_mel_loss
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
      spectral_weight, adversarial_weight, feature_weight: factors of the losses, equation 5.
      commitment_weight: factor of the commitment loss, of which the paper is silent.
      spectral_windows, spectral_mels: of the mel spectrograms.
      optimizer: of both sides.
      data_dir: folder, zip or list of recordings.
      noise_dir: the same for noise; for models that denoise.
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
    model: SoundStreamConfig = PRESETS["soundstream_24khz"]
    discriminator: DiscriminatorConfig = discriminator_config.PRESETS["soundstream"]
    codebooks: CodebookConfig = CodebookConfig()
    spectral_weight: float = 1.0
    adversarial_weight: float = 1.0
    feature_weight: float = 100.0
    commitment_weight: float = 1.0
    spectral_windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    spectral_mels: int = 64
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4)
    data_dir: str = "data"
    noise_dir: str | None = None
    cache_dir: str | None = None
    split: SplitConfig = SplitConfig()
    sources: tuple[SourceConfig, ...] = (SourceConfig("", 1.0),)
    crop: CropConfig = SOUNDSTREAM_CROPS
    evaluation: EvaluationConfig = EvaluationConfig(num_codebooks=(4, 8, 16, 24))
    batch_size: int = 128
    num_steps: int = 1_000_000
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
        if self.model.denoising != (self.crop.denoise_rate is not None):
            raise ValueError(f"model.denoising={self.model.denoising}, but crop.denoise_rate={self.crop.denoise_rate}")


PLACEMENT = ("data_dir", "noise_dir", "cache_dir", "mesh", "rules", "cpu_devices", "distributed")
PAPER = PRESETS["soundstream_24khz"]
SMALL = dataclasses.replace(
    PAPER,
    seanet=dataclasses.replace(PAPER.seanet, num_filters=8, embed_dim=64, dilations=(1, 3)),
    rvq=RVQConfig(num_codebooks=8, codebook_size=256, codebook_dim=64, embed_dim=64),
)
ROWS = {
    config.row: config
    for config in (
        Config("paper"),
        Config(
            "denoising",
            model=dataclasses.replace(PAPER, denoising=True),
            crop=dataclasses.replace(SOUNDSTREAM_CROPS, denoise_rate=0.5),
        ),
        Config(
            "small",
            model=SMALL,
            discriminator=DiscriminatorConfig(
                scales=ScaleConfig(features=4, max_features=32, groups=(1, 1, 1, 1)),
                residual_stft=ResidualSTFTConfig(win_length=512, hop_length=256, features=4, kernel_size=3),
            ),
            codebooks=CodebookConfig(dead_usage=0.1, dead_is_relative=True),
            optimizer=OptimizerConfig(learning_rate=5e-4, clip_norm=1000.0),
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
    "The commitment loss has weight 1; the paper's equation 5 has none.",
    "Levels get their k-means one after the other, from the batches of the first steps; dead codes get new sums and "
    "usages with their vectors.",
    "The magnitudes, filters and logarithms of the mel loss are ours, as are the channels of the spectrogram network.",
)


def card(row: str, metric: str, reported: float | None, *deviations: str) -> Card:
    """The card of a row that nobody trained here."""
    noise = " noise_dir=NOISE" if row == "denoising" else ""
    return Card(
        system=f"SoundStream 24 kHz, {row}",
        paper="Zeghidour et al. 2021, SoundStream, https://arxiv.org/abs/2107.03312, section 5",
        metric=metric,
        reported=reported,
        reached=None,
        status="not trained",
        steps=0,
        hardware="",
        command=f"python -m experiments.soundstream_24khz --workdir runs/{row} --set row={row} data_dir=FOLDER{noise}",
        deviations=(*DEVIATIONS, *deviations),
    )


CARDS = (
    card("paper", "ViSQOL at 6 kbps", 3.96),
    card("paper", "ViSQOL at 3 kbps", 3.76),
    card("denoising", "mel distance at 18 kbps on held-out recordings", None),
    card(
        "small",
        "mel distance at 4.8 kbps on held-out recordings",
        None,
        "Not a row of the paper: 8 filters, 8 codebooks of 256 codes, narrow discriminators, 20 000 steps of 8 crops.",
    ),
)


def make_losses(config: Config) -> AdversarialLosses:
    """Equation 5, and the commitment."""
    spectral = functools.partial(
        soundstream_mel_loss,
        sample_rate=config.model.sample_rate,
        win_lengths=config.spectral_windows,
        num_mels=config.spectral_mels,
    )
    return AdversarialLosses(
        reconstruction={"spectral": spectral},
        adversarial={"adversarial": lambda real, fake: hinge_generator_loss(fake), "feature": feature_loss},
        discriminator=hinge_discriminator_loss,
        weights={
            "spectral": config.spectral_weight,
            "adversarial": config.adversarial_weight,
            "feature": config.feature_weight,
        },
        penalty_weights={"commitment": config.commitment_weight},
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
    noises = load_noises(config.noise_dir, **sizes)
    batches = make_batches(config, recordings["train"], mesh, rules, noises=noises)
    model, discriminators = SoundStream(config.model), Discriminators(config.discriminator)
    num_codebooks = config.model.num_codebooks

    def generate(params, batch, key):
        waveform = batch["waveform"]
        num_levels = jax.random.randint(key, (len(waveform),), 1, num_codebooks + 1)  # section 3.3: by example
        asked = {"denoise": batch["denoise"]} if config.model.denoising else {}
        reconstruction, quantized = model.apply({"params": params}, waveform, num_levels, **asked)
        used = jnp.arange(num_codebooks)[None] < num_levels[:, None]
        learned = quantized.residuals, quantized.codes, used
        target = batch["target"] if config.model.denoising else waveform
        return Generated(target, reconstruction, {"commitment": quantized.commitment}, learned)

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
        "soundstream",
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
