"""Training steps of the Music Transformer against a PyTorch one, and cached decoding against none.

Paper: Huang et al. 2018, Music Transformer, https://arxiv.org/abs/1809.04281, section 3.4 and Table 2
Run:   python -m experiments.benchmarks.music_transformer [--sizes small,paper] [--steps 10]

Training: forward, backward, Adam and every dropout of tensor2tensor's config, on the same batch and cores, in one
interleaved run; on CPU our batch is shared by one device a core, as the experiments do. The peer is written as one
writes PyTorch: eager, fused projections and optimizer, the paper's skew with as few passes as autograd allows. First
both get the same parameters and must agree on logits, loss and gradient norm, or nothing is timed. Dropout masks come
from the "hash" or the "jax" generator in our rows (`ops.dropout`), from `F.dropout` in the peer's.

The fraction of peak is model FLOPs (`step_flops`: what the mathematics needs, pairs of the past alone) over time, as
a share of the fastest float32 matrix product that either library reaches in the same run.

Decoding: greedy, one row, from nothing to the full context, through `generate` with its cache; against the forward
pass over the whole context for each token, of which a few positions are timed, since each costs the same.
"""

import argparse
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from experiments.benchmarks.timing import Timing, interleaved, table
from experiments.benchmarks.torch_music_transformer import TorchMusicTransformer
from experiments.music_transformer_jsb import ROWS
from jaxaudio import sharding
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.generate.autoregressive import generate
from jaxaudio.models.music_transformer import MusicTransformer, MusicTransformerConfig, init_cache
from jaxaudio.ops.losses import cross_entropy
from jaxaudio.ops.sampling import make_sampling
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer
from jaxaudio.train.state import init_state, num_parameters
from jaxaudio.train.step import make_train_step

LEARNING_RATE = 1e-4
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Size:
    """What is timed: a model, tokens a row and rows of a training step, and the context that is decoded."""

    model: MusicTransformerConfig
    length: int
    batch_size: int
    context: int = 1024


SIZES = {
    "small": Size(ROWS["small"].model, length=512, batch_size=8),
    "paper": Size(ROWS["relative"].model, length=1024, batch_size=2),
}


def with_dropout(config: MusicTransformerConfig, rate: float, generator: str = "hash") -> MusicTransformerConfig:
    """The config with one rate for every dropout, and the block that is fastest on a CPU."""
    transformer = dataclasses.replace(
        config.transformer,
        block_size=64 if jax.default_backend() == "cpu" else config.transformer.block_size,
        dropout_rate=rate,
        attention_dropout_rate=rate,
        mlp_dropout_rate=rate,
        dropout_generator=generator,
    )
    return dataclasses.replace(config, transformer=transformer)


def make_batch(size: Size) -> dict[str, np.ndarray]:
    """Random tokens, each row shifted as the data pipeline does."""
    targets = np.random.default_rng(0).integers(1, size.model.vocab_size, (size.batch_size, size.length), np.int32)
    inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {"inputs": inputs, "targets": targets, "mask": np.ones_like(targets, bool)}


def random_params(config: MusicTransformerConfig) -> Any:
    """Initial parameters plus noise, so that no bias is zero and no scale one: a swap of two would be seen."""
    model = MusicTransformer(config)
    init = jax.jit(lambda key: nn.meta.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32), init(jax.random.key(0))
    )


class Outputs(NamedTuple):
    """What a model gives for a batch without dropout: logits (B, T, V), mean loss, norm of all gradients."""

    logits: np.ndarray
    loss: float
    gradient_norm: float


def our_outputs(model: MusicTransformer, params: Any, batch: Mapping[str, np.ndarray]) -> Outputs:
    """Of our model."""

    def mean_loss(params, batch):
        logits, _ = model.apply({"params": params}, batch["inputs"])
        nats, weight = cross_entropy(logits, batch["targets"], batch["mask"])
        return nats / weight, logits

    with jax.default_matmul_precision("float32"):
        (loss, logits), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params, batch)
    norm = math.sqrt(sum(float(jnp.sum(grad**2)) for grad in jax.tree.leaves(grads)))
    return Outputs(np.asarray(logits), float(loss), norm)


def torch_outputs(peer: TorchMusicTransformer, batch: Mapping[str, np.ndarray]) -> Outputs:
    """Of the peer."""
    peer.eval()
    peer.zero_grad(set_to_none=True)
    inputs, targets = _torch_arrays(peer, batch)
    logits = peer(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in peer.parameters()))
    return Outputs(logits.detach().cpu().numpy(), loss.item(), norm)


def require_same(ours: Outputs, theirs: Outputs) -> float:
    """The largest difference between the logits.

    Raises:
      ValueError: logits or loss differ by more than 1e-4, or the gradient norms by that part of ours; or one is NaN.
    """
    differences = {
        "logits": float(np.abs(ours.logits - theirs.logits).max()),
        "loss": abs(ours.loss - theirs.loss),
        "gradient norm": abs(ours.gradient_norm - theirs.gradient_norm) / ours.gradient_norm,
    }
    if not all(difference <= TOLERANCE for difference in differences.values()):
        found = ", ".join(f"{name} by {difference:.2e}" for name, difference in differences.items())
        raise ValueError(f"the models differ, {found}; at most {TOLERANCE} is allowed, so nothing is timed")
    return differences["logits"]


