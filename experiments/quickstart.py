"""The main job in ten minutes on two CPU cores: Bach chorales from data to a page with music, on a small Transformer.

Paper: Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281
Run:   python -m experiments.quickstart --workdir runs/quickstart

The chorales ship inside the music21 package. Their split is our own, by chorale; it is not the JSB split, so the result
compares with the n-grams of the same run and with nothing else.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import chorale_report
from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.data.chorales import VOCAB_SIZE, encode_grid
from jaxaudio.data.music21_chorales import load_music21
from jaxaudio.data.pipelines import chorale_batches, evaluation_batches
from jaxaudio.models.music_transformer import MusicTransformer, MusicTransformerConfig
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.report.card import Card
from jaxaudio.train.checkpoint import Checkpointer, CheckpointError
from jaxaudio.train.loop import MetricsWriter, train_loop
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxaudio.train.state import init_state, num_parameters
from jaxaudio.train.step import make_eval_step, make_train_step, mean_metrics

CARDS = (
    Card(
        system="Music Transformer, quickstart",
        paper="Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281, section 4.1; no row",
        metric="NLL on held-out music21 chorales, nats per token (not the JSB split)",
        reported=None,
        reached=0.477,
        status="trained; the best n-gram has 0.616",
        steps=3000,
        hardware="2 cores of an AMD EPYC, 3 minutes",
        command="python -m experiments.quickstart --workdir runs/quickstart",
        deviations=(
            "The chorales of the music21 package with a split of our own, by chorale.",
            "3 layers of width 128 instead of 5 of 512, to fit ten minutes on two cores.",
            "Sinusoids are concatenated, with labels of the voice and of the 16th within the beat.",
            "Training chorales are transposed at random; AdamW with a cosine schedule; the average of parameters is "
            "evaluated.",
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the run; fields as in experiments/music_transformer_jsb.py."""

    model: MusicTransformerConfig = MusicTransformerConfig(
        vocab_size=VOCAB_SIZE,
        transformer=TransformerConfig(
            num_layers=3,
            embed_dim=128,
            num_heads=4,
            mlp_dim=512,
            positions="relative",
            max_distance=128,
            block_size=64,
            dropout_rate=0.1,
            mlp_dropout_rate=0.1,
            dropout_generator="hash",
        ),
        position_encoding="concatenated",
        label_period=16,
    )
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw",
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=100,
        num_steps=3000,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    cache_dir: str = "~/.cache/jaxaudio"
    length: int = 512
    batch_size: int = 2
    transpose: tuple[int, int] | None = (-5, 6)
    num_steps: int = 3000
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 500
    ema_decay: float = 0.99
    seed: int = 0
    mesh: str = "data:-1"
    rules: Literal["DATA", "FSDP", "TENSOR"] = "DATA"
    cpu_devices: int = 2
    prime_tokens: int = 128
    sample_tokens: int = 512
    temperature: float = 0.9

    def __post_init__(self):
        chorale_report.check_samples(self)
        if self.optimizer.num_steps not in (None, self.num_steps):
            raise ValueError(f"num_steps is {self.num_steps}, but optimizer.num_steps {self.optimizer.num_steps}")


def main(config: Config, workdir: pathlib.Path) -> None:
    """Trains, evaluates, samples, exports and reports."""
    started = time.perf_counter()
    config_lib.claim_workdir(config, workdir, may_change=("cache_dir", "mesh", "rules", "cpu_devices"))
    mesh, rules = sharding.make_mesh(config.mesh), sharding.TABLES[config.rules]
    init_key, dropout_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)

    chorales = load_music21(pathlib.Path(config.cache_dir).expanduser())
    print(f"{chorales.description}: " + ", ".join(f"{len(v)} {k}" for k, v in chorales.splits.items()))
    tokens = {split: [encode_grid(grid) for grid in grids] for split, grids in chorales.splits.items()}
    batches = chorale_batches(
        tokens["train"],
        length=config.length,
        batch_size=config.batch_size,
        seed=config.seed,
        transpose=config.transpose,
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

    def evaluate(state, split):
        windows = evaluation_batches(tokens[split], length=config.length, batch_size=config.batch_size)
        return mean_metrics(eval_step(state.eval_params, put(batch)) for batch in windows)

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
            dropout_key,
            num_steps=config.num_steps,
            workdir=workdir,
            checkpointer=checkpoints,
            writer=writer,
            put=put,
            evaluate=functools.partial(evaluate, split="valid"),
            log_every=config.log_every,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
        )
        best = checkpoints.best_step
        nats = evaluate(checkpoints.restore(state, step=best), "test")["loss"]
    seconds = time.perf_counter() - started
    chorale_report.finish(
        workdir,
        workdir / "checkpoints" / str(best),
        model,
        sample_key,
        config=config,
        ema=True,
        tokens=tokens,
        split="test",
        primes=dict(
            zip((pathlib.Path(name).stem for name in chorales.names["test"][:2]), tokens["test"], strict=False)
        ),
        nats=nats,
        about=f"music21 {chorales.music21_version}: {chorales.description}. {len(tokens['train'])} chorales trained "
        f"the model, {len(tokens['valid'])} are the held-out curve below and chose step {best}, {len(tokens['test'])} "
        "are evaluated here. The n-grams are fitted on the same training chorales and see the whole piece so far; the "
        f"model sees at most {config.length} tokens.",
        card=dataclasses.replace(
            CARDS[0],
            reached=nats,
            status="trained by this run",
            steps=best,
            hardware=f"{mesh.size} x {jax.devices()[0].device_kind}, {seconds / 60:.1f} minutes in the last start",
        ),
    )


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, Config())
    raise_malloc_thresholds()
    sharding.split_cpu(config.cpu_devices)
    try:
        main(config, workdir)
    except (config_lib.ConfigError, sharding.ShardingError, CheckpointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
