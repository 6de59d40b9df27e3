"""The losses, installed without the package's dependencies beside other versions of jax."""

import os
import sys

import environments
import pytest
from paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.9", "0.11"])
def test_the_losses_with_another_jax(tmp_path, version):
    """Only jax, numpy and pytest are installed, so an import of anything else fails."""
    newer = environments.find_python("3.12") if version == "0.11" else None  # it needs 3.12
    packages = f"jax=={version}.*", "numpy", "pytest"
    python = environments.make(tmp_path, *packages, python=newer or sys.executable)
    command = [python, "-m", "pytest", "--noconftest", "-c", os.devnull, "-p", "no:cacheprovider"]
    test = ROOT / "tests" / "losses" / "test_inside.py"
    environments.run([*command, test, "-k", "not scan and not inner"], tmp_path)
