"""The problems of reasoning-gym, in an environment of their own."""

import os

import environments
import pytest
from paths import SUPPORT

# reasoning-gym, and what its module of this package imports.
PACKAGES = "reasoning-gym==0.1.25", "jax==0.10.*", "etils[epath]", "ml-collections", "pytest"


@pytest.mark.slow
def test_every_dataset_in_an_environment_with_reasoning_gym(tmp_path):
    python = environments.make(tmp_path, *PACKAGES)
    options = ["--noconftest", "-c", os.devnull, "-p", "no:cacheprovider"]
    environments.run([python, "-m", "pytest", *options, SUPPORT / "inside_gym.py"], tmp_path)
