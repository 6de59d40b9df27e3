"""OPSD on Qwen3-0.6B, on one v5e-4 (four chips of 16 GB): the smallest that one can rent.

    opsd-jax train --config configs/qwen3_0_6b_opsd_v5e4.py --workdir runs/qwen3_0_6b_opsd_v5e4 \
        --config.model.path=/models/Qwen3-0.6B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_0_6b_opsd_v5e4.py --topology v5e:2x2

PLAN
"""

from opsd_jax import recipes


def get_config():
    """The paper's settings; a memo may have 2,048 tokens."""
    config = recipes.paper_opsd("qwen3-0.6b")
    config.opsd.microbatch = 4
    config.opsd.memo.update({"tokens": 2048, "close_tokens": 512, "slots": 16})
    config.evaluation.slots = 32
    return config
