"""RLVR (GRPO) on Qwen3-8B with the settings of the paper's baseline (arXiv 2605.06188).

    opsd-jax train --config configs/qwen3_8b_rlvr_v5p32.py --workdir runs/qwen3_8b_rlvr_v5p32 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl

Hardware: a TPU v5p-32 (16 chips with 95 GB each).
Memory: the fullest phase leaves 44.1 GiB of 95.74 GiB free on each chip.
Time: 25.2 to 33.7 hours for 100 steps and the evaluations, at the chips' peak rates. Compilation,
verification and checkpoints take additional time.
Expected result: higher accuracy on held-out problems. We know of no published figure for this run.

Plan: configs/plans/qwen3_8b_rlvr_v5p32.txt, whose first line is the command that makes it.
The programs were compiled for this hardware but have not run on it.
"""

from opsd_jax.config import recipes


def get_config():
    """Returns the paper's RLVR config; sampling splits the weights over four chips."""
    config = recipes.paper_rlvr("qwen3-8b")
    config.decode_mesh = (1, 4, 4)
    return config
