"""Where a subcommand computes, and where it keeps its compiled programs. Imports JAX when it is called."""

import contextlib
import os
from collections.abc import Iterator

CACHE = "~/.cache/jaxaudio/compilation"
DEVICES = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}


def use_device(name: str | None) -> None:
    """Chooses JAX's backend; without a name JAX takes an accelerator if there is one.

    Raises:
      ValueError: there is no such device, or JAX has begun with another.
    """
    import jax

    if name is None:
        return
    jax.config.update("jax_platforms", "cuda" if DEVICES[name] == "gpu" else DEVICES[name])
    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {error}") from error
    if backend != DEVICES[name]:
        raise ValueError(f"--device {name}: this process computes on {backend} already")


@contextlib.contextmanager
def compilation_cache(folder: str | None) -> Iterator[None]:
    """Keeps compiled programs in a folder while the block runs; JAX reads its name when it first compiles."""
    import jax

    if folder is None:
        settings = {"jax_enable_compilation_cache": False}
    else:
        settings = {"jax_persistent_cache_min_compile_time_secs": 0.0}
        if folder != CACHE or not jax.config.jax_compilation_cache_dir:
            settings["jax_compilation_cache_dir"] = os.path.expanduser(folder)
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
