"""Several hosts as one program: processes of four devices each, over the loopback."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
from processes import free_port

from opsd_jax import config_files, main

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"


def test_what_hosts_tell_one_another():
    script = """
from opsd_jax.config import ConfigError
from opsd_jax.parallel import hosts

assert hosts.gathered("x" * number) == ["", "x"]
assert hosts.largest(5 * number) == 5
assert hosts.from_first(lambda: ("first", number)) == ("first", 0)
assert hosts.each(lambda: number) == [0, 1]
assert hosts.together(lambda: lambda: number)() == number  # what cannot be pickled stays

class Local(Exception):  # which cannot be pickled
    def __init__(self, what, whose):
        super().__init__(f"{what} {whose}")

def fail(on, error):
    if number == on:
        raise error

for method, on, error, raised in (
    (hosts.from_first, 0, ConfigError("no such file"), ConfigError),
    (hosts.together, 1, ConfigError("no such file"), ConfigError),
    (hosts.each, 1, Local("of", "a function"), RuntimeError),
):
    try:
        method(lambda: fail(on, error))
    except raised as caught:
        assert str(error) in str(caught)
    else:
        raise AssertionError
"""
    processes.run(script, processes=2, devices=1)


class Run:
    """A run of the command line by so many processes."""

    def __init__(self, config, workdir, *changes, processes=2, devices=4):
        flat = config_files.flatten(config)
        default = config_files.flatten(config_files.load(QUICKSTART, {}))
        command = [sys.executable, "-m", "opsd_jax.main", "train", "--config", str(QUICKSTART)]
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


def wait_for(path, seconds=200):
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The run of one process of eight devices."""
    workdir = tmp_path_factory.mktemp("hosts") / "alone"
    ((code, errors),) = Run(config, workdir, processes=1, devices=8).ended()
    assert code == 0, errors[-3000:]
    return workdir


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


@pytest.mark.slow
def test_two_hosts_do_what_one_does(config, alone, tmp_path):
    (code, errors), other = Run(config, tmp_path / "two").ended()
    assert code == 0, errors[-3000:]
    assert other[0] == 0, other[1][-3000:]
    assert_equal_runs(alone, tmp_path / "two")
    assert "evaluate opsd" in errors
    assert "evaluate" not in other[1]  # the first speaks for both


@pytest.mark.slow
def test_a_signal_to_one_host_stops_both_and_they_go_on(config, alone, tmp_path):
    workdir = tmp_path / "two"
    stopped = Run(config, workdir)
    wait_for(workdir / "rlvr" / "metrics.jsonl")
    stopped.processes[1].send_signal(signal.SIGTERM)
    for code, errors in stopped.ended(120):
        assert code == 128 + signal.SIGTERM, errors[-3000:]
        assert "SIGTERM: saved; the same command goes on from here" in errors
    for code, errors in Run(config, workdir).ended():
        assert code == 0, errors[-3000:]
    assert_equal_runs(alone, workdir)


@pytest.mark.slow
def test_a_lost_host_ends_the_other_and_the_pair_goes_on(config, alone, tmp_path):
    workdir = tmp_path / "two"
    pair = Run(config, workdir)
    wait_for(workdir / "rlvr" / "metrics.jsonl")
    pair.processes[1].kill()
    began = time.monotonic()
    (code, errors), _ = pair.ended(120)
    assert time.monotonic() - began < 60
    # 75 where a collective fails; where a save waits for the lost one JAX ends the process.
    said = {75: "another host is lost", -signal.SIGABRT: "This most likely indicates that another"}
    assert said[code] in errors
    for code, errors in Run(config, workdir).ended():
        assert code == 0, errors[-3000:]
    assert_equal_runs(alone, workdir)


def test_hosts_that_were_given_different_configs_say_so(config, tmp_path):
    for code, errors in Run(config, tmp_path / "run", (), ("--config.seed=7",)).ended(120):
        assert code == 2, errors[-3000:]
        assert "hosts differ" in errors
        assert "config.seed: 0, 7" in errors


def test_a_process_is_one_of_several(capsys, tmp_path):
    arguments = ["train", "--config", str(QUICKSTART), "--workdir", str(tmp_path)]
    for more in ([], ["--processes", "2"], ["--processes", "2", "--process", "2"]):
        with pytest.raises(SystemExit):
            main.main([*arguments, "--coordinator", "localhost", *more])
        assert "expected how many there are and which of them" in capsys.readouterr().err
