"""A small Whisper from scratch on spoken digits: single and in sentences, with timestamps, on two CPU cores.

Paper: Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356, sections 2.2 and 2.3; no row
Run:   python -m experiments.whisper_fsdd --workdir runs/fsdd --set data_dir=FOLDER
Use:   jaxaudio transcribe digits.wav --model runs/fsdd/model

The data are the Free Spoken Digit Dataset with its own split: takes 0 to 4 of each digit and speaker are the test set.
Training sentences are made on the fly from the training takes; the test sentences are the test takes, each once in
every round, joined with pauses.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import digit_report
from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.convert.whisper import load_whisper, save_whisper
from jaxaudio.data.byte_pair import train_byte_pairs
from jaxaudio.data.fsdd import WORDS, FsddError, SentenceConfig, Stage, load_fsdd, sentence_batches
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.generate.whisper import inference_params
from jaxaudio.models.whisper import FRAME_RATE, Whisper, WhisperConfig
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.ops.mel import whisper_log_mel
from jaxaudio.ops.positions import sinusoids
from jaxaudio.ops.spec_augment import SpecAugmentConfig, spec_augment
from jaxaudio.report.card import Card
from jaxaudio.train.checkpoint import Checkpointer, CheckpointError
from jaxaudio.train.loop import MetricsWriter, train_loop
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxaudio.train.state import init_state, num_parameters
from jaxaudio.train.step import make_eval_step, make_train_step, mean_metrics

PAPER = "Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356; no row"
DEVIATIONS = (
    "Not a row of the paper: width 128, two layers each in encoder and decoder, windows of 6 s, an own vocabulary.",
    "Spoken digits of six speakers, all of whom are heard in training; sentences are joined recordings, each digit a "
    "segment of its own.",
    "The training begins with windows of 1.2 and 2.4 s. The timestamps' embeddings begin as the sinusoids of the "
    "positions that they name, the convolutions four times as wide.",
    "Masks of at most 0.1 s instead of SpecAugment's 1 s, no time warp; speed and loudness vary, noise is added.",
    "AdamW with a cosine schedule; the average of parameters is evaluated.",
)


def card(system: str, metric: str, **reached) -> Card:
    """A card; `reached` holds what a training measured: reached, status, steps, hardware."""
    return Card(
        system=system,
        paper=PAPER,
        metric=metric,
        reported=None,
        command="python -m experiments.whisper_fsdd --workdir runs/fsdd --set data_dir=FOLDER",
        deviations=DEVIATIONS,
        **({"reached": None, "status": "not trained", "steps": 0, "hardware": ""} | reached),
    )


TRAINED = {"status": "trained", "steps": 6000, "hardware": "2 cores of an AMD EPYC, 36 minutes beside other work"}
CARDS = (
    card("Whisper, spoken digits", "WER on the 300 test digits of FSDD, %", reached=1.33, **TRAINED),
    card(
        "Whisper, spoken digit sentences",
        "WER on 3 to 6 joined test digits of FSDD with timestamps, %",
        reached=0.67,
        **TRAINED,
    ),
    card(
        "Whisper, spoken digit recordings",
        "WER on 60 joined test digits of FSDD with timestamps, %",
        reached=1.33,
        **TRAINED,
    ),
)


STAGES = (
    Stage(1000, 32, 16, SentenceConfig(window_s=1.2, num_digits=(1, 2), lead_s=(0.0, 0.3), overflow_rate=0.0)),
    Stage(1200, 24, 24, SentenceConfig(window_s=2.4, num_digits=(1, 3), lead_s=(0.0, 0.6), overflow_rate=0.1)),
    Stage(3800, 16, 64, SentenceConfig(window_s=6.0, num_digits=(1, 6), overflow_rate=0.3)),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the run.

    Attributes:
      model: its vocab_size is that of the tokenizer that the run makes, its window that of the last stage.
      stages: of the training, one after the other: first short windows, in which a digit is easily found, last the
        model's own. Evaluation always has the last one's.
      augment: SpecAugment.
      optimizer: see there; the encoder's table of positions stays as it is.
      data_dir: folder with recordings.zip, or of a folder fsdd with it.
      num_merges: of the byte pairs, learned from the ten words.
      timestamps_rate, previous_rate: see `data.fsdd.sentence_batches`.
      log_every, evaluate_every, checkpoint_every: in steps.
      ema_decay: of the parameters that are evaluated.
      seed: of everything.
      mesh, rules, cpu_devices: placement.
      test_rounds: how often each test digit is in a test sentence.
    """

    model: WhisperConfig = WhisperConfig(
        vocab_size=601,
        num_mels=80,
        num_frames=600,
        text_length=64,
        embed_dim=128,
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    stages: tuple[Stage, ...] = STAGES
    augment: SpecAugmentConfig = SpecAugmentConfig(
        time_warp=0, frequency_mask=16, num_frequency_masks=1, time_mask=10, num_time_masks=2
    )
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=100,
        num_steps=6000,
        b2=0.98,
        weight_decay=0.01,
        clip_norm=1.0,
        frozen=("encoder/position_embedding",),
    )
    data_dir: str = "data"
    num_merges: int = 35
    timestamps_rate: float = 0.85
    previous_rate: float = 0.5
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 500
    ema_decay: float = 0.995
    seed: int = 0
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1
    test_rounds: int = 2

    def __post_init__(self):
        if self.optimizer.num_steps not in (None, self.num_steps):
            raise ValueError(f"optimizer.num_steps is {self.optimizer.num_steps}, but the stages have {self.num_steps}")
        window_s = self.stages[-1].sentences.window_s
        if self.model.num_frames != round(window_s * FRAME_RATE):
            raise ValueError(f"model.num_frames is {self.model.num_frames}, but the last stage's window {window_s} s")

    @property
    def num_steps(self) -> int:
        """Of all stages."""
        return sum(stage.num_steps for stage in self.stages)


