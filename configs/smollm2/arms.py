"""SFT → RLVR → OPSD of SmolLM2-135M on correct, on incorrect and on all rollouts.

    CONFIG=configs/smollm2/arms.py ./launch/released.sh runs/smollm2_arms/seed0
    # opsd-jax train --config configs/smollm2/arms.py ...

Hardware: two CPU cores, an estimated 14 GB of memory and 100 minutes for each seed.
"""

import pathlib

from opsd_jax.config import loading, recipes


def get_config():
    """Returns the config of whole.py with one OPSD stage for each gate."""
    return recipes.gate_arms(loading.read(pathlib.Path(__file__).with_name("whole.py")))
