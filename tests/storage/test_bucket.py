"""Work directories in a bucket, with the real Cloud Storage clients and a fake server."""

import pathlib
import signal
import subprocess
import sys
import time

import fake_gcs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from processes import Run, assert_equal_runs, free_port

from opsd_jax.cli import arguments, main
from opsd_jax.config import ConfigError
from opsd_jax.evaluation import records as evaluate
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.storage import files, lease
from opsd_jax.storage.files import RecordError
from opsd_jax.training import checkpoint
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def storage():
    """The fake buckets, and the environment variables that make processes use them."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, fake_gcs.serve(port) as server:
        environment = fake_gcs.environment(port)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield server.buckets, environment


@pytest.fixture
def directory(storage, request):
    return arguments.directory(f"gs://bucket/{request.node.name}")


def test_a_bucket_is_given_as_a_gs_url(directory, capsys):
    assert isinstance(directory, epath.Path)
    assert files.in_bucket(directory)
    assert str(files.absolute(directory / "a")) == f"{directory}/a"
    assert not files.in_bucket(pathlib.Path("gs"))
    for text in ("s3://bucket/run", "gs:///run"):
        with pytest.raises(SystemExit):
            main.main(["report", "--workdir", text])
        assert "expected a directory or gs://BUCKET/" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["convert", "--workdir", "runs", "--out", "gs://bucket/model"])
    assert "expected a directory on this machine" in capsys.readouterr().err


def test_a_missing_gcs_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main.main(["report", "--workdir", "gs://bucket/run"])
    assert "pip install 'opsd-jax[gcs]'" in capsys.readouterr().err


def test_a_growing_file_is_uploaded_by_sync_or_after_a_minute(directory, monkeypatch):
    path = directory / "lines"
    with files.Lines(path) as lines:
        assert not path.exists()
        lines.write("1\n")
        assert not path.exists()
        with monkeypatch.context() as patched:
            patched.setattr(files, "SYNC_SECONDS", 0.0)  # the next write comes late enough
            lines.sync()
        assert path.read_text() == "1\n"
        lines.write("2\n")
        assert path.read_text() == "1\n2\n"
        lines.write("3\n")
        assert path.read_text() == "1\n2\n"
    assert path.read_text() == "1\n2\n3\n"
    with files.Lines(path, "0\n") as lines:
        assert path.read_text() == "0\n"
        lines.write("1\n")
        lines.rewrite("1\n0\n")
        assert path.read_text() == "1\n0\n"


def test_flushed_metrics_are_in_the_bucket(directory):
    with metrics_lib.MetricsWriter(directory, 0) as writer:
        for step in range(3):
            writer.write(step, {"loss": 1.0 / (1 + step)}, [{"problem": step}])
        writer.flush()
        assert len(metrics_lib.read(directory)) == 3
        writer.write(3, {"loss": 0.0})
    with metrics_lib.MetricsWriter(directory, 2):
        assert [row["step"] for row in metrics_lib.read(directory)] == [0, 1]
        assert [row["step"] for row in metrics_lib.read(directory, metrics_lib.GROUPS)] == [0, 1]
    assert any("tfevents" in path.name for path in directory.iterdir())


def test_a_missing_bucket_is_an_error(capsys, storage):
    with pytest.raises(RecordError, match="gs://missing/file cannot be written"):
        files.write_atomically(epath.Path("gs://missing/file"), "text")
    with (
        pytest.raises(ConfigError, match="--workdir gs://missing/run cannot be written"),
        workdir_lib.locked(epath.Path("gs://missing/run"), "--workdir"),
    ):
        pass
    assert main.main(["report", "--workdir", "gs://missing/run"]) == 2
    assert "gs://missing/run holds no run" in capsys.readouterr().err


class TestLease:
    def test_one_process_at_a_time_holds_a_directory(self, directory, monkeypatch):
        monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.5)
        claim = lambda: workdir_lib.locked(directory, "--workdir")
        in_use = pytest.raises(ConfigError, match="in use by another process")
        with claim(), in_use, claim():
            pass
        assert not (directory / "lock").exists()  # the next process need not wait

    def test_the_lease_of_a_crashed_process_expires(self, directory, monkeypatch, caplog):
        monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.2)
        path = directory / "lock"
        path.write_text("somebody 17")
        began = time.monotonic()
        with lease.held(path):
            assert time.monotonic() - began > 0.5
            assert "somebody" not in path.read_text()
        assert "waiting up to 1 s to see whether its process is alive" in caplog.text
        assert not path.exists()

    def test_a_process_that_lost_its_lease_exits(self, directory):
        script = f"""
