"""The paper's comparison: OPSD on correct, on incorrect and on all rollouts, from one RLVR model.

    opsd-jax train --config configs/quickstart_arms.py --workdir runs/arms

Hardware: two CPU cores, 2 GB of memory; some seven minutes. Expect all three arms to shorten the
responses alike, Correct-only to keep the accuracy, and Incorrect-only to lose ten points or more.
"""

from opsd_jax import config as config_lib


def get_config():
    """The quickstart, with an OPSD stage for each gate in place of one."""
    config = config_lib.default()
    arms = {f"opsd_{gate}": gate for gate in ("correct", "incorrect", "all")}
    with config.unlocked():
        for name, gate in arms.items():
            config[name] = config.opsd.copy_and_resolve_references()
            config[name].gate = gate
        del config.opsd
    config.stages = ("sft", "rlvr", *arms)
    return config
