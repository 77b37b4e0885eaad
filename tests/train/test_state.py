import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model as toy
from jax.sharding import PartitionSpec

from jaxaudio import sharding
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer
from jaxaudio.train.state import abstract_state, init_state, num_parameters

OPTIMIZER = make_optimizer(OptimizerConfig())


def test_state_is_born_sharded_and_equal_on_every_mesh():
    mesh = sharding.make_mesh("data:2,fsdp:2,model:2")
    state, shardings = init_state(toy.init_params, OPTIMIZER, jax.random.key(0), mesh, sharding.TENSOR, ema=True)
    assert state.params["up"]["kernel"].sharding.spec == PartitionSpec("fsdp", "model")
    assert state.params["up"]["kernel"].addressable_shards[0].data.shape == (toy.EMBED // 2, toy.MLP // 2)
    specs = jax.tree.map(lambda x: x.sharding.spec, state.params)
    adam = state.opt_state[1]
    for like_params in (adam.mu, adam.nu, state.ema_params):
        assert jax.tree.map(lambda x: x.sharding.spec, like_params) == specs
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)

    alone = nn.meta.unbox(toy.init_params(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, state.params, alone)
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, alone)
    assert state.eval_params is state.ema_params


def test_abstract_state_describes_the_state():
    mesh = sharding.make_mesh("fsdp:-1")
    for ema in (False, True):
        state, _ = init_state(toy.init_params, OPTIMIZER, jax.random.key(0), mesh, sharding.FSDP, ema=ema)
        abstract = abstract_state(toy.init_params, OPTIMIZER, mesh, sharding.FSDP, ema=ema)
        assert abstract == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    assert (state.replace(ema_params=None).eval_params) is state.params


def test_num_parameters_by_hand():
    expected = 16 * 8 + (8 * 32 + 32) + 32 * 16
    assert num_parameters(jax.eval_shape(toy.init_params, jax.random.key(0))) == expected


def test_errors_name_the_parameter():
    mesh = sharding.make_mesh("model:8")
    rules = sharding.TENSOR | {"embed": "model"}
    with pytest.raises(sharding.ShardingError, match="params/Embed_0/embedding: mesh axis 'model' would split both"):
        init_state(toy.init_params, OPTIMIZER, jax.random.key(0), mesh, rules)
