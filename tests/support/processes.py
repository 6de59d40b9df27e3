"""Several processes that are one program, over the loopback: a script, or a run."""

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

QUICKSTART = CONFIGS / "quickstart.py"

BEGIN = """
import sys, jax
from opsd_jax.parallel import hosts
address, processes, number = sys.argv[1], *map(int, sys.argv[2:4])
hosts.start(address if processes > 1 else "", processes, number)
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


class Run:
    """A run of the command line by so many processes."""

    def __init__(self, config, workdir, *changes, processes=2, devices=4):
        flat = loading.flatten(config)
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
        flags = f"--xla_force_host_platform_device_count={devices}"
        self.processes = [
            subprocess.Popen(
                [*command, *["--process", str(i)] * (processes > 1), *own],
                env=os.environ | {"XLA_FLAGS": flags},
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, own in zip(range(processes), changes or [()] * processes, strict=True)
        ]

    def ended(self, seconds=300):
        """`(exit code, standard error)` of each."""
        try:
            errors = [process.communicate(timeout=seconds)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(p.returncode, e) for p, e in zip(self.processes, errors, strict=True)]


def assert_equal_runs(a, b):
    """Equal ids, and numbers to float32 rounding."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for stage in ("sft", "rlvr", "opsd"):
        for file in ("responses.jsonl", "groups.jsonl"):
            if (a / stage / file).exists():
                assert (a / stage / file).read_text() == (b / stage / file).read_text()
        for x, y in zip(*(rows(w / stage / "metrics.jsonl") for w in (a, b)), strict=True):
            assert x.keys() == y.keys()
            names = [name for name in x if "seconds" not in name]
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