def _torch_arrays(peer: TorchMusicTransformer, batch: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(batch[name]).long().to(peer.device) for name in ("inputs", "targets")]


def our_step(
    size: Size, rate: float, generator: str, batch: Mapping[str, np.ndarray], devices: Sequence[jax.Device]
) -> Callable:
    """A call is one training step of our model."""
    mesh, rules = sharding.make_mesh("data:-1", devices), sharding.DATA
    model = MusicTransformer(with_dropout(size.model, rate, generator))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE))
    init_key, dropout_key = jax.random.split(jax.random.key(0))

    def init_params(key):
        return model.init(key, jnp.zeros((1, size.length), jnp.int32))["params"]

    def loss_fn(params, batch, key):
        logits, _ = model.apply({"params": params}, batch["inputs"], deterministic=False, rngs={"dropout": key})
        nats, weight = cross_entropy(logits, batch["targets"], batch["mask"])
        return nats, {"weight": weight}

    state, shardings = init_state(init_params, optimizer, init_key, mesh, rules)
    batch_sharding = sharding.batch_sharding(mesh, rules)
    train_step = make_train_step(loss_fn, optimizer, shardings=shardings, batch_sharding=batch_sharding)
    batch = sharding.shard_batch(dict(batch), mesh, rules)

    def step():
        nonlocal state
        with sharding.use(mesh, rules):
            state, _ = train_step(state, batch, dropout_key)
        jax.block_until_ready(state)

    return step


