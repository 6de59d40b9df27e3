"""RLVR and, from its result, OPSD on correct, on incorrect and on all rollouts of SmolLM2-135M.

    python benchmarks/arms.py --config configs/smollm2/arms.py --workdir runs/smollm2_arms \\
        --config.init_from=runs/smollm2/sft --config.model.path=models/SmolLM2-135M-Instruct

It begins with the SFT model of ./launch/released.sh. Hardware: two CPU cores, 9 GB of memory; an
estimated hour and a half for each seed. It has not been run yet.
"""

import pathlib

from opsd_jax.config import loading, recipes


def get_config():
    """Returns the config of whole.py without SFT, with one OPSD stage for each gate."""
    config = loading.read(pathlib.Path(__file__).with_name("whole.py"))
    with config.unlocked():
        del config.sft
    config.stages = ("rlvr", "opsd")
    config.rlvr.init_from = ""
    return recipes.gate_arms(config)
