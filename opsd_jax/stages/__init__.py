"""The training algorithms SFT, RLVR and OPSD, in the table `ALGORITHMS`.

A stage's section of the config names its algorithm: a key of the table, or
"package.module:ALGORITHM" for your own `Algorithm`. docs/extending.md adds one.
"""

from opsd_jax.options import look_up
from opsd_jax.stages import opsd, rlvr, sft
from opsd_jax.stages.algorithm import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "sft": sft.ALGORITHM,
    "rlvr": rlvr.ALGORITHM,
    "opsd": opsd.ALGORITHM,
}


def algorithm_of(name: str, field: str = "algorithm") -> Algorithm:
    """Returns the `Algorithm` that `name` refers to: a key of `ALGORITHMS`, or an import path.

    Args:
      name: a key of `ALGORITHMS`, or "package.module:ALGORITHM".
      field: the config field that holds the name, for the error.

    Raises:
      ConfigError: there is no such algorithm.
    """
    return look_up(ALGORITHMS, name, Algorithm, field)
