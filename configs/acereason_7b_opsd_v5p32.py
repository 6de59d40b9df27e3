"""OPSD on AceReason-Nemotron-7B with the paper's settings, on a v5p-32 (16 chips of 95 GB).

    opsd-jax train --config configs/acereason_7b_opsd_v5p32.py --workdir runs/acereason \
        --config.model.path=/models/AceReason-7B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/acereason_7b_opsd_v5p32.py --topology v5p:2x2x4

PLAN
"""

from opsd_jax import recipes


def get_config():
    """Weights are cut over four chips while sampling, as many as there are key-value heads."""
    config = recipes.paper_opsd("acereason-nemotron-7b")
    config.decode_mesh = (1, 4, 4)
    config.opsd.memo.slots = 32
    return config
