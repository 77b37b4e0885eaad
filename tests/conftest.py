"""Eight simulated devices and strict modes; this must run before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

# Eight simulated devices on two cores deadlock when programs are dispatched asynchronously.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