def make_tokenizer(config: Config) -> WhisperTokenizer:
    """Byte pairs of the ten words, English alone, and timestamps over the window.

    Raises:
      ValueError: its size is not the model's vocab_size.
    """
    pairs = train_byte_pairs([f" {word}" for word in WORDS], config.num_merges)
    tokenizer = WhisperTokenizer.for_ranks(pairs, languages=("en",), num_timestamps=config.model.num_positions + 1)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(f"model.vocab_size is {config.model.vocab_size}, the tokenizer's {tokenizer.vocab_size}")
    return tokenizer


def features(config: Config, batch: dict[str, jax.Array]) -> jax.Array:
    """Log-mels (B, T, M) of a batch, zero behind each row's frames as in `transcribe`."""
    mel = whisper_log_mel(batch["waveform"], config.model.num_mels)
    heard = jnp.arange(mel.shape[1])[None] < batch["num_frames"][:, None]
    return jnp.where(heard[..., None], mel, 0.0)


def main(config: Config, workdir: pathlib.Path) -> None:
    """Trains, writes the model, transcribes the test set with it, reports."""
    started = time.perf_counter()
    config_lib.claim_workdir(config, workdir, may_change=("data_dir", "mesh", "rules", "cpu_devices"))
    mesh, rules = sharding.make_mesh(config.mesh), sharding.TABLES[config.rules]
    init_key, train_key = jax.random.split(jax.random.key(config.seed), 2)

    clips, tokenizer = load_fsdd(config.data_dir), make_tokenizer(config)
    rates = {"timestamps_rate": config.timestamps_rate, "previous_rate": config.previous_rate}
    batches = sentence_batches(clips["train"], tokenizer, config.stages, seed=config.seed, **rates)
    held_out = dataclasses.replace(config.stages[-1], num_steps=8)
    held_out = list(sentence_batches(clips["valid"], tokenizer, [held_out], seed=config.seed + 1, **rates))
    model = Whisper(config.model)

    def logits_of(params, mel, tokens, **options):
        """The model on windows as long as the batch's: a shorter one has the first of the encoder's positions."""
        shorter = Whisper(dataclasses.replace(config.model, num_frames=mel.shape[1]))
        table = params["encoder"]["position_embedding"][: mel.shape[1] // 2]
        params = params | {"encoder": params["encoder"] | {"position_embedding": table}}
        return shorter.apply({"params": params}, mel, tokens, **options)

    def loss_fn(params, batch, key):
        deterministic = key is None
        mel, rngs = features(config, batch), None
        if not deterministic:
            augment_key, dropout_key = jax.random.split(key)
            mel, rngs = spec_augment(augment_key, mel, config.augment), {"dropout": dropout_key}
        logits = logits_of(params, mel, batch["inputs"], deterministic=deterministic, rngs=rngs)
        nats, weight = cross_entropy(logits, batch["targets"], batch["mask"])
        correct = jnp.sum((jnp.argmax(logits, -1) == batch["targets"]) & batch["mask"])
        return nats, {"weight": weight, "accuracy": correct}

    def init_params(key):
        mel = jnp.zeros((1, config.model.num_frames, config.model.num_mels))
        params = model.init(key, mel, jnp.zeros((1, 1), jnp.int32))["params"]
        # Times begin as the sinusoids of the positions they name, with the norm of other tokens, and convolutions four
        # times as wide, so that at first the encoder is not all position: both save thousands of steps.
        dim, encoder, decoder = config.model.embed_dim, dict(params["encoder"]), dict(params["decoder"])
        times = (2 / dim) ** 0.5 * sinusoids(jnp.arange(tokenizer.num_timestamps), dim)
        table = decoder["token_embedding"]
        decoder["token_embedding"] = table.replace(value=table.value.at[tokenizer.timestamp_begin :].set(times))
        for name in ("conv1", "conv2"):
            kernel = encoder[name]["kernel"]
            encoder[name] = encoder[name] | {"kernel": kernel.replace(value=4 * kernel.value)}
        return params | {"encoder": encoder, "decoder": decoder}

    optimizer, schedule = make_optimizer(config.optimizer), make_schedule(config.optimizer)
    state, shardings = init_state(init_params, optimizer, init_key, mesh, rules, ema=True)
    batch_sharding = sharding.batch_sharding(mesh, rules)
    train_step = make_train_step(
        loss_fn,
        optimizer,
        shardings=shardings,
        batch_sharding=batch_sharding,
        ema_decay=config.ema_decay,
        schedule=schedule,
    )
    eval_step = make_eval_step(loss_fn, shardings=shardings, batch_sharding=batch_sharding)
    put = functools.partial(sharding.shard_batch, mesh=mesh, rules=rules)

    valid = digit_report.evaluation_audio(clips["valid"], seed=config.seed, num_rounds=2)

    def evaluate(state):
        means = mean_metrics(eval_step(state.eval_params, put(batch)) for batch in held_out)
        params = inference_params(jax.device_get(state.eval_params))
        scores = {
            name: digit_report.score(model, params, tokenizer, audio, temperature=0.0) for name, audio in valid.items()
        }
        errors = {f"{name}_wer": score.wer for name, score in scores.items()}
        return {name: means[name] for name in ("loss", "accuracy")} | errors

    print(f"{num_parameters(state.params):,} parameters on {mesh.size} {mesh.devices.flat[0].platform} devices")
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
            evaluate=evaluate,
            log_every=config.log_every,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
        )
        best = checkpoints.best_step
        params = jax.device_get(checkpoints.restore(state, step=best).eval_params)
    save_whisper(workdir / "model", config.model, params, tokenizer)
    checkpoint = load_whisper(workdir / "model")
    test = digit_report.evaluation_audio(clips["test"], seed=config.seed, num_rounds=config.test_rounds)
    scores = {
        name: digit_report.score(Whisper(checkpoint.config), checkpoint.params, checkpoint.tokenizer, audio)
        for name, audio in test.items()
    }
    report(config, workdir, scores, steps=best, seconds=time.perf_counter() - started, num_devices=mesh.size)


