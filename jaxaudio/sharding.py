"""Logical axes of parameters and activations, the tables that map them to mesh axes, and the shardings that follow.

A model names the axes of its arrays; a table says over which mesh axes each name is split; the mesh says how many
devices each mesh axis has. One run changes from a laptop to a pod by its mesh and its table alone.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "model")

Rules = Mapping[str, str | tuple[str, ...] | None]

_BATCH = ("data", "fsdp")

# The one legend of logical axes. Parameters and activations have different names: FSDP splits `embed` of every
# parameter and `act_embed` of no activation.
_LEGEND: Mapping[str, tuple] = {
    # name           DATA    FSDP    TENSOR
    "layers":       (None,   None,   None),     # layer of a scanned stack, always axis 0
    "embed":        (None,   "fsdp", "fsdp"),   # D, the model's width
    "heads":        (None,   None,   "model"),  # N, attention heads of the queries
    "kv_heads":     (None,   None,   "model"),  # K, attention heads of keys and values
    "head_dim":     (None,   None,   None),     # H, width of one head
    "mlp":          (None,   None,   "model"),  # F, hidden width of the MLP
    "vocab":        (None,   None,   "model"),  # V, token ids
    "relative":     (None,   None,   None),     # rows of a table indexed by distance, interval or bucket
    "position":     (None,   None,   None),     # rows of a table indexed by absolute position or by voice
    "conv":         (None,   None,   None),     # any axis of a convolution kernel
    "codebook":     (None,   None,   None),     # Q or C, the codebook or the code within it
    "codebook_dim": (None,   None,   None),     # E, width of one code vector
    "act_batch":    (_BATCH, _BATCH, _BATCH),   # B, dimension 0 of every batch array and activation
    "act_length":   (None,   None,   None),     # T or S
    "act_embed":    (None,   None,   None),     # D
    "act_heads":    (None,   None,   "model"),  # N
    "act_kv_heads": (None,   None,   "model"),  # K
    "act_head_dim": (None,   None,   None),     # H
    "act_mlp":      (None,   None,   "model"),  # F
    "act_vocab":    (None,   None,   "model"),  # V
}  # fmt: skip

DATA: Rules = MappingProxyType({name: axes[0] for name, axes in _LEGEND.items()})
"""Data parallel: every device holds all parameters, the batch is split."""
FSDP: Rules = MappingProxyType({name: axes[1] for name, axes in _LEGEND.items()})
"""Fully sharded data parallel: parameters and optimizer state are split over `fsdp` too, gathered where used."""
TENSOR: Rules = MappingProxyType({name: axes[2] for name, axes in _LEGEND.items()})
"""Tensor parallel: heads, MLP and vocabulary are split over `model`, on top of FSDP."""
TABLES: Mapping[str, Rules] = MappingProxyType({"DATA": DATA, "FSDP": FSDP, "TENSOR": TENSOR})


class ShardingError(ValueError):
    """A mesh that does not fit its devices, or an array that does not fit its mesh; the message names the array."""


def split_cpu(num_devices: int) -> None:
    """Presents this machine's CPU as several devices; call it before the first JAX operation. No other backend changes.

    XLA runs small operations on one core, so two devices that share a batch keep two cores busy where one device
    cannot: a training step of a small Transformer takes about half the time.
    """
    jax.config.update("jax_num_cpu_devices", num_devices)
    # With programs in flight behind each other, collectives of simulated devices wait for threads that wait for them.
    jax.config.update("jax_cpu_enable_async_dispatch", num_devices == 1)


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes ("data", "fsdp", "model") that `spec` describes, over all devices of all processes.

    Args:
      spec: sizes such as "data:2,fsdp:2,model:2"; an axis that is not named has size 1, and one size may be -1, which
        takes the remaining devices: "data:-1", "fsdp:-1,model:4".
      devices: the devices to use, `jax.devices()` when None. All of them are used.
    Raises:
      ShardingError: a malformed spec, an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        axis, _, size = part.strip().partition(":")
        if axis not in MESH_AXES:
            raise ShardingError(f"mesh {spec!r}: unknown axis {axis!r}; axes: {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ShardingError(f"mesh {spec!r}: axis {axis!r} is given twice")
        if not (size == "-1" or (size.isdecimal() and int(size) > 0)):
            raise ShardingError(f"mesh {spec!r}: size of {axis!r} must be a positive integer or -1, got {size!r}")
        sizes[axis] = int(size)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ShardingError(f"mesh {spec!r}: only one size may be -1, got {len(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    elif free or fixed != len(devices):
        need = f"a multiple of {fixed}" if free else str(fixed)
        raise ShardingError(
            f"mesh {spec!r} needs {need} devices, {len(devices)} present; change the sizes, or write -1 for one of them"
        )
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    # jax.make_mesh alone defaults to Explicit axes, on which Linen's constraints fail.
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Within it, `nn.with_logical_constraint` splits activations over `mesh` as `rules` says.

    It enters `jax.set_mesh`: under `with mesh:` Linen's constraints silently do nothing.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.items())):
        yield


def tree_shardings(boxed_abstract_tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of every array of a tree whose parameters carry logical names.

    Args:
      boxed_abstract_tree: what `jax.eval_shape` gives for a function returning Linen parameters as `init` leaves them
        (in `nn.LogicallyPartitioned` boxes), alone or inside an optimizer's or a train state. An array without a box (a
        step counter) is replicated.
      mesh: from `make_mesh`.
      rules: one of the tables, or a changed copy such as `TENSOR | {"vocab": None}`.
    Returns:
      The tree without boxes, a NamedSharding for each array.
    Raises:
      ShardingError: with the parameter's path, when a logical name is unknown, when names and dimensions differ in
        number, when one mesh axis would split two dimensions, or when a size is not divisible by its number of shards.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return replicated(mesh)
        return _array_sharding(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, mesh, rules)

    return jax.tree_util.tree_map_with_path(
        sharding, boxed_abstract_tree, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """The sharding of batch arrays: dimension 0 as `act_batch`, the others whole."""
    return NamedSharding(mesh, PartitionSpec(rules["act_batch"]))


def process_shard(mesh: Mesh, rules: Rules) -> tuple[int, int]:
    """(index, count): this process loads the index-th of count equal shares of every global batch.

    Processes whose devices hold the same rows (a `model` axis across hosts) get the same index, hence the same data.

    Raises:
      ShardingError: the shares of two processes overlap without being equal; the message gives both.
    """
    rows: dict[int, set[int]] = {}
    for device, (index,) in batch_sharding(mesh, rules).devices_indices_map((_num_batch_shards(mesh, rules),)).items():
        rows.setdefault(device.process_index, set()).add(index.start or 0)
    shares = sorted({tuple(sorted(share)) for share in rows.values()})
    owners: dict[int, tuple[int, ...]] = {}
    for share in shares:
        for row in share:
            other = owners.setdefault(row, share)
            if other != share:
                raise ShardingError(
                    f"processes hold overlapping shards of the batch, {other} and {share}; reorder the mesh"
                )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def shard_batch(batch: Any, mesh: Mesh, rules: Rules) -> Any:
    """Global arrays, split over the mesh, from the numpy arrays that this process loaded.

    Args:
      batch: tree of numpy arrays with this process's rows (`process_shard`) in dimension 0; of one process, all rows.
      mesh: from `make_mesh`.
      rules: the table whose `act_batch` splits dimension 0.
    Raises:
      ShardingError: the number of rows is not divisible by the number of batch shards on this process's devices.
    """
    target = batch_sharding(mesh, rules)
    count = process_shard(mesh, rules)[1]
    num_local = _num_batch_shards(mesh, rules) // count

    def to_global(path: tuple, array: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if array.ndim == 0 or array.shape[0] % num_local:
            raise ShardingError(
                f"batch array {name} of shape {array.shape}: rows must"
                f" be a multiple of {num_local}, the batch shards of this process (mesh {dict(mesh.shape)})"
            )
        return jax.make_array_from_process_local_data(target, array, (array.shape[0] * count, *array.shape[1:]))

    return jax.tree_util.tree_map_with_path(to_global, batch)


def _num_batch_shards(mesh: Mesh, rules: Rules) -> int:
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(rules["act_batch"]))


def _array_sharding(path: str, box: nn.Partitioned, mesh: Mesh, rules: Rules) -> NamedSharding:
    shape, names = box.value.shape, box.names
    if len(names) != len(shape):
        raise ShardingError(f"{path}: {len(names)} logical names {names} for shape {shape}")
    used: dict[str, str] = {}
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise ShardingError(f"{path}: unknown logical axis {name!r} in {names}; known: {', '.join(rules)}")
        axes = _mesh_axes(None if name is None else rules[name])
        for axis in axes:
            if axis not in mesh.shape:
                raise ShardingError(f"{path}: the table maps {name!r} to {axis!r}; mesh axes: {', '.join(mesh.shape)}")
            if axis in used:
                raise ShardingError(
                    f"{path}: mesh axis {axis!r} would split both {used[axis]!r} and {name!r} of {names}"
                )
            used[axis] = name
        num_shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % num_shards:
            raise ShardingError(
                f"{path}: axis {name!r} of size {size} is not divisible by {num_shards}, the size of mesh axes"
                f" {', '.join(axes)}; change the mesh, or map {name!r} to None"
            )
    return NamedSharding(mesh, PartitionSpec(*(name and rules[name] for name in names)))


def _mesh_axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if rule is None:
        return ()
    return (rule,) if isinstance(rule, str) else tuple(rule)
