"""Two processes with two simulated devices each, which find each other through jax.distributed."""

import json
import os
import pathlib
import socket
import subprocess
import sys


def run_pair(script: str, *arguments) -> list[dict]:
    """Runs `script ADDRESS PROCESS ARGUMENTS` of this folder as processes 0 and 1; the JSON of their last lines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    folder = pathlib.Path(__file__).parent
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(folder.parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, folder / script, address, str(process), *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | flags,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(lines[-1]) for lines in outputs]
