"""OPSD on Qwen3-8B with the paper's settings, on a v5e-64 (64 chips of 16 GB).

    opsd-jax train --config configs/qwen3_8b_opsd_v5e64.py --workdir runs/qwen3_8b_opsd_v5e64 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_opsd_v5e64.py --topology v5e:8x8

PLAN
"""

from opsd_jax import recipes


def get_config():
    """Heads, vocabulary and, between layers, tokens lie over four chips."""
    config = recipes.paper_opsd("qwen3-8b")
    config.mesh = (1, 16, 4)
    config.model.sequence_parallel = True
    config.opsd.memo.slots = 32
    return config
