"""Errors of the machine, and Ctrl-C: one line and an exit code, but no traceback."""

import os
import subprocess
import sys

import jax
import pytest

from opsd_jax.cli import main, report

WORKDIR = ["--workdir", "runs/absent"]


@pytest.mark.parametrize("platform", ["gpux", "cuda"])
def test_a_platform_without_a_device_is_named(tmp_path, platform):
    command = [sys.executable, "-m", "opsd_jax", "train", "--config", "quickstart", "--workdir"]
    environment = os.environ | {"JAX_PLATFORMS": platform, "XLA_FLAGS": ""}
    run = subprocess.run(
        [*command, str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert f"JAX_PLATFORMS is {platform!r}, and JAX finds no such device" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "a device is out of"),
        (MemoryError("cannot allocate"), "this machine is out of memory (MemoryError: cannot"),
    ],
)
def test_out_of_memory_says_what_to_lower(monkeypatch, capsys, error, message):
    def fail(arguments, overrides):
        raise error

    monkeypatch.setattr(report, "main", fail)
    assert main.main(["report", *WORKDIR]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "config.STAGE.microbatch" in said


def test_another_error_of_a_device_is_raised(monkeypatch):
    def fail(arguments, overrides):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(report, "main", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        main.main(["report", *WORKDIR])


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupt(arguments, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "main", interrupt)
    assert main.main(["report", *WORKDIR]) == 130
    assert "interrupted. Finished work is kept" in capsys.readouterr().err


def test_a_message_of_the_log_is_written_once():
    """Any package may call logging.warning, which sets up a root logger that has no handler."""
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import logging; from opsd_jax.cli import main; main._log_to_stderr(); "
            "main._log_to_stderr(); logging.warning('other'); "
            "logging.getLogger('opsd_jax.run').info('ours'); logging.getLogger('any').info('no')",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stderr.splitlines() == ["other", "ours"]
