"""What the trainings of codecs share: held-out files, codebooks between steps, measures at each bitrate, the loop."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.data.audio_crops import SplitConfig, check_no_leak, crop_batches, evaluation_crops, split_recordings
from jaxaudio.data.recordings import Recording, list_recordings, load_recordings
from jaxaudio.nn.codec import Codec, CodecConfig
from jaxaudio.ops import codebook_ema
from jaxaudio.ops.metrics import codebook_perplexity, multi_scale_mel_distance, si_snr
from jaxaudio.train.adversarial import AdversarialState
from jaxaudio.train.checkpoint import Checkpointer
from jaxaudio.train.loop import MetricsWriter, train_loop
from jaxaudio.train.state import num_parameters
from jaxaudio.train.step import mean_metrics

Splits = dict[str, list[Recording]]


def load_splits(
    data_dir: str | os.PathLike, config: SplitConfig, *, sample_rate: int, channels: int, cache_dir: str | None = None
) -> Splits:
    """The recordings of "train", "valid" and "test" of a folder, zip or list, decoded.

    Raises:
      AudioError, ValueError: as `list_recordings`, `split_recordings`, `load_recordings` and `check_no_leak`; or a
        split without recordings.
    """
    names = split_recordings(list_recordings(data_dir), config)
    for split, found in names.items():
        if not found:
            raise ValueError(f"no recording of {data_dir} is in the split {split!r}; change the patterns or the rates")
    load = functools.partial(load_recordings, data_dir, sample_rate=sample_rate, channels=channels, cache_dir=cache_dir)
    splits = {split: load(found) for split, found in names.items()}
    check_no_leak(splits)
    return splits


def load_noises(noise_dir: str | os.PathLike | None, **options: Any) -> list[Recording]:
    """All recordings of a folder, zip or list, as `load_recordings` gives them; none of None."""
    return [] if noise_dir is None else load_recordings(noise_dir, list_recordings(noise_dir), **options)


def describe(splits: Splits) -> str:
    """How many recordings and minutes each split has."""
    minutes = {name: sum(len(r.waveform) / r.sample_rate for r in found) / 60 for name, found in splits.items()}
    parts = [f"{len(splits[name])} ({minutes[name]:.1f} minutes) in {name}" for name in splits]
    return f"Recordings: {', '.join(parts)}; split by file, see the config."


def kbps(config: CodecConfig, num_codebooks: int) -> float:
    """Kilobits a second of so many levels."""
    return config.frame_rate * num_codebooks * (config.codebook_size - 1).bit_length() / 1000


def without_codes(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters whose codebooks are zeros until k-means starts them: a level that waits adds nothing."""
    quantizer = params["quantizer"]
    return {**params, "quantizer": quantizer | {"codebooks": jnp.zeros_like(quantizer["codebooks"])}}


def start_codebooks(params: Mapping[str, Any]) -> codebook_ema.CodebookState:
    """`init_codebooks` of `train.adversarial.init_adversarial_state`."""
    return codebook_ema.init_codebooks(params["quantizer"]["codebooks"])


def average_codebooks(config: codebook_ema.CodebookConfig) -> Callable:
    """`update_codebooks` of `make_adversarial_step`, for quantized = (residuals, codes, mask)."""

    def update(params, state, quantized, key):
        state, codebooks, metrics = codebook_ema.update_codebooks(state, *quantized, key, config)
        return {**params, "quantizer": params["quantizer"] | {"codebooks": codebooks}}, state, metrics

    return update


