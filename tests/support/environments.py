"""Makes virtual environments with other libraries, and the losses without dependencies."""

import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT


def find_python(version):
    """Finds a Python of a version such as "3.12". Returns its path, or None if none runs."""
    ask = [f"python{version}", "-c", "import sys; print(sys.executable)"]
    of_pyenv = {"PYENV_VERSION": version}  # without it, pyenv's command may exist but fail
    try:
        told = subprocess.run(
            ask, env=os.environ | of_pyenv, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return told.stdout.strip() or None


def make(directory, *packages, alone=(), python=sys.executable):
    """Makes an environment with packages from the index, and this package without dependencies.

    The packages `alone` are installed without their dependencies too.

    Skips the test if the index does not have the packages for this Python.

    Returns:
      The path of its Python.
    """
    inside = directory / "bin" / "python"
    subprocess.run([python, "-m", "venv", directory], check=True)
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    installed = subprocess.run([*pip, "install", *packages], capture_output=True, text=True)
    if "No matching distribution" in installed.stderr:
        pytest.skip(f"no {packages} for this Python: {installed.stderr.splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr
    source = directory / "source"  # pip builds in its place
    for part in ("opsd_jax", "configs"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    subprocess.run([*pip, "install", "--no-deps", source, *alone], check=True)
    return inside


def run(command, cwd):
    """Runs a command on CPU with eight devices. Returns its output; fails if it fails."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    flags["HOME"] = str(cwd)  # some libraries write caches there
    ended = subprocess.run(
        command, cwd=cwd, env=os.environ | flags, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