def report(config: Config, workdir: pathlib.Path, scores, *, steps: int, seconds: float, num_devices: int) -> None:
    """Writes the page and prints the result."""
    hardware = f"{num_devices} x {jax.devices()[0].device_kind}, {seconds / 60:.1f} minutes in the last start"
    reached = {"status": "trained by this run", "steps": steps, "hardware": hardware}
    digit, sentence, recording = scores["digit"], scores["sentence"], scores["recording"]
    cards = [
        dataclasses.replace(card, reached=100 * score.wer, **reached)
        for card, score in zip(CARDS, scores.values(), strict=True)
    ]
    headline = (
        f"Word error rate {100 * digit.wer:.2f} % on {len(digit.utterances)} single test digits and "
        f"{100 * sentence.wer:.2f} % on {len(sentence.utterances)} sentences, whose segments begin and end within "
        f"{1000 * sentence.boundary_s:.0f} ms of the truth (median); {100 * recording.wer:.2f} % on recordings of 60."
    )
    about = (
        "Free Spoken Digit Dataset, its own split: takes 0 to 4 of each of ten digits and six speakers are the test "
        f"set; take 5 was held out and chose step {steps}. A sentence is 3 to 6 test takes of any speakers with pauses "
        f"of 0.1 to 0.6 s of digital silence, each take in {config.test_rounds} sentences; a recording is 60 of them. "
        "All are transcribed by generate.transcribe with timestamps and its default options, by the model folder that "
        "this run wrote. Boundary errors are those of the sentences in which every segment has the right word."
    )
    path = digit_report.write_page(
        workdir, headline=headline, about=about, scores=scores, cards=cards, config=config_lib.to_json(config)
    )
    print(f"{headline}\nwrote {workdir / 'model'} and {path}: open it in a browser")


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, Config())
    raise_malloc_thresholds()
    sharding.split_cpu(config.cpu_devices)
    try:
        main(config, workdir)
    except (config_lib.ConfigError, sharding.ShardingError, FsddError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
