"""One process of a two-process run with two devices each: `two_processes.py ADDRESS PROCESS`; prints its results."""

import json
import sys

import jax
import numpy as np
import toy_model as toy

from jaxaudio import sharding
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer
from jaxaudio.train.state import init_state
from jaxaudio.train.step import make_train_step

jax.config.update("jax_cpu_enable_async_dispatch", False)  # simulated devices may deadlock otherwise
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2))
results = {}
# Two processes of two devices: the batch is split over processes, then both processes hold all of it.
for spec in ("data:2,fsdp:2", "model:4"):
    mesh = sharding.make_mesh(spec)
    index, count = sharding.process_shard(mesh, sharding.TENSOR)
    state, shardings = init_state(toy.init_params, optimizer, jax.random.key(0), mesh, sharding.TENSOR)
    step = make_train_step(
        toy.make_loss(),
        optimizer,
        shardings=shardings,
        batch_sharding=sharding.batch_sharding(mesh, sharding.TENSOR),
        accumulate_steps=2,
    )
    losses = []
    with sharding.use(mesh, sharding.TENSOR):
        for seed in range(3):
            rows = {name: np.split(array, count)[index] for name, array in toy.make_batch(seed).items()}
            batch = sharding.shard_batch(rows, mesh, sharding.TENSOR)
            state, metrics = step(state, batch, jax.random.key(7))
            losses.append(float(metrics["loss"]))
    results[spec] = {"shard": [index, count], "losses": losses}
print(json.dumps(results))
jax.distributed.shutdown()
