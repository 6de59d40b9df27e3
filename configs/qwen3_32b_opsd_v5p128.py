"""OPSD on Qwen3-32B with the paper's settings, on a v5p-128 (64 chips of 95 GB).

    opsd-jax train --config configs/qwen3_32b_opsd_v5p128.py --workdir runs/qwen3_32b_opsd_v5p128 \
        --config.model.path=/models/Qwen3-32B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_32b_opsd_v5p128.py --topology v5p:4x4x4

PLAN
"""

from opsd_jax import recipes


def get_config():
    """Sixteen rows at a time, each over four chips."""
    config = recipes.paper_opsd("qwen3-32b")
    config.mesh = (1, 16, 4)
    config.model.sequence_parallel = True
    config.opsd.memo.slots = 32
    return config
