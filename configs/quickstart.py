"""The quickstart: SFT → RLVR → OPSD (Correct-only) on the embedded task, from random weights.

    opsd-jax train --config configs/quickstart.py --workdir runs/quickstart

Hardware: two CPU cores, 2 GB of memory; some five minutes. Expect RLVR to raise held-out accuracy
by more than 10 points, and OPSD then to shorten responses by some 45 % at the accuracy of RLVR.
Every field and its default is in opsd_jax/config.py; `--config.opsd.gate=incorrect` changes one.
"""

from opsd_jax import config as config_lib


def get_config():
    """The defaults are this run."""
    return config_lib.default()
