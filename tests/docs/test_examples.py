"""The examples run as written, and their losses improve."""

import runpy

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"


def main(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


@pytest.fixture(autouse=True)
def _allow_rank_promotion():
    """Allows rank promotion, because the layers of Flax add biases of rank 1."""
    import jax

    with jax.numpy_rank_promotion("allow"):
        yield


def test_nnx_opsd():
    curve = main("nnx_opsd")
    assert curve[-1] < 0.2 * curve[0]


def test_linen_grpo():
    curve = main("linen_grpo")
    assert sum(curve[-5:]) / 5 > sum(curve[:5]) / 5 + 0.3


def test_dict_joint():
    curve = main("dict_joint")
    assert curve[-1]["policy"] < curve[0]["policy"] - 0.01
    assert curve[-1]["divergence"] < 0.7 * curve[0]["divergence"]
