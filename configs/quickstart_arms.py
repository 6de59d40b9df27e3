"""The paper's comparison: OPSD on correct, incorrect and all rollouts of one RLVR model.

    opsd-jax train --config configs/quickstart_arms.py --workdir runs/arms

Hardware: two CPU cores and 2 GB of memory.
Time: about seven minutes.
Expected result: all three arms shorten the responses by a similar amount. Correct-only keeps the
accuracy, and Incorrect-only loses ten points or more.
"""

from opsd_jax import config as config_lib


def get_config():
    """The quickstart with three OPSD stages, one for each gate."""
    config = config_lib.default()
    arms = {f"opsd_{gate}": gate for gate in ("correct", "incorrect", "all")}
    with config.unlocked():
        for name, gate in arms.items():
            config[name] = config.opsd.copy_and_resolve_references()
            config[name].gate = gate
        del config.opsd
    config.stages = ("sft", "rlvr", *arms)
    return config