def count_codes(codebook_size: int) -> Callable:
    """The same for codebooks that the gradient teaches, which stay as they are: only counts, for codes (B, Q, T)."""

    def update(params, state, codes, key):
        counts = jax.vmap(lambda level: jnp.bincount(level.ravel(), length=codebook_size), in_axes=1)(codes)
        unused = jnp.sum(counts == 0, axis=1).astype(jnp.float32)
        return params, state, {"perplexity": codebook_perplexity(codes, codebook_size), "dead_codes": unused}

    return update


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out recordings.

    Attributes:
      num_codebooks: levels, each a bitrate.
      crop_s: seconds of the pieces that recordings are cut into during training.
      batch_size: of these, over all devices.
      max_crops: the first so many, every n-th of all so that all recordings are heard of.
      num_examples: recordings to hear and see on the page, at most.
      max_recordings: test recordings of each folder that the finished run codes and measures whole, at most.
    """

    num_codebooks: tuple[int, ...]
    crop_s: float = 1.0
    batch_size: int = 16
    max_crops: int = 128
    num_examples: int = 3
    max_recordings: int = 12


def make_evaluate(
    model: Codec, recordings: Sequence[Recording], config: EvaluationConfig, mesh: Mesh, rules: sharding.Rules
) -> Callable[[Any], dict[str, float]]:
    """The function from parameters to measures on held-out recordings, cut into crops.

    They are "si_snr/RATE" in dB, -50 at least, and "mel_distance/RATE" for each bitrate in kbps, and "loss", the mean
    of the mel distances, by which checkpoints are ranked. Crops with a silent channel and those that are mostly zeros
    after a recording's end have none.

    Raises:
      ValueError: no crop is left to measure.
    """
    sample_rate, num_samples = model.config.sample_rate, round(config.crop_s * model.config.sample_rate)
    crops = [
        batch["waveform"][0]
        for batch in evaluation_crops(recordings, num_samples, 1)
        if batch["num_samples"][0] > num_samples // 2 and batch["waveform"].any(axis=1).all()
    ]
    if not crops:
        raise ValueError(f"no held-out crop of {config.crop_s} s; hold longer recordings out, or shorten crop_s")
    crops = crops[:: -(-len(crops) // config.max_crops)]
    crops += [crops[0]] * (-len(crops) % config.batch_size)
    index, count = sharding.process_shard(mesh, rules)
    rows = config.batch_size // count
    starts = range(index * rows, len(crops), config.batch_size)
    batches = [{"waveform": np.stack(crops[start : start + rows])} for start in starts]

    @jax.jit
    def measure(params, batch, num_levels):
        waveform = batch["waveform"]
        reconstruction, _ = model.apply({"params": params}, waveform, jnp.full(len(waveform), num_levels, jnp.int32))
        pair = [jnp.swapaxes(x, 1, 2).reshape(-1, num_samples) for x in (reconstruction, waveform)]
        return {
            "si_snr": jnp.sum(jnp.clip(jnp.nan_to_num(si_snr(*pair), nan=-50.0), -50.0, 100.0)),
            "mel_distance": jnp.sum(multi_scale_mel_distance(*pair, sample_rate=sample_rate)),
            "weight": jnp.float32(len(pair[0])),
        }

    def evaluate(params: Any) -> dict[str, float]:
        measures = {}
        for levels in config.num_codebooks:
            put = (sharding.shard_batch(batch, mesh, rules) for batch in batches)
            means = mean_metrics(measure(params, batch, jnp.int32(levels)) for batch in put)
            rate = f"{kbps(model.config, levels):g}"
            measures |= {f"{name}/{rate}": means[name] for name in ("si_snr", "mel_distance")}
        distances = [value for name, value in measures.items() if name.startswith("mel_distance")]
        return {"loss": sum(distances) / len(distances)} | measures

    return evaluate


def make_batches(
    config: Any, recordings: Sequence[Recording], mesh: Mesh, rules: sharding.Rules, **options: Any
) -> Any:
    """`crop_batches` of this process by the config's crop, sources, batch_size and seed.

    Raises:
      ValueError: a batch that the processes cannot share.
    """
    index, count = sharding.process_shard(mesh, rules)
    if config.batch_size % count:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {count} processes that read data")
    return crop_batches(
        recordings,
        config.crop,
        batch_size=config.batch_size // count,
        seed=config.seed,
        sources=config.sources,
        process_index=index,
        process_count=count,
        **options,
    )


def train(
    config: Any,
    workdir: pathlib.Path,
    state: AdversarialState,
    train_step: Callable[..., Any],
    batches: Any,
    key: jax.Array,
    evaluate: Callable[[Any], Mapping[str, float]],
    mesh: Mesh,
    rules: sharding.Rules,
) -> tuple[Any, int] | None:
    """From the newest checkpoint, or from `state`, to the config's num_steps.

    Returns:
      The parameters with the least held-out loss, on the host, and their step; None where an earlier start of the same
      run has written its page.
    """
    if jax.process_index() == 0:
        sizes = f"{num_parameters(state.params):,} parameters, {num_parameters(state.disc_params):,} of discriminators"
        print(f"{sizes}, on {mesh.size} {mesh.devices.flat[0].platform} devices")
    checkpoints = Checkpointer(workdir / "checkpoints", config=config_lib.to_dict(config))
    with sharding.use(mesh, rules), checkpoints, MetricsWriter(workdir, checkpoints.latest_step or 0) as writer:
        if checkpoints.latest_step == config.num_steps and (workdir / "report.html").exists():
            print(f"complete: open {workdir / 'report.html'}; another --workdir starts a new run")
            return None
        state = train_loop(
            state,
            train_step,
            batches,
            key,
            num_steps=config.num_steps,
            workdir=workdir,
            checkpointer=checkpoints,
            writer=writer,
            put=functools.partial(sharding.shard_batch, mesh=mesh, rules=rules),
            evaluate=lambda state: evaluate(state.eval_params),
            log_every=config.log_every,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
        )
        best = checkpoints.best_step
        return jax.device_get(checkpoints.restore(state, step=best).eval_params), best