import time
from etils import epath
from opsd_jax.storage import lease
lease.HEARTBEAT_SECONDS = 0.2
with lease.held(epath.Path("{directory}/lock")):
    print("held", flush=True)
    time.sleep(60)
"""
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "held\n"
        (directory / "lock").write_text("another 1")
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1
        assert f"another process has taken over {directory}/lock, so this process exits" in errors
        assert (directory / "lock").read_text() == "another 1"


@pytest.fixture
def state():
    return {"x": jnp.arange(6.0), "step": jnp.int32(0)}


def abstract(state):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    return jax.tree.map(shape, state)


def save(directory, state, steps):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, state | {"x": state["x"] * step})


def test_the_newest_complete_checkpoint_is_restored(storage, directory, state, caplog):
    buckets, _ = storage
    save(directory / "checkpoints", state, (1, 2))
    with Checkpoints(directory / "checkpoints") as checkpoints:
        step, restored = checkpoints.restore(abstract(state))
    assert step == 2
    np.testing.assert_array_equal(restored["x"], state["x"] * 2)

    # A save that was cut off has no marker file.
    buckets.delete("bucket", f"{directory.name}/checkpoints/2/commit_success.txt", {})
    with Checkpoints(directory / "checkpoints") as checkpoints:
        assert checkpoints.restore(abstract(state))[0] == 1
    assert "damaged" not in caplog.text

    # A checkpoint with missing objects is moved aside.
    save(directory / "checkpoints", state, (3,))
    for name in buckets.names("bucket"):
        if f"{directory.name}/checkpoints/3/" in name and "/d/" in name:
            buckets.delete("bucket", name, {})
    with Checkpoints(directory / "checkpoints") as checkpoints:
        assert checkpoints.restore(abstract(state))[0] == 1
    assert f"has been moved to {directory}/damaged/3.0" in caplog.text
    assert (directory / "damaged" / "3.0").is_dir()
    assert not (directory / "checkpoints" / "3").exists()
    save(directory / "checkpoints", state, (3,))
    with Checkpoints(directory / "checkpoints") as checkpoints:
        assert checkpoints.restore(abstract(state))[0] == 3


def test_parameters_exist_once_they_are_complete(storage, directory, state):
    path = directory / "params"
    assert not checkpoint.has_params(path)
    checkpoint.save_params(path, state)
    assert checkpoint.has_params(path)
    before = evaluate.fingerprint(path)
    np.testing.assert_array_equal(checkpoint.restore_params(path, abstract(state))["x"], state["x"])
    storage[0].delete("bucket", f"{directory.name}/params/commit_success.txt", {})
    assert not checkpoint.has_params(path)
    assert evaluate.fingerprint(path) != before


def download(buckets, name, directory):
    """Copies the objects below `name/` to a local directory."""
    for key in buckets.names("bucket"):
        if key.startswith(f"{name}/"):
            path = directory / key.removeprefix(f"{name}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buckets.read("bucket", key, {})[0])
    return directory


@pytest.mark.slow
def test_two_hosts_that_share_nothing_but_a_bucket_survive_a_kill(config, storage, tmp_path):
    buckets, _ = storage
    ((code, errors),) = Run(config, tmp_path / "alone", processes=1, devices=8).ended()
    assert code == 0, errors[-3000:]
    pair = Run(config, "gs://bucket/pair")
    deadline = time.monotonic() + 400
    while not any(name.startswith("pair/rlvr/checkpoints/1") for name in buckets.names("bucket")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in pair.processes:
        process.send_signal(signal.SIGKILL)
    assert [code for code, _ in pair.ended()] == [-signal.SIGKILL] * 2
    for code, errors in Run(config, "gs://bucket/pair").ended():
        assert code == 0, errors[-3000:]
    assert_equal_runs(tmp_path / "alone", download(buckets, "pair", tmp_path / "pair"))
    command = [sys.executable, "-m", "opsd_jax"]
    report = [*command, "report", "--workdir", "gs://bucket/pair"]
    assert b"report: gs://bucket/pair/report/index.html" in subprocess.check_output(report)
    model = tmp_path / "model"
    convert = [*command, "convert", "--workdir", "gs://bucket/pair", "--out", str(model)]
    subprocess.run(convert, check=True)
    assert (model / "model.safetensors").exists()
