"""The losses, installed without the package's dependencies beside other versions of jax."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.9", "0.11"])
def test_the_losses_with_another_jax(tmp_path, version):
    """Only jax, numpy and pytest are installed, so an import of anything else fails."""
    python = tmp_path / "bin" / "python"
    newer = shutil.which("python3.12") if version == "0.11" else None  # it needs Python 3.12
    subprocess.run([newer or sys.executable, "-m", "venv", tmp_path], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    installed = subprocess.run(
        [*pip, "install", f"jax=={version}.*", "numpy", "pytest"], capture_output=True, text=True
    )
    if "No matching distribution" in installed.stderr:
        pytest.skip(f"no jax {version} for this Python: {installed.stderr.splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr
    without = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info")  # pip builds in its place
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=without)
    subprocess.run([*pip, "install", "--no-deps", source], check=True)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [python, "-m", "pytest", "--noconftest", "-c", os.devnull, "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, ROOT / "tests" / "losses" / "test_inside.py", "-k", "not scan and not inner"],
        cwd=tmp_path,
        env=os.environ | flags,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
