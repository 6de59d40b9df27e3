"""OPSD on Qwen3-8B with the paper's settings, on a v5p-32 (16 chips of 95 GB).

    opsd-jax train --config configs/qwen3_8b_opsd_v5p32.py --workdir runs/qwen3_8b_opsd_v5p32 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_opsd_v5p32.py --topology v5p:2x2x4

PLAN
"""

from opsd_jax import recipes


def get_config():
    """Weights are cut over four chips while sampling: every step reads them."""
    config = recipes.paper_opsd("qwen3-8b")
    config.decode_mesh = (1, 4, 4)
    config.opsd.memo.slots = 32
    return config
