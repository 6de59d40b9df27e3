"""Several hosts as one program, simulated by processes with CPU devices on one machine."""

import shutil
import signal
import time

import jax
import processes
import pytest
from processes import QUICKSTART, Run, assert_equal_runs

from opsd_jax import config as config_lib
from opsd_jax.cli import main
from opsd_jax.parallel import hosts


def test_hosts_exchange_values_and_errors():
    script = """
from opsd_jax.config import ConfigError
from opsd_jax.parallel import hosts

assert hosts.gathered("x" * number) == ["", "x"]
assert hosts.largest(5 * number) == 5
assert hosts.from_first(lambda: ("first", number)) == ("first", 0)
assert hosts.each(lambda: number) == [0, 1]
assert hosts.together(lambda: lambda: number)() == number  # a result that cannot be pickled

class Local(Exception):  # cannot be pickled
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


def wait_for(path, seconds=400):
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@pytest.fixture(scope="module")
def carrying(shared_config):
    """A config whose second stage carries rollouts over, and whose last one trains an adapter."""
    config = shared_config.copy_and_resolve_references()
    config.rlvr.carry_over = 4
    config.adapter = config_lib.lora(rank=4, alpha=8.0, stages=("opsd",))
    return config


@pytest.fixture
def config(carrying):
    return carrying.copy_and_resolve_references()


@pytest.fixture(scope="module")
def alone(carrying, tmp_path_factory):
    """The work directory of a run in one process with eight devices."""
    workdir = tmp_path_factory.mktemp("hosts") / "alone"
    ((code, errors),) = Run(carrying, workdir, processes=1, devices=8).ended()
    assert code == 0, errors[-3000:]
    return workdir


@pytest.mark.slow
def test_two_hosts_give_the_results_of_one(config, alone, tmp_path):
    (code, errors), other = Run(config, tmp_path / "two").ended()
    assert code == 0, errors[-3000:]
    assert other[0] == 0, other[1][-3000:]
    assert_equal_runs(alone, tmp_path / "two")
    assert "evaluate opsd" in errors
    assert "evaluate" not in other[1]  # only the first host prints progress


@pytest.mark.slow
def test_a_signal_to_one_host_stops_both_and_the_run_resumes(config, alone, tmp_path):
    workdir = tmp_path / "two"
    stopped = Run(config, workdir)
    wait_for(workdir / "rlvr" / "metrics.jsonl")
    stopped.processes[1].send_signal(signal.SIGTERM)
    for code, errors in stopped.ended(120):
        assert code == 128 + signal.SIGTERM, errors[-3000:]
        assert "SIGTERM: progress is saved; run the same command again to resume" in errors
    # A single host with all eight devices can resume the run as well.
    shutil.copytree(workdir, tmp_path / "one")
    ((code, errors),) = Run(config, tmp_path / "one", processes=1, devices=8).ended()
    assert code == 0, errors[-3000:]
    assert_equal_runs(alone, tmp_path / "one")
    for code, errors in Run(config, workdir).ended():
        assert code == 0, errors[-3000:]
    assert_equal_runs(alone, workdir)


@pytest.mark.slow
def test_a_lost_host_ends_the_other_and_the_run_resumes(config, alone, tmp_path):
    workdir = tmp_path / "two"
    pair = Run(config, workdir)
    wait_for(workdir / "rlvr" / "metrics.jsonl")
    pair.processes[1].kill()
    began = time.monotonic()
    (code, errors), _ = pair.ended(120)
    assert time.monotonic() - began < 60
    # The code is 75 if a collective fails. If a checkpoint waits for the lost host, JAX aborts.
    expected = {
        75: "another host is lost",
        -signal.SIGABRT: "This most likely indicates that another",
    }
    assert expected[code] in errors
    for code, errors in Run(config, workdir).ended():
        assert code == 0, errors[-3000:]
    assert_equal_runs(alone, workdir)


@pytest.mark.slow
def test_many_programs_in_flight_do_not_deadlock():
    """More programs than the CPU client queues (32), each with a collective over both hosts."""
    script = """
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from opsd_jax.parallel.mesh import make_mesh

