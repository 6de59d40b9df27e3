"""OPSD (Correct-only) on Qwen3-32B with the paper's settings (arXiv 2605.06188).

    opsd-jax train --config configs/qwen3_32b_opsd_v5p128.py --workdir runs/qwen3_32b_opsd_v5p128 \
        --config.model.path=/models/Qwen3-32B --config.data.train.problems.path=problems.jsonl

Hardware: a TPU v5p-128 (64 chips with 95 GB each).
Memory: the fullest phase leaves 76.4 GiB of 95.74 GiB free on each chip.
Time: 1.97 to 2.28 hours for 100 steps and the evaluations, at the chips' peak rates. Compilation,
verification and checkpoints take additional time.
Expected result: the paper has none for this size. For Qwen3-8B it reports responses 29 % shorter
with an accuracy 1.0 points lower.

Plan: configs/plans/qwen3_32b_opsd_v5p128.txt, whose first line is the command that makes it.
The programs were compiled for this hardware but have not run on it.
"""

from opsd_jax.config import recipes


def get_config():
    """Returns the paper's OPSD config with meshes for 64 chips.

    A microbatch has 16 rows, each on four chips. Every decoding step reads all weights, so sampling
    splits them over eight chips, as many as the model has key-value heads.
    """
    config = recipes.paper_opsd("qwen3-32b")
    config.mesh = (1, 16, 4)
    config.decode_mesh = (1, 8, 8)
    config.model.sequence_parallel = True
    config.opsd.memo.slots = 32
    return config
