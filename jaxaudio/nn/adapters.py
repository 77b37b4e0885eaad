"""LoRA: low-rank changes of a frozen model's kernels, trained in their place.

Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685, section 4.1: W x + (alpha / r) B A x. Here both factors live in
a tree of their own and are added to the kernels before the model runs, so that no model knows of them.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Leading axes of a projection's kernel that are its inputs, by the projection's name; "out" joins heads.
INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels get a low-rank change.

    Attributes:
      rank: r.
      alpha: the change is scaled by alpha / r.
      targets: names of projections, of all stacks; the paper takes query and value.

    Raises:
      ValueError: a rank below 1, or a projection that does not exist; with the value.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        unknown = [name for name in self.targets if name not in INPUT_AXES]
        if unknown or not self.targets:
            raise ValueError(f"targets {self.targets}: expected some of {', '.join(INPUT_AXES)}")


def init_lora(key: jax.Array, params: Any, config: LoraConfig) -> dict[str, Any]:
    """New factors: a normal with deviation fan-in ** -0.5, b zero, so that the model starts as it is.

    Args:
      key: consumed here.
      params: the model's, boxed as `init` leaves them or not; boxes pass their logical axes on.
      config: targets and rank.
    Returns:
      The tree {..."query": {"a": (*layers, *inputs, r), "b": (*layers, r, *outputs)}} of the targets alone.
    Raises:
      ValueError: no kernel has the name of a target; with the names.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    kernels = {tuple(entry.key for entry in path): leaf for path, leaf in leaves}
    kernels = {path: leaf for path, leaf in kernels.items() if path[-1] == "kernel" and path[-2] in config.targets}
    missing = set(config.targets) - {path[-2] for path in kernels}
    if missing:
        raise ValueError(f"no kernel is named {', '.join(sorted(missing))}; targets are {', '.join(config.targets)}")
    tree: dict[str, Any] = {}
    for (path, leaf), one in zip(kernels.items(), jax.random.split(key, len(kernels)), strict=True):
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node |= _factors(one, leaf, path, config.rank)
    return tree


def merge_lora(params: Any, lora: Any, config: LoraConfig) -> Any:
    """The model's parameters with the change in them: W + (alpha / r) a b; what has no factors is passed on.

    Args:
      params: of the model, without boxes.
      lora: from `init_lora`, without boxes.
      config: of that call.
    Raises:
      ValueError: factors for something that the model does not have; with its name.
    """
    if "a" in lora:
        kernel = params["kernel"]
        a, b = lora["a"], lora["b"]
        layers, rank = math.prod(kernel.shape[: _num_layer_axes(a, b, kernel)]), config.rank
        change = jnp.matmul(a.reshape(layers, -1, rank), b.reshape(layers, rank, -1))
        return params | {"kernel": kernel + (config.alpha / rank) * change.reshape(kernel.shape)}
    unknown = sorted(lora.keys() - params.keys())
    if unknown:
        raise ValueError(f"factors for {', '.join(unknown)}, which the model does not have")
    return params | {name: merge_lora(params[name], below, config) for name, below in lora.items()}


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _num_layer_axes(a: jax.Array, b: jax.Array, kernel: jax.Array) -> int:
    """Leading axes that a, b and the kernel share: a and b have one axis, r, beyond their parts of the kernel."""
    return a.ndim + b.ndim - 2 - kernel.ndim


def _factors(key: jax.Array, leaf: Any, path: tuple[str, ...], rank: int) -> dict[str, Any]:
    kernel = nn.meta.unbox(leaf)
    num_layers = path.count("layers")  # stacked layers are the first axis
    split = num_layers + INPUT_AXES[path[-2]]
    shape_a, shape_b = (*kernel.shape[:split], rank), (*kernel.shape[:num_layers], rank, *kernel.shape[split:])
    deviation = math.prod(kernel.shape[num_layers:split]) ** -0.5
    a, b = deviation * jax.random.normal(key, shape_a), jnp.zeros(shape_b)
    if not _is_box(leaf):
        return {"a": a, "b": b}
    names = leaf.names
    return {
        "a": leaf.replace(value=a, names=(*names[:split], None)),
        "b": leaf.replace(value=b, names=(*names[:num_layers], None, *names[split:])),
    }
