import types
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxaudio import sharding
from jaxaudio.sharding import DATA, FSDP, TABLES, TENSOR, ShardingError


def boxed(names, shape):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_tables_write_every_name():
    names = [
        "layers",
        "embed",
        "heads",
        "kv_heads",
        "head_dim",
        "mlp",
        "vocab",
        "relative",
        "position",
        "conv",
        "codebook",
        "codebook_dim",
    ]
    names += [
        "act_batch",
        "act_length",
        "act_embed",
        "act_heads",
        "act_kv_heads",
        "act_head_dim",
        "act_mlp",
        "act_vocab",
    ]
    assert list(TABLES) == ["DATA", "FSDP", "TENSOR"]
    for table in TABLES.values():
        assert sorted(table) == sorted(names)
        assert table["act_batch"] == ("data", "fsdp")
    split = {name: axes for name, axes in TENSOR.items() if axes is not None and name != "act_batch"}
    assert split.pop("embed") == "fsdp"
    assert split == dict.fromkeys(
        ["heads", "kv_heads", "mlp", "vocab", "act_heads", "act_kv_heads", "act_mlp", "act_vocab"], "model"
    )
    assert {name for name, axes in FSDP.items() if axes} == {"embed", "act_batch"}
    assert {name for name, axes in DATA.items() if axes} == {"act_batch"}
    with pytest.raises(TypeError):
        TENSOR["vocab"] = None


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("data:2,fsdp:2,model:2", (2, 2, 2)),
        ("model:2,data:4", (4, 1, 2)),
        ("data:-1", (8, 1, 1)),
        ("fsdp:-1, model:4", (1, 2, 4)),
        ("data:8,model:-1", (8, 1, 1)),
    ],
)
def test_make_mesh(spec, shape):
    mesh = sharding.make_mesh(spec)
    assert mesh.axis_names == ("data", "fsdp", "model")
    assert mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert set(mesh.devices.flat) == set(jax.devices())


def test_make_mesh_of_given_devices():
    assert sharding.make_mesh("data:3", jax.devices()[:3]).devices.tolist() == [[[d]] for d in jax.devices()[:3]]
    assert sharding.make_mesh("data:-1", jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data:3", "mesh 'data:3' needs 3 devices, 8 present"),
        ("data:16", "mesh 'data:16' needs 16 devices, 8 present"),
        ("data:-1,model:3", "needs a multiple of 3 devices, 8 present"),
        ("batch:8", "unknown axis 'batch'; axes: data, fsdp, model"),
        ("", "unknown axis ''"),
        ("data:4,data:2", "axis 'data' is given twice"),
        ("data", "size of 'data' must be a positive integer or -1, got ''"),
        ("data:0", "got '0'"),
        ("data:two", "got 'two'"),
        ("data:-1,fsdp:-1", "only one size may be -1, got 2"),
    ],
)
def test_make_mesh_errors(spec, message):
    with pytest.raises(ShardingError, match=message):
        sharding.make_mesh(spec)


def test_constraints_reach_the_program_only_inside_use():
    def constrained(x):
        return nn.with_logical_constraint(x, ("act_batch", "act_mlp"))

    def count():
        return str(jax.make_jaxpr(constrained)(jnp.ones((4, 4)))).count("sharding_constraint")

    assert count() == 0
    with sharding.use(sharding.make_mesh("data:2,fsdp:2,model:2"), TENSOR):
        assert count() == 1
        assert jax.jit(constrained)(jnp.ones((4, 4))).sharding.spec == PartitionSpec(("data", "fsdp"), "model")
    assert count() == 0


