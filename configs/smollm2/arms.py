"""SFT → RLVR → OPSD of SmolLM2-135M on correct, on incorrect and on all rollouts.

    python benchmarks/arms.py --config configs/smollm2/arms.py --workdir runs/smollm2_arms \\
        --config.model.path=models/SmolLM2-135M-Instruct

Hardware: two CPU cores, 10 GB of memory, an hour and a half to two for each seed.
"""

import pathlib

from opsd_jax.config import loading, recipes


def get_config():
    """Returns the config of whole.py with one OPSD stage for each gate."""
    return recipes.gate_arms(loading.read(pathlib.Path(__file__).with_name("whole.py")))
