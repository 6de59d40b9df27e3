"""RLVR (GRPO) on Qwen3-8B with the settings of the paper's baseline (arXiv 2605.06188).

    opsd-jax train --config configs/qwen3_8b_rlvr_v5e64.py --workdir runs/qwen3_8b_rlvr_v5e64 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl

Hardware: a TPU v5e-64 (64 chips with 16 GB each).
Memory: the fullest phase leaves 1.9 GiB of 15.75 GiB free on each chip.
Time: 20.6 to 27.6 hours for 100 steps and the evaluations, at the chips' peak rates. Compilation,
verification and checkpoints take additional time.
Expected result: higher accuracy on held-out problems. We know of no published figure for this run.

Plan: configs/plans/qwen3_8b_rlvr_v5e64.txt, whose first line is the command that makes it.
The programs were compiled for this hardware but have not run on it.
"""

from opsd_jax.config import recipes


def get_config():
    """Returns the paper's RLVR config with meshes for 64 chips.

    Training splits heads, vocabulary and, between layers, tokens over four chips. Sampling splits
    the weights over eight chips, as many as the model has key-value heads. This leaves memory for
    twice as many decoding slots. In training, rollouts share rows of two lengths.
    """
    config = recipes.paper_rlvr("qwen3-8b")
    config.mesh = (1, 16, 4)
    config.decode_mesh = (1, 8, 8)
    config.model.sequence_parallel = True
    config.rlvr.update({"slots": 256, "packing": True, "buckets": (9216, 18_432)})
    return config
