"""The state of a training run, born sharded: no device ever holds more than its share."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from jaxaudio import sharding

InitParams = Callable[[jax.Array], Any]


class TrainState(struct.PyTreeNode):
    """What one update reads and writes; a tree of arrays, or of their shapes or shardings.

    step: () int32, the number of updates done.
    params: the model's parameters, without boxes.
    opt_state: the optimizer's state; its moments are sharded like the parameters.
    ema_params: exponential moving average of params, or None.
    """

    step: Any
    params: Any
    opt_state: Any
    ema_params: Any = None

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and sample with: the average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def init_state(
    init_params: InitParams,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    rules: sharding.Rules,
    *,
    ema: bool = False,
) -> tuple[TrainState, TrainState]:
    """A new state, and the tree of its shardings; the same numbers on every mesh.

    Args:
      init_params: from a key to parameters with logical axes, `lambda key: model.init(key, inputs)["params"]`.
      optimizer: from `make_optimizer`, or any of optax.
      key: for init_params.
      mesh: from `sharding.make_mesh`.
      rules: one of the tables of `sharding`.
      ema: whether to keep an average of the parameters; it starts equal to them.
    Raises:
      ShardingError: as `sharding.tree_shardings`, with the path of the parameter.
    """
    return init_sharded(_builder(init_params, optimizer, ema), key, mesh, rules)


def init_sharded(build: InitParams, key: jax.Array, mesh: Mesh, rules: sharding.Rules) -> tuple[Any, Any]:
    """Any state made from a key, computed where it will live, and the tree of its shardings.

    Args:
      build: from a key to a tree whose parameters are boxed with their logical axes.
      key: for build.
      mesh: from `sharding.make_mesh`.
      rules: one of the tables of `sharding`.
    Raises:
      ShardingError: as `sharding.tree_shardings`, with the path of the parameter.
    """
    with sharding.use(mesh, rules):
        shardings = sharding.tree_shardings(jax.eval_shape(build, key), mesh, rules)
        state = jax.jit(lambda key: nn.meta.unbox(build(key)), out_shardings=shardings)(key)
    return state, shardings


def abstract_state(
    init_params: InitParams,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: sharding.Rules,
    *,
    ema: bool = False,
) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`'s result, without computing it: what a checkpoint restores into.

    Raises:
      ShardingError: as `init_state`.
    """
    build = _builder(init_params, optimizer, ema)
    with sharding.use(mesh, rules):
        boxed = jax.eval_shape(lambda: build(jax.random.key(0)))
    shardings = sharding.tree_shardings(boxed, mesh, rules)
    return jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), nn.meta.unbox(boxed), shardings
    )


def num_parameters(params: Any) -> int:
    """The number of scalars in a tree of arrays, abstract or not."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _builder(init_params: InitParams, optimizer: optax.GradientTransformation, ema: bool) -> InitParams:
    def build(key: jax.Array) -> TrainState:
        params = init_params(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),  # keeps the boxes, so that moments are sharded like their parameters
            ema_params=params if ema else None,
        )

    return build
