"""The comparison of gates on the built-in task, with low-rank adapters in RLVR and OPSD.

    opsd-jax train --config quickstart_lora --workdir runs/lora

Hardware: two CPU cores, 2 GB of memory; about seven minutes. SFT trains all parameters, because
there is no pretrained model. RLVR and OPSD train adapters of rank 8, which have 0.03 million
parameters. Expect about what quickstart_arms gives: RLVR gains more than 10 points, and
Correct-only then shortens responses by more than 40 % at that accuracy.
"""

from opsd_jax import config as config_lib
from opsd_jax.config import loading


def get_config():
    """Returns the config quickstart_arms with an adapter in all stages but SFT.

    Their learning rates are ten times those of all parameters.
    """
    config = loading.read("quickstart_arms")
    adapted = [name for name in config.stages if name != "sft"]
    config.adapter = config_lib.lora(rank=8, alpha=16.0, stages=tuple(adapted))
    for name in adapted:
        config[name].optimizer.learning_rate *= 10
    return config