def torch_step(peer: TorchMusicTransformer, batch: Mapping[str, np.ndarray]) -> Callable:
    """A call is one training step of the peer."""
    peer.train()
    optimizer = torch.optim.Adam(peer.parameters(), lr=LEARNING_RATE, fused=True)  # 3 times as fast as foreach on a CPU
    inputs, targets = _torch_arrays(peer, batch)

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(peer(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        if peer.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def step_flops(size: Size) -> int:
    """Floating-point operations of the matrix products of a training step: 3 times the forward pass, no recomputation.

    A query attends to its past alone, and distances of R and more have no relative term; no form needs to compute more.
    """
    model, t, length = size.model, size.model.transformer, size.length
    attended = length * (length + 1) // 2
    near = sum(min(position + 1, t.max_distance) for position in range(length))
    projections = t.embed_dim * t.num_heads * 2 * (t.query_head_dim + t.value_dim)
    per_layer = length * (projections + 2 * t.embed_dim * t.mlp_dim)
    per_layer += t.num_heads * (attended * (t.query_head_dim + t.value_dim) + near * t.query_head_dim)
    ends = t.embed_dim * model.vocab_size
    if model.position_encoding == "concatenated":
        ends += (2 * t.embed_dim + model.label_period) * t.embed_dim
    return 3 * 2 * size.batch_size * (t.num_layers * per_layer + length * ends)


def matmul_peak(devices: Sequence[jax.Device], torch_device: torch.device, side: int, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few products of square float32 matrices, by either library on the given devices."""
    mesh = sharding.make_mesh("data:-1", devices)
    x = np.random.default_rng(0).standard_normal((side * len(devices), side), np.float32)
    rows = jax.device_put(x, sharding.batch_sharding(mesh, sharding.DATA))
    columns = jax.device_put(x[:side], sharding.replicated(mesh))
    product = jax.jit(jnp.matmul)
    torch_rows = torch.from_numpy(x).to(torch_device)

    def torch_product():
        torch_rows @ torch_rows[:side]
        if torch_device.type == "cuda":
            torch.cuda.synchronize()

    calls = {"jax": lambda: jax.block_until_ready(product(rows, columns)), "torch": torch_product}
    seconds = min(timing.min_s for timing in interleaved(calls, repeats).values())
    return 2 * side**3 * len(devices) / seconds


def compare_training(name: str, size: Size, params: Any, arguments: argparse.Namespace) -> dict[str, Timing]:
    """Checks, times and prints the training steps of one size; timings by "ours, GENERATOR" and "torch"."""
    accelerated = jax.default_backend() != "cpu"
    num_shards = max(n for n in range(1, arguments.cores + 1) if size.batch_size % n == 0)
    devices = jax.devices()[: 1 if accelerated else num_shards]
    torch_device = torch.device("cuda" if accelerated and torch.cuda.is_available() else "cpu")
    torch_name = torch.cuda.get_device_name() if torch_device.type == "cuda" else f"cpu, {arguments.cores} threads"
    batch = make_batch(size)

    model = MusicTransformer(with_dropout(size.model, arguments.dropout_rate))
    peer = TorchMusicTransformer(model.config, size.length).load(params).to(torch_device)
    difference = require_same(our_outputs(model, params, batch), torch_outputs(peer, batch))
    print(f"\nTraining, {name}: {num_parameters(params):,} parameters, {size.batch_size} rows of {size.length}")
    print(f"jax {jax.__version__}: {len(devices)} x {devices[0].device_kind}; torch {torch.__version__}: {torch_name}")
    print(f"logits without dropout agree to {difference:.0e}; timed with dropout {arguments.dropout_rate:g}")

    if torch_device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, which is JAX's default there
    peak = matmul_peak(devices, torch_device, arguments.matmul_side)
    steps = {
        f"ours, {generator}": our_step(size, arguments.dropout_rate, generator, batch, devices)
        for generator in arguments.dropout_generators
    } | {"torch": torch_step(peer, batch)}
    timings = interleaved(steps, arguments.steps)
    torch.set_float32_matmul_precision("highest")

    tokens, flops, rows = size.batch_size * size.length, step_flops(size), []
    for row, timing in timings.items():
        cells = [f"{x:.3f}" for x in (timing.min_s, timing.median_s)]
        cells += [f"{timings['torch'].min_s / timing.min_s:.2f}", f"{timings['torch'].median_s / timing.median_s:.2f}"]
        cells += [f"{tokens / timing.median_s:,.0f}", f"{flops / timing.median_s / peak:.0%}", f"{timing.first_s:.1f}"]
        rows.append([row, *cells])
    header = ["step", "min s", "median s", "torch/it min", "median", "tokens/s", "of peak", "first call s"]
    print(table(header, rows))
    print(f"{flops / 1e9:.1f} GFLOP a step, matmul peak {peak / 1e9:.0f} GFLOP/s, {arguments.steps} interleaved steps")
    return timings


def require_greedy(tokens: np.ndarray, logits: Mapping[int, np.ndarray]) -> None:
    """Checks decoded tokens (T,) against the logits (V,) of full passes, by position.

    Raises:
      ValueError: the token there is not the most likely one, to 1e-3 of a logit.
    """
    for position, row in logits.items():
        if not row[tokens[position]] >= row.max() - 1e-3:
            raise ValueError(f"cached decoding chose {tokens[position]} at {position}, a full pass {row.argmax()}")


def compare_decoding(name: str, size: Size, params: Any, arguments: argparse.Namespace) -> tuple[float, float]:
    """Times and prints greedy decoding; (tokens/s with the cache, tokens/s of a full forward pass for each token)."""
    model, context = MusicTransformer(with_dropout(size.model, 0.0)), size.context
    params = jax.device_put(params)
    cache, sampling = functools.partial(init_cache, model.config), make_sampling(1, temperature=0.0)
    full = jax.jit(lambda params, inputs: model.apply({"params": params}, inputs)[0])
    positions = np.linspace(context / 8, context - 1, 8).astype(int)
    prompt, key = np.zeros(0, np.int32), jax.random.key(0)

    def decode():
        return generate(model, params, key, init_cache=cache, prompts=[prompt], length=context, sampling=sampling)

    tokens = decode()
    inputs = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))

    def rerun():
        return [np.asarray(full(params, inputs)[0, position]) for position in positions]

    require_greedy(tokens[0], dict(zip(positions, rerun(), strict=True)))
    timings = interleaved({"cached": decode, "full": rerun}, arguments.decodes)
    cached, rerunning = context / timings["cached"].median_s, len(positions) / timings["full"].median_s
    print(f"\nDecoding, {name}: 1 row of {context} tokens, greedy, one {jax.devices()[0].device_kind} device")
    rows = [["cached", f"{cached:,.1f}"], ["full sequence for each token", f"{rerunning:,.1f}"]]
    print(table(["", "tokens/s"], rows))
    print(f"cached / full: {cached / rerunning:.1f} times (wanted at least 20)")
    return cached, rerunning


def main(arguments: argparse.Namespace, sizes: Mapping[str, Size] = SIZES) -> dict[str, Any]:
    """Runs all comparisons; {"training": {size: timings}, "decoding": {size: tokens/s}}."""
    torch.set_num_threads(arguments.cores)
    results = {"training": {}, "decoding": {}}
    for name in arguments.sizes:
        params = random_params(sizes[name].model)
        results["training"][name] = compare_training(name, sizes[name], params, arguments)
        results["decoding"][name] = compare_decoding(name, sizes[name], params, arguments)
    return results


def parse(argv: Sequence[str] | None = None, sizes: Mapping[str, Size] = SIZES) -> argparse.Namespace:
    """The command line."""

    def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(allowed):
                raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; one of {', '.join(allowed)}")
            return text.split(",")

        return split

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=names(list(sizes)), default=list(sizes), help=f"of {', '.join(sizes)}")
    parser.add_argument("--steps", type=int, default=10, help="timed training steps of each (default 10)")
    parser.add_argument("--decodes", type=int, default=3, help="timed decodings (default 3)")
    parser.add_argument("--dropout_rate", type=float, default=0.1, help="of every dropout (default 0.1)")
    parser.add_argument("--dropout_generators", type=names(["hash", "jax"]), default=["hash", "jax"], help="of ours")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--matmul_side", type=int, default=2048, help="of the matrices that measure the peak")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command_line = parse()
    raise_malloc_thresholds()  # torch gains from it too
    sharding.split_cpu(command_line.cores)
    main(command_line)
