"""Eight simulated devices and strict modes; this must run before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Ours first, so that a flag from outside wins. Without LLVM's optimisations programs compile in under half the time;
# the HLO passes, whose results some tests read, are the same.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
)

import jax

# Eight simulated devices on two cores deadlock when programs are dispatched asynchronously.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