mesh = make_mesh((8, 1, 1))
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
x = jax.jit(lambda: jnp.ones((4096, 256)), out_shardings=rows)()
total = jax.jit(lambda x, i: (x @ x.T).sum() * i, out_shardings=whole)
sums = [total(x, float(i)) for i in range(200)]
assert [float(s) for s in sums] == [2.0**32 * i for i in range(200)], sums
"""
    processes.run(script, processes=2, devices=4)


def test_a_checkpoint_that_one_host_cannot_read_is_skipped_by_both(tmp_path):
    script = """
import pathlib
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from opsd_jax.parallel.mesh import make_mesh
from opsd_jax.training.checkpoint import Checkpoints

directory = pathlib.Path(sys.argv[4]) / "checkpoints"
where = NamedSharding(make_mesh((1, 4, 1)), P("fsdp"))
x = jax.jit(lambda: jax.random.normal(jax.random.key(0), (512, 64)), out_shardings=where)()
with Checkpoints(directory) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, {"x": x * step})

def cut():
    parts = list((directory / "2" / "default" / "ocdbt.process_1" / "d").iterdir())
    for path in parts:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return len(parts)

assert hosts.from_first(cut)
with Checkpoints(directory) as checkpoints:
    step, state = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)})
assert step == 1, step
equal = jax.jit(lambda a, b: (a == b).all(), out_shardings=NamedSharding(where.mesh, P()))
assert equal(state["x"], x)
assert (directory.parent / "damaged" / "2.0").is_dir()
"""
    processes.run(script, str(tmp_path), processes=2, devices=2)


def test_errors_that_mean_a_lost_host(monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 16)
    error = jax.errors.JaxRuntimeError
    assert hosts.is_loss(error("UNAVAILABLE: the coordination service is gone"))
    assert hosts.is_loss(error("Gloo AllGather failed: Connection closed by peer [10.0.0.7]"))
    wrapped = ValueError("cannot save")
    wrapped.__cause__ = error("INTERNAL: Connection reset by peer")
    assert hosts.is_loss(wrapped)
    assert not hosts.is_loss(error("INTERNAL: Mosaic failed to compile TPU kernel"))
    assert not hosts.is_loss(error("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm"))
    assert not hosts.is_loss(ConnectionError("closed by peer"))
    assert not hosts.is_loss(None)


def test_a_failure_on_one_host_ends_all_hosts_at_once(config, tmp_path):
    began = time.monotonic()
    other = "--config", str(tmp_path / "none.py")
    for code, errors in Run(config, tmp_path / "run", (), other).ended(120):
        assert code == 2, errors[-3000:]
        assert f"--config {tmp_path}/none.py: there is no such" in errors
    assert time.monotonic() - began < 60


def test_different_configs_on_two_hosts_are_an_error(config, tmp_path):
    for code, errors in Run(config, tmp_path / "run", (), ("--config.seed=7",)).ended(120):
        assert code == 2, errors[-3000:]
        assert "hosts differ" in errors
        assert "config.seed: 0, 7" in errors


@pytest.mark.slow
def test_different_directories_on_two_hosts_are_an_error(config, tmp_path):
    other = "--workdir", str(tmp_path / "other")
    for code, errors in Run(config, tmp_path / "run", (), other).ended(120):
        assert code == 2, errors[-3000:]
        assert "host 1 does not see the config.json that host 0 has written" in errors


def test_a_missing_or_wrong_process_number_is_an_error(capsys, tmp_path):
    arguments = ["train", "--config", str(QUICKSTART), "--workdir", str(tmp_path)]
    for more in ([], ["--processes", "2"], ["--processes", "2", "--process", "2"]):
        with pytest.raises(SystemExit):
            main.main([*arguments, "--coordinator", "localhost", *more])
        assert "expected --processes N, the number of processes" in capsys.readouterr().err
