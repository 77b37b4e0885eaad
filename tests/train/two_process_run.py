"""One process of a run of two, as on a pod: `two_process_run.py ADDRESS PROCESS WORKDIR`; prints its results.

Both claim the folder, train and save; then the first one alone exports.
"""

import dataclasses
import functools
import json
import pathlib
import sys

import grain
import jax
import numpy as np
import toy_model as toy

from jaxaudio import config as config_lib
from jaxaudio import sharding
from jaxaudio.convert.export import export_checkpoint
from jaxaudio.train.checkpoint import Checkpointer
from jaxaudio.train.loop import MetricsWriter, train_loop
from jaxaudio.train.optimizer import OptimizerConfig, make_optimizer
from jaxaudio.train.state import init_state
from jaxaudio.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """The run's config."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-2)
    num_steps: int = 4


def main(config: Config, workdir: pathlib.Path) -> None:
    mesh, rules = sharding.make_mesh("data:2,fsdp:2"), sharding.TENSOR
    index, count = sharding.process_shard(mesh, rules)
    state, shardings = init_state(
        toy.init_params, optimizer := make_optimizer(config.optimizer), jax.random.key(0), mesh, rules
    )
    train_step = make_train_step(
        toy.make_loss(), optimizer, shardings=shardings, batch_sharding=sharding.batch_sharding(mesh, rules)
    )

    def rows(seed):
        return {name: np.split(array, count)[index] for name, array in toy.make_batch(seed).items()}

    checkpoints = Checkpointer(workdir / "checkpoints", config=config_lib.to_dict(config))
    with sharding.use(mesh, rules), checkpoints, MetricsWriter(workdir, checkpoints.latest_step or 0) as writer:
        state = train_loop(
            state,
            train_step,
            iter(grain.MapDataset.range(100).map(rows).to_iter_dataset()),
            jax.random.key(7),
            num_steps=config.num_steps,
            workdir=workdir,
            checkpointer=checkpoints,
            writer=writer,
            put=functools.partial(sharding.shard_batch, mesh=mesh, rules=rules),
            log_every=1,
            checkpoint_every=2,
        )
    arrays = {}
    if jax.process_index() == 0:
        arrays = export_checkpoint(workdir, workdir / "parameters.safetensors")["arrays"]
    print(json.dumps({"step": int(state.step), "exported": sorted(arrays)}))


if __name__ == "__main__":
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # simulated devices may deadlock otherwise
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    config, workdir = Config(), pathlib.Path(sys.argv[3])
    for _ in range(100):  # often, because the processes meet here by chance
        config_lib.claim_workdir(config, workdir)
    main(config, workdir)
    jax.distributed.shutdown()
