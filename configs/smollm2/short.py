"""The whole run of configs/smollm2/whole.py with few steps: every stage, but no result.

    ./launch/released.sh --short    # opsd-jax train --config configs/smollm2/short.py ...

Hardware: two CPU cores, 11.5 GB of memory, 15 minutes with the installation.
"""

import pathlib

from opsd_jax.config import loading


def get_config():
    """Returns the config of whole.py with fewer steps, smaller batches and fewer problems."""
    config = loading.read(pathlib.Path(__file__).with_name("whole.py"))
    config.sft.update({"steps": 14, "checkpoint_every": 7})
    config.sft.optimizer.learning_rate = 3e-4
    config.rlvr.update({"steps": 3, "prompts": 4, "slots": 32, "checkpoint_every": 1})
    config.opsd.update({"steps": 3, "prompts": 32, "slots": 32, "max_rows": 8})
    config.opsd.update({"checkpoint_every": 1})
    config.evaluation.update({"problems": 32, "slots": 32})
    return config
