"""OPSD (Correct-only) on Qwen3-8B with the paper's settings (arXiv 2605.06188).

    opsd-jax train --config configs/qwen3_8b_opsd_v5p32.py --workdir runs/qwen3_8b_opsd_v5p32 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl

Hardware: a TPU v5p-32 (16 chips with 95 GB each).
Memory: the fullest phase leaves 76.2 GiB of 95.74 GiB free on each chip.
Time: 1.13 to 1.29 hours for 100 steps and the evaluations, at the chips' peak rates. Compilation,
verification and checkpoints take additional time.
Expected result: the paper reports responses 29 % shorter and an accuracy 1.0 points lower, mostly
within 25 steps.

Plan: configs/plans/qwen3_8b_opsd_v5p32.txt, whose first line is the command that makes it.
The programs were compiled for this hardware but have not run on it.
"""

from opsd_jax.config import recipes


def get_config():
    """Returns the paper's OPSD config with meshes for 16 chips.

    Every decoding step reads all weights, so sampling splits them over four chips. Training splits
    each row over two chips: a step has 32 rollouts, and microbatches of 16 rows would need more
    padding. The longest rollouts have rows of their own, and the others share longer rows.
    """
    config = recipes.paper_opsd("qwen3-8b")
    config.mesh = (1, 8, 2)
    config.opsd.update({"microbatch": 8, "packing": True})
    config.opsd.update({"buckets": (9216, 12_032), "teacher_buckets": (12_288, 20_992)})
    config.decode_mesh = (1, 4, 4)
    config.opsd.memo.slots = 32
    return config
