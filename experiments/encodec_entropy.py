r"""EnCodec's language model of a codec's codes, which entropy coding needs: trained, quantized, and what it saves.

Paper: Défossez et al. 2022, High Fidelity Neural Audio Compression, https://arxiv.org/abs/2210.13438, section 3.3 and
       the column "Entropy Coded" of Table 1
Run:   jaxaudio tokenize train.jsonl tokens/train --codec DIR      (the same for valid.jsonl)
       python -m experiments.encodec_entropy --workdir runs/entropy --set codec_dir=DIR tokens=tokens/train \
       valid_tokens=tokens/valid
Use:   jaxaudio encode IN.wav OUT.jac --codec DIR --entropy

The codes come from disk, so any codec will do. The result is DIR/entropy.safetensors: integers, by which every machine
computes the same probabilities, see `data.integer_lm`.
"""

import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import encodec_entropy_report
from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.data.code_crops import code_batches, evaluation_code_batches
from jaxaudio.data.entropy_coder import EntropyModelError, LMCoder, load_entropy_coder, save_entropy_model
from jaxaudio.data.lm_quantization import quantize_lm
from jaxaudio.data.token_dataset import TokenDataset, TokenFormat
from jaxaudio.models.encodec_lm import CONTEXT_S, EncodecLM, EncodecLMConfig
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.report.card import Card
from jaxaudio.train.checkpoint import Checkpointer, CheckpointError
from jaxaudio.train.loop import MetricsWriter, train_loop
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxaudio.train.state import init_state, num_parameters
from jaxaudio.train.step import make_eval_step, make_train_step, mean_metrics

REPORTED = {1.5: 0.9, 3.0: 1.9, 6.0: 4.1, 12.0: 8.9}  # kbit/s without and with entropy coding, Table 1, 24 kHz
SAVINGS = {75.0: "25 to 40 %", 150.0: "20 to 30 %"}  # of the paper, by frame rate: 24 and 48 kHz


def card(kbps: float, **reached) -> Card:
    """A card; `reached` holds what a training measured: reached, status, steps, hardware."""
    return Card(
        system=f"Entropy coding of EnCodec, {kbps:g} kbit/s",
        paper="Défossez et al. 2022, EnCodec, https://arxiv.org/abs/2210.13438, Table 1",
        metric="kbit/s of held-out codes after entropy coding",
        reported=REPORTED.get(kbps),
        command="python -m experiments.encodec_entropy --workdir runs/entropy --set tokens=DIR valid_tokens=DIR",
        deviations=(
            "The codes are those of the codec at hand on its own held-out recordings, not the paper's.",
            "The paper does not give the optimizer: here AdamW with a cosine schedule, and the average of parameters.",
            "Each chunk of crop_s seconds is coded by itself, in exact integers.",
        ),
        **({"reached": None, "status": "not trained", "steps": 0, "hardware": ""} | reached),
    )


CARDS = tuple(card(kbps) for kbps in REPORTED)


