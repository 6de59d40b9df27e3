"""A part of the fast tests with the newer versions of JAX and Flax, in their own environment."""

import os
import subprocess
import sys

import environments
import pytest
from paths import ROOT

# About a minute of tests. `./launch/test.sh --newer` runs all fast tests.
TESTS = (
    "losses/test_losses.py::test_joint",
    "losses/test_losses.py::test_policy_gradient",
    "losses/test_losses.py::test_gradients_of_both_sides_match_finite_differences",
    "losses/test_fused.py::test_a_mesh_that_cannot_be_used",  # once crashed
    "models/test_decoder.py::test_cached_decoding_equals_the_full_forward",
    "models/test_paged.py::test_prefill_and_decoding_equal_the_full_forward",
    "rollout/test_engine.py::test_logprobs_equal_those_of_a_full_forward_pass",
    "training/test_step.py::test_eight_devices_compute_the_same_step_as_one[shape2]",
)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="these tests run with the newer JAX")
def test_losses_models_rollouts_and_train_steps_with_the_newer_versions():
    python = environments.find_python("3.13") or environments.find_python("3.12")
    if python is None:
        pytest.skip("neither Python 3.12 nor 3.13 is installed")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "JAX_", "XLA_"))}
    script = '. launch/setup.sh && setup test && pytest -p no:xdist "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "-", *(f"tests/{name}" for name in TESTS)],
        cwd=ROOT,
        env=outside | {"PYTHON": python, "OPSD_JAX_VENV": ".venv-newer"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
