"""OPSD (Correct-only) on Qwen3-0.6B, on a small TPU with four chips.

    opsd-jax train --config configs/qwen3_0_6b_opsd_v5e4.py --workdir runs/qwen3_0_6b_opsd_v5e4 \
        --config.model.path=/models/Qwen3-0.6B --config.data.train.problems.path=problems.jsonl

Hardware: a TPU v5e-4 (4 chips with 16 GB each).
Memory: the fullest phase leaves 3.0 GiB of 15.75 GiB free on each chip.
Time: 1.74 to 1.87 hours for 100 steps and the evaluations, at the chips' peak rates. Compilation,
verification and checkpoints take additional time.
Expected result: the paper (arXiv 2605.06188) has none for this size. For Qwen3-8B it reports
responses 29 % shorter with an accuracy 1.0 points lower.

Plan: configs/plans/qwen3_0_6b_opsd_v5e4.txt, whose first line is the command that makes it.
The programs were compiled for this hardware but have not run on it.
"""

from opsd_jax.config import recipes


def get_config():
    """Returns the paper's OPSD config, except that a memo has at most 2,048 tokens."""
    config = recipes.paper_opsd("qwen3-0.6b")
    config.opsd.microbatch = 4
    config.opsd.memo.update({"tokens": 2048, "close_tokens": 512, "slots": 16})
    config.evaluation.slots = 32
    return config