PLACEMENT = ("tokens", "valid_tokens", "codec_dir", "coded_s", "mesh", "rules", "cpu_devices")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the run; the codec's come from the codes.

    Attributes:
      tokens, valid_tokens: folders of `jaxaudio tokenize`, of the same codec and bandwidth.
      codec_dir: the codec's folder, into which the entropy model is written; the run's own if None.
      levels: codebooks of a row, drawn for each; evaluated one by one. By default those of EnCodec's bandwidths.
      num_layers, embed_dim, num_heads, mlp_dim: of the model.
      crop_s: seconds of a row.
      max_offset: of its position, in frames, drawn for each; with the crop at most num_positions.
      num_positions: of the integer model: the longest stream in frames, after which it starts anew.
      batch_size: rows of a step over all devices.
      optimizer: see there.
      num_steps, log_every, evaluate_every, checkpoint_every: in steps.
      ema_decay: of the parameters that are evaluated and quantized.
      coded_s: seconds of held-out audio that are coded in the end, by the integer model; in chunks of crop_s.
      seed: of everything.
      mesh, rules, cpu_devices: placement.
    """

    tokens: str = "tokens/train"
    valid_tokens: str = "tokens/valid"
    codec_dir: str | None = None
    levels: tuple[int, ...] = (2, 4, 8, 16, 32)
    num_layers: int = 5
    embed_dim: int = 200
    num_heads: int = 8
    mlp_dim: int = 800
    crop_s: float = 5.0
    max_offset: int = 1024
    num_positions: int = 2048
    batch_size: int = 16
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw",
        learning_rate=5e-4,
        schedule="cosine",
        warmup_steps=200,
        num_steps=10_000,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    num_steps: int = 10_000
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 500
    ema_decay: float = 0.995
    coded_s: float = 300.0
    seed: int = 0
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 1

    def __post_init__(self):
        if self.optimizer.num_steps not in (None, self.num_steps):
            raise ValueError(f"optimizer.num_steps is {self.optimizer.num_steps}, but the run's own {self.num_steps}")
        if not self.levels or sorted(set(self.levels)) != list(self.levels):
            raise ValueError(f"levels are {self.levels}; expected at least one, rising")

    def model(self, codec: TokenFormat) -> EncodecLMConfig:
        """The model of a codec's codes.

        Raises:
          ValueError: the codec has fewer codebooks than `levels`, or too few positions for the crops.
        """
        if self.levels[-1] > codec.num_codebooks:
            raise ValueError(f"levels are {self.levels}; {self.tokens} has {codec.num_codebooks} codebooks")
        if self.num_frames(codec) + self.max_offset > self.num_positions:
            raise ValueError(
                f"{self.num_frames(codec)} frames with max_offset={self.max_offset} pass num_positions="
                f"{self.num_positions}"
            )
        return EncodecLMConfig(
            num_codebooks=self.levels[-1],
            codebook_size=codec.codebook_size,
            past_frames=int(CONTEXT_S * codec.frame_rate),
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
        )

    def num_frames(self, codec: TokenFormat) -> int:
        """Frames of a row."""
        return round(self.crop_s * codec.frame_rate)


def load_tokens(config: Config) -> tuple[TokenDataset, TokenDataset]:
    """The codes for training and those held out.

    Raises:
      ValueError: a folder holds none, or the two are not of the same codec and bandwidth.
    """
    train, valid = TokenDataset(config.tokens), TokenDataset(config.valid_tokens)
    if train.format != valid.format:
        raise ValueError(f"{config.tokens} has {train.format}, {config.valid_tokens} has {valid.format}")
    return train, valid


@dataclasses.dataclass(frozen=True)
class Result:
    """What one number of codebooks costs.

    Attributes:
      kbps: without entropy coding.
      bits_per_code: of the model in floats, on all held-out codes.
      coded_kbps: what the integer model's streams took.
      coded_s: of how many seconds.
      frames_per_s: coded, on one core.
    """

    kbps: float
    bits_per_code: float
    coded_kbps: float
    coded_s: float
    frames_per_s: float


def kbps_of(codec: TokenFormat, level: int) -> float:
    """Of codes as they are, log2(codebook_size) bits each."""
    return codec.frame_rate * level * math.log2(codec.codebook_size) / 1000


def write_entropy_model(config: Config, model: EncodecLMConfig, params, workdir: pathlib.Path) -> LMCoder:
    """Quantizes the parameters and writes them into the codec's folder, or the run's."""
    folder = config.codec_dir or workdir
    numbers = {"num_heads": model.num_heads, "past_frames": model.past_frames}
    path = save_entropy_model(
        folder, quantize_lm(params, num_positions=config.num_positions), name=workdir.name, **numbers
    )
    print(f"wrote {path}")
    return load_entropy_coder(folder)


def coded(coder: LMCoder, clips: Sequence, level: int, num_frames: int, config: Config) -> tuple[float, float, float]:
    """Codes held-out clips in chunks of `num_frames`: kbit/s, seconds of audio, frames coded in a second."""
    num_bytes, total, started = 0, 0, time.perf_counter()
    limit = config.coded_s * num_frames / config.crop_s
    for index in range(len(clips)):
        codes = clips[index].codes[:level]
        for start in range(0, codes.shape[1], num_frames):
            if total < limit:
                chunk = codes[:, start : start + num_frames]
                num_bytes, total = num_bytes + len(coder.encode(chunk)), total + chunk.shape[1]
    seconds = total / num_frames * config.crop_s
    return 8 * num_bytes / 1000 / seconds, seconds, total / (time.perf_counter() - started)


def main(config: Config, workdir: pathlib.Path) -> None:
    """Trains, quantizes, codes what was held out, reports."""
    started = time.perf_counter()
    config_lib.claim_workdir(config, workdir, may_change=PLACEMENT)
    mesh, rules = sharding.make_mesh(config.mesh), sharding.TABLES[config.rules]
    init_key, train_key = jax.random.split(jax.random.key(config.seed), 2)

    train, valid = load_tokens(config)
    model, num_frames = EncodecLM(config.model(train.format)), config.num_frames(train.format)
    shard, num_shards = sharding.process_shard(mesh, rules)
    if config.batch_size % num_shards:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {num_shards} processes that read")
    rows = {"process_index": shard, "process_count": num_shards, "batch_size": config.batch_size // num_shards}
    batches = code_batches(
        train, num_frames=num_frames, levels=config.levels, max_offset=config.max_offset, seed=config.seed, **rows
    )

    def loss_fn(params, batch, key):
        """In bits."""
        num_codebooks = model.config.num_codebooks
        inputs, targets, mask = (batch[name][:, :num_codebooks] for name in ("inputs", "targets", "mask"))
        logits, _ = model.apply({"params": params}, inputs, num_levels=batch["num_levels"], offset=batch["offset"])
        nats, weight = cross_entropy(logits, targets, mask)
        return nats / math.log(2), {"weight": weight}

    def init_params(key):
        return model.init(key, jnp.zeros((1, model.config.num_codebooks, 1), jnp.int32))["params"]

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

    def evaluate(state):
        """Bits per code of each number of codebooks; "loss" is of the most."""
        bits = {}
        for level in config.levels:
            held_out = evaluation_code_batches(valid, num_frames=num_frames, num_levels=level, **rows)
            bits[f"bits_{level}"] = mean_metrics(eval_step(state.eval_params, put(batch)) for batch in held_out)["loss"]
        return bits | {"loss": bits[f"bits_{config.levels[-1]}"]}

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
        state = checkpoints.restore(state, step=best)
        bits = evaluate(state)
    if jax.process_index() == 0:
        params = jax.device_get(state.eval_params)
        coder = write_entropy_model(config, model.config, params, workdir)
        results = [
            Result(kbps_of(train.format, level), bits[f"bits_{level}"], *coded(coder, valid, level, num_frames, config))
            for level in config.levels
        ]
        hardware = f"{mesh.size} x {jax.devices()[0].device_kind}, {(time.perf_counter() - started) / 60:.1f} minutes"
        reached = {"status": "trained by this run", "steps": best, "hardware": hardware}
        cards = [card(result.kbps, reached=result.coded_kbps, **reached) for result in results]
        encodec_entropy_report.write_page(
            workdir,
            results,
            cards,
            codec=train.format,
            savings=SAVINGS.get(train.format.frame_rate),
            config=config_lib.to_json(config),
        )


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, Config())
    raise_malloc_thresholds()
    sharding.split_cpu(config.cpu_devices)
    try:
        main(config, workdir)
    except (sharding.ShardingError, EntropyModelError, CheckpointError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
