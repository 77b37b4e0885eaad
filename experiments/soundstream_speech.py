"""A small SoundStream for speech at 16 kHz, trained on two CPU cores: 0.8 to 6.4 kbps in one model.

Paper: Zeghidour et al. 2021, SoundStream, https://arxiv.org/abs/2107.03312; no row
Run:   python -m experiments.soundstream_speech --workdir runs/speech --set data_dir=FOLDER
Use:   jaxaudio encode speech.wav speech.jac --codec runs/speech/codec --kbps 3.2

FOLDER has fsdd/recordings.zip (spoken digits) and speech/ (LJ Speech, LibriSpeech and one address). Digits were
recorded at 8 kHz: they teach nothing above 4 kHz. Held out are the digits' own test takes, some sentences of the reader
that is in the training, and two speakers that are not.
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
from jaxaudio.models.soundstream import SoundStream, SoundStreamConfig
from jaxaudio.nn.discriminator_config import DiscriminatorConfig, MultiScaleSTFTConfig, ScaleConfig
from jaxaudio.nn.discriminators import Discriminators
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.nn.seanet import SEANetConfig
from jaxaudio.ops.adversarial_losses import feature_loss, hinge_discriminator_loss, hinge_generator_loss
from jaxaudio.ops.codebook_ema import CodebookConfig
from jaxaudio.ops.spectral_losses import dac_mel_loss, waveform_l1_loss
from jaxaudio.report.card import Card
from jaxaudio.train.adversarial import AdversarialLosses, Generated, init_adversarial_state, make_adversarial_step
from jaxaudio.train.balancer import init_balancer
from jaxaudio.train.checkpoint import CheckpointError
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule

CARDS = (
    Card(
        system="SoundStream, small, speech",
        paper="Zeghidour et al. 2021, SoundStream, https://arxiv.org/abs/2107.03312; no row",
        metric="mel distance at 6.4 kbps on held-out speech",
        reported=None,
        reached=2.859,
        status="trained",
        steps=5500,
        hardware="2 cores of an AMD EPYC, 50 minutes beside other work",
        command="python -m experiments.soundstream_speech --workdir runs/speech --set data_dir=FOLDER",
        deviations=(
            "Not a row of the paper: 16 filters instead of 32, 16 codebooks of 256 codes at 50 Hz, 16 kHz.",
            "Minutes of speech instead of LibriTTS, a few thousand steps instead of a million.",
            "EnCodec's balancer, a waveform loss and DAC's mel distances instead of SoundStream's sums over frames.",
            "Muon instead of Adam; no discriminators: on so few steps they made all measures worse.",
            "Codebooks average over fewer steps, and codes are dead below a tenth of the mean usage, as in Mimi.",
        ),
    ),
)

MODEL = SoundStreamConfig(
    sample_rate=16_000,
    seanet=SEANetConfig(
        num_filters=16,
        embed_dim=64,
        strides=(4, 4, 4, 5),
        dilations=(1, 3),
        residual_kernel_size=7,
        conv_shortcut=False,
        num_lstm_layers=0,
        pad_mode="zeros",
        encoder_last_kernel_size=3,
    ),
    rvq=RVQConfig(num_codebooks=16, codebook_size=256, codebook_dim=64, embed_dim=64),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the run.

    Attributes:
      model, discriminator, codebooks, crop, evaluation: see there.
      waveform_weight, spectral_weight, adversarial_weight, feature_weight: parts of the pull on the reconstruction.
      balancer_decay: of the running norms by which the balancer rescales them.
      commitment_weight: factor of the commitment loss, which the balancer leaves out.
      adversarial_start: steps without discriminators before those with them, which take three times as long. All of
        them by default. The run was first planned for 12,000 steps: the mel distance did not fall below that of step
        5500, SI-SNR at 6.4 kbps rose from 6.5 to 6.9 dB until step 10,500, and when the discriminators joined there it
        fell to 6.0 within 500 more.
      spectral_windows, spectral_mels: of the mel distances.
      optimizer, disc_optimizer: of the codec and of the discriminators.
      data_dir: folder, zip or list of recordings.
      cache_dir: keeps decoded recordings; None decodes them at every start.
      split, sources: which recordings are held out, and how the others share the crops.
      batch_size: crops a step over all devices.
      num_steps, log_every, evaluate_every, checkpoint_every: in steps.
      disc_probability: that the discriminators learn from a step.
      ema_decay: of the parameters that are evaluated.
      seed: of everything.
      mesh, rules, cpu_devices: placement.
    """

    model: SoundStreamConfig = MODEL
    discriminator: DiscriminatorConfig = DiscriminatorConfig(
        scales=ScaleConfig(downsampling=(1, 2), features=4, max_features=32, strides=(4, 4, 4), groups=(1, 1, 1)),
        multi_scale_stft=MultiScaleSTFTConfig(win_lengths=(512, 256), features=8),
    )
    codebooks: CodebookConfig = CodebookConfig(decay=0.97, kmeans_iterations=20, dead_usage=0.1, dead_is_relative=True)
    waveform_weight: float = 0.1
    spectral_weight: float = 0.7
    adversarial_weight: float = 0.1
    feature_weight: float = 0.1
    balancer_decay: float = 0.99
    commitment_weight: float = 10.0
    adversarial_start: int = 5500
    spectral_windows: tuple[int, ...] = (64, 128, 256, 512, 1024)
    spectral_mels: tuple[int, ...] = (10, 20, 40, 80, 160)
    optimizer: OptimizerConfig = OptimizerConfig(
        name="muon",
        learning_rate=3e-3,
        schedule="linear",
        warmup_steps=50,
        num_steps=5500,
        final_fraction=1 - 5450 / 11_950,
    )
    disc_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, b1=0.8, b2=0.99)
    data_dir: str = "data"
    cache_dir: str | None = None
    split: SplitConfig = SplitConfig(
        test=(r"^fsdd/.*_[0-4]\.wav$", r"LJ001-00(02|10|29)", r"librispeech-3436", r"jfk"),
        valid=(r"^fsdd/.*_5\.wav$", r"LJ001-00(15|30)"),
        exclude=(r"^music/", r"^sound/"),
        valid_rate=0.0,
        test_rate=0.0,
    )
    sources: tuple[SourceConfig, ...] = (
        SourceConfig("^speech/ljspeech", 0.5),
        SourceConfig("^speech/librispeech", 0.25),
        SourceConfig("^fsdd/", 0.25),
    )
    crop: CropConfig = CropConfig(num_samples=4800, level="recording_peak", level_db=-1.0, gain=(0.3, 1.0))
    evaluation: EvaluationConfig = EvaluationConfig(num_codebooks=(2, 4, 8, 16))
    batch_size: int = 16
    num_steps: int = 5500
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 500
    disc_probability: float = 0.5
    ema_decay: float = 0.99
    seed: int = 0
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1

    def __post_init__(self):
        if self.optimizer.num_steps not in (None, self.num_steps):
            raise ValueError(f"num_steps is {self.num_steps}, but optimizer.num_steps {self.optimizer.num_steps}")


