"""The quickstart: SFT, RLVR and OPSD (Correct-only) on the embedded task, from random parameters.

    opsd-jax train --config configs/quickstart.py --workdir runs/quickstart

Hardware: two CPU cores and 2 GB of memory.
Time: about five minutes.
Expected result: RLVR raises the held-out accuracy by more than 10 points. OPSD then shortens the
responses by about 45 % at the same accuracy.

opsd_jax/config documents every field and its default value. `--config.opsd.gate=incorrect` changes
one field.
"""

from opsd_jax import config as config_lib


def get_config():
    """The default config."""
    return config_lib.default()