def test_tree_shardings():
    mesh = sharding.make_mesh("data:2,fsdp:2,model:2")
    tree = {
        "kernel": boxed(("layers", "embed", "heads", "head_dim"), (3, 4, 2, 5)),
        "scale": boxed(("embed",), (4,)),
        "unnamed": boxed((None, "mlp"), (7, 4)),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.tree_shardings(tree, mesh, TENSOR))
    assert specs == {
        "kernel": PartitionSpec(None, "fsdp", "model", None),
        "scale": PartitionSpec("fsdp"),
        "unnamed": PartitionSpec(None, "model"),
        "count": PartitionSpec(),
    }
    replicated = jax.tree.leaves(sharding.tree_shardings(tree, mesh, DATA))
    assert all(leaf.is_fully_replicated for leaf in replicated)
    # A table is changed by |, for instance for Whisper's odd vocabulary.
    odd = {"embedding": boxed(("vocab", "embed"), (51865, 4))}
    assert sharding.tree_shardings(odd, mesh, TENSOR | {"vocab": None})["embedding"].spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("names", "shape", "rules", "message"),
    [
        (("embed", "width"), (4, 4), FSDP, r"params/block/kernel: unknown logical axis 'width' in .* known: layers, "),
        (
            ("embed", "embed"),
            (4, 4),
            FSDP,
            r"params/block/kernel: mesh axis 'fsdp' would split both 'embed' and 'embed'",
        ),
        (
            ("heads", "mlp"),
            (4, 4),
            TENSOR,
            r"params/block/kernel: mesh axis 'model' would split both 'heads' and 'mlp'",
        ),
        (("vocab", "embed"), (51865, 4), TENSOR, r"params/block/kernel: axis 'vocab' of size 51865 .* by 2, .* model"),
        (("embed",), (4, 4), DATA, r"params/block/kernel: 1 logical names \('embed',\) for shape \(4, 4\)"),
        (
            ("embed", None),
            (4, 4),
            FSDP | {"embed": "row"},
            r"params/block/kernel: the table maps 'embed' to 'row'; mesh",
        ),
    ],
)
def test_tree_shardings_errors_name_the_parameter(names, shape, rules, message):
    mesh = sharding.make_mesh("data:2,fsdp:2,model:2")
    with pytest.raises(ShardingError, match=message):
        sharding.tree_shardings({"params": {"block": {"kernel": boxed(names, shape)}}}, mesh, rules)


@pytest.mark.parametrize(("spec", "rows"), [("data:2,fsdp:2,model:2", 2), ("data:8", 1), ("model:8", 8)])
def test_shard_batch_splits_rows(spec, rows):
    mesh = sharding.make_mesh(spec)
    batch = {"inputs": np.arange(24).reshape(8, 3), "weight": np.arange(8.0, dtype=np.float32)}
    arrays = sharding.shard_batch(batch, mesh, TENSOR)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding == sharding.batch_sharding(mesh, TENSOR)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {rows}
    assert sharding.process_shard(mesh, TENSOR) == (0, 1)


class Device(NamedTuple):
    id: int
    process_index: int


@pytest.mark.parametrize(
    ("rows_of_processes", "process", "expected"),
    [
        ([(0, 1), (2, 3)], 1, (1, 2)),
        ([(2, 3), (0, 1)], 1, (0, 2)),
        ([(0, 1), (2, 3), (0, 1), (2, 3)], 3, (1, 2)),
        ([(0, 1, 2, 3), (0, 1, 2, 3)], 1, (0, 1)),
        ([(0, 1), (1, 2), (3,)], 0, r"\(0, 1\) and \(1, 2\); reorder the mesh"),
        ([(0, 3), (1,), (2, 3)], 0, r"\(0, 3\) and \(2, 3\); reorder the mesh"),
    ],
)
def test_a_process_gets_its_share_of_the_batch(monkeypatch, rows_of_processes, process, expected):
    devices = [(process, row) for process, rows in enumerate(rows_of_processes) for row in rows]
    indices = {Device(i, process): (slice(row, row + 1),) for i, (process, row) in enumerate(devices)}
    layout = types.SimpleNamespace(devices_indices_map=lambda shape: indices)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh, rules: layout)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    mesh = sharding.make_mesh("data:4,model:2")
    if isinstance(expected, tuple):
        assert sharding.process_shard(mesh, DATA) == expected
    else:
        with pytest.raises(ShardingError, match=expected):
            sharding.process_shard(mesh, DATA)


def test_shard_batch_errors():
    mesh = sharding.make_mesh("data:2,fsdp:2,model:2")
    with pytest.raises(
        ShardingError, match=r"batch array inputs of shape \(6, 3\): rows must be a multiple of 4, .*'data': 2"
    ):
        sharding.shard_batch({"inputs": np.zeros((6, 3))}, mesh, DATA)
    with pytest.raises(ShardingError, match=r"batch array scale of shape \(\)"):
        sharding.shard_batch({"scale": np.zeros(())}, mesh, DATA)
