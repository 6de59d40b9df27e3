"""Runs a script or a training run in several processes that form one JAX program."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from paths import CONFIGS

from opsd_jax.config import loading
from opsd_jax.training.speed import without_times

QUICKSTART = CONFIGS / "quickstart.py"

BEGIN = """
import sys, jax
from opsd_jax.parallel import hosts
address, processes, number = sys.argv[1], *map(int, sys.argv[2:4])
hosts.start(address if processes > 1 else "", processes, number)
"""


def free_port() -> int:
    """Returns a port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a process with this number of CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}


def run(script: str, *arguments: str, processes: int, devices: int) -> None:
    """Runs a script in several processes; fails unless all exit with 0 within two minutes.

    Args:
      script: Python source. It finds `arguments` in `sys.argv[4:]` and its process number in
        `number`.
      *arguments: further arguments of the script.
      processes: number of processes.
      devices: number of CPU devices in each process.
    """
    address = f"localhost:{free_port()}"
    begun = [sys.executable, "-c", BEGIN + script, address, str(processes)]
    running = [
        subprocess.Popen([*begun, str(i), *arguments], env=environment(devices))
        for i in range(processes)
    ]
    try:
        assert [process.wait(timeout=120) for process in running] == [0] * processes
    finally:
        for process in running:
            process.kill()


# Each decoding step waits for all processes, which takes long on a busy machine.
SHORT = {f"{section}.response_tokens": 24 for section in ("evaluation", "rlvr", "opsd")}


class Run:
    """`opsd-jax train` in several processes, with short responses."""

    def __init__(self, config, workdir, *changes, processes=2, devices=4):
        """Starts the processes.

        Args:
          config: the config of the run.
          workdir: its work directory.
          *changes: further arguments of each process, a tuple per process; none by default.
          processes: number of processes.
          devices: number of CPU devices in each process.
        """
        flat = loading.flatten(config) | SHORT
        default = loading.flatten(loading.load(QUICKSTART, {}))
        command = [sys.executable, "-m", "opsd_jax", "train", "--config", str(QUICKSTART)]
        command += ["--workdir", str(workdir)]
        text = lambda value: tuple(value) if isinstance(value, list) else value
        command += [f"--config.{k}={text(v)}" for k, v in flat.items() if v != default[k]]
        if processes > 1:
            command += [
                "--coordinator",
                f"localhost:{free_port()}",
                "--processes",
                str(processes),
            ]
        self.processes = [
            subprocess.Popen(
                [*command, *["--process", str(i)] * (processes > 1), *own],
                env=environment(devices),
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, own in zip(range(processes), changes or [()] * processes, strict=True)
        ]

    def ended(self, seconds=600):
        """Waits for the processes; returns (exit code, standard error) of each."""
        try:
            errors = [process.communicate(timeout=seconds)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(p.returncode, e) for p, e in zip(self.processes, errors, strict=True)]


def assert_equal_runs(a, b):
    """Asserts that two runs have equal token ids, and metrics equal to float32 rounding."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for stage in ("sft", "rlvr", "opsd"):
        for file in ("responses.jsonl", "groups.jsonl"):
            if (a / stage / file).exists():
                assert (a / stage / file).read_text() == (b / stage / file).read_text()
        for x, y in zip(*(rows(w / stage / "metrics.jsonl") for w in (a, b)), strict=True):
            assert x.keys() == y.keys()
            names = without_times(x)
            np.testing.assert_allclose(
                [x[n] for n in names], [y[n] for n in names], rtol=1e-5, atol=1e-6
            )
        with ocp.StandardCheckpointer() as checkpointer:
            shapes = checkpointer.metadata(a / stage / "params").item_metadata.tree
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
            )
            x, y = (checkpointer.restore(w / stage / "params", shapes) for w in (a, b))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), x, y)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
