"""The paper's comparison: OPSD on correct, on incorrect and on all rollouts, from one RLVR model.

    opsd-jax train --config quickstart_arms --workdir runs/arms

Hardware: two CPU cores, 2 GB of memory; about six minutes. Expect all three arms to shorten the
responses by similar amounts, Correct-only to keep the accuracy, and Incorrect-only to lose 9 to 20
points, depending on the seed.
"""

from opsd_jax.config import loading, recipes


def get_config():
    """Returns the quickstart config with one OPSD stage for each gate."""
    return recipes.gate_arms(loading.read("quickstart"))
