"""Runs a script in several processes that are one program, over the loopback."""

import os
import socket
import subprocess
import sys

BEGIN = """
import sys, jax
address, processes, number = sys.argv[1], *map(int, sys.argv[2:4])
if processes > 1:
    jax.distributed.initialize(address, processes, number)
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run(script: str, *arguments: str, processes: int, devices: int) -> None:
    """Runs a script in processes of so many devices each, `arguments` being `sys.argv[4:]` there
    and `number` the process's. Fails unless all end well within two minutes.
    """
    address = f"localhost:{free_port()}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    begun = [sys.executable, "-c", BEGIN + script, address, str(processes)]
    running = [
        subprocess.Popen([*begun, str(i), *arguments], env=os.environ | {"XLA_FLAGS": flags})
        for i in range(processes)
    ]
    try:
        assert [process.wait(timeout=120) for process in running] == [0] * processes
    finally:
        for process in running:
            process.kill()