PLACEMENT = ("data_dir", "cache_dir", "mesh", "rules", "cpu_devices")


def make_losses(config: Config) -> AdversarialLosses:
    """What pulls on the reconstruction, each by its weight's part of the whole; the commitment stands beside it."""
    spectral = functools.partial(
        dac_mel_loss,
        sample_rate=config.model.sample_rate,
        win_lengths=config.spectral_windows,
        num_mels=config.spectral_mels,
    )
    return AdversarialLosses(
        reconstruction={"waveform": waveform_l1_loss, "spectral": spectral},
        adversarial={"adversarial": lambda real, fake: hinge_generator_loss(fake), "feature": feature_loss},
        discriminator=hinge_discriminator_loss,
        weights={
            "waveform": config.waveform_weight,
            "spectral": config.spectral_weight,
            "adversarial": config.adversarial_weight,
            "feature": config.feature_weight,
        },
        penalty_weights={"commitment": config.commitment_weight},
        rescale=True,
        balancer_decay=config.balancer_decay,
    )


def main(config: Config, workdir: pathlib.Path) -> None:
    """Trains, writes the codec, codes the test recordings with it, reports."""
    started = time.perf_counter()
    config_lib.claim_workdir(config, workdir, may_change=PLACEMENT)
    mesh, rules = sharding.make_mesh(config.mesh), sharding.TABLES[config.rules]
    init_key, train_key = jax.random.split(jax.random.key(config.seed), 2)

    sizes = {"sample_rate": config.model.sample_rate, "channels": config.model.channels}
    recordings = load_splits(config.data_dir, config.split, cache_dir=config.cache_dir, **sizes)
    batches = make_batches(config, recordings["train"], mesh, rules)
    model, discriminators = SoundStream(config.model), Discriminators(config.discriminator)
    num_codebooks = config.model.num_codebooks

    def generate(params, batch, key):
        waveform = batch["waveform"]
        num_levels = jax.random.randint(key, (len(waveform),), 1, num_codebooks + 1)
        reconstruction, quantized = model.apply({"params": params}, waveform, num_levels)
        used = jnp.arange(num_codebooks)[None] < num_levels[:, None]
        learned = quantized.residuals, quantized.codes, used
        return Generated(waveform, reconstruction, {"commitment": quantized.commitment}, learned)

    def discriminate(disc_params, waveform):
        return discriminators.apply({"params": disc_params}, waveform)

    crop = jnp.zeros((1, config.crop.num_samples, config.model.channels))
    losses = make_losses(config)
    optimizer, disc_optimizer = make_optimizer(config.optimizer), make_optimizer(config.disc_optimizer)
    state, shardings = init_adversarial_state(
        lambda key: without_codes(model.init(key, crop, jnp.ones(1, jnp.int32))["params"]),
        lambda key: discriminators.init(key, crop)["params"],
        losses,
        optimizer,
        disc_optimizer,
        init_key,
        mesh,
        rules,
        init_codebooks=start_codebooks,
        ema=True,
    )
    make_step = functools.partial(
        make_adversarial_step,
        generate,
        discriminate,
        losses,
        optimizer,
        disc_optimizer,
        shardings=shardings,
        batch_sharding=sharding.batch_sharding(mesh, rules),
        disc_probability=config.disc_probability,
        update_codebooks=average_codebooks(config.codebooks),
        ema_decay=config.ema_decay,
        schedule=make_schedule(config.optimizer),
    )
    plain_step, adversarial_step = make_step(adversarial=False), make_step()

    def train_step(state, batch, key):
        step = int(state.step)
        if step < config.adversarial_start:
            return plain_step(state, batch, key)
        if step == config.adversarial_start:  # the running norms of losses that were zero say nothing
            state = state.replace(balancer=init_balancer(losses.weights))
        return adversarial_step(state, batch, key)

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
        card=dataclasses.replace(CARDS[0], status="trained by this run", steps=best, hardware=hardware),
        config_text=config_lib.to_json(config),
        about=describe(recordings),
    )


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, Config())
    raise_malloc_thresholds()
    sharding.split_cpu(config.cpu_devices)
    try:
        main(config, workdir)
    except (config_lib.ConfigError, sharding.ShardingError, AudioError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
