"""OPSD (Correct-only) on Qwen3-8B with a low-rank adapter, on a small TPU with eight chips.

    opsd-jax train --config configs/qwen3_8b_lora_opsd_v5e8.py --workdir runs/qwen3_8b_lora_v5e8 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl

Hardware: a TPU v5e-8 (8 chips with 16 GB each).
Memory: the fullest phase leaves 4.8 GiB of 15.75 GiB free on each chip.
Time: 1.44 to 2 hours for 100 steps and the evaluations, at the chips' peak rates. Compilation,
verification and checkpoints take additional time.
Expected result: unknown. The paper (arXiv 2605.06188) trains all parameters and reports responses
29 % shorter and an accuracy 1.0 points lower.

Plan: configs/plans/qwen3_8b_lora_opsd_v5e8.txt, whose first line is the command that makes it.
The programs were compiled for this hardware but have not run on it.
"""

from opsd_jax import config as config_lib
from opsd_jax.config import recipes


def get_config():
    """Returns the OPSD recipe with an adapter of rank 64 on all matrices of the layers.

    Training splits the base model over eight chips, and gathers one layer at a time. Each chip has
    one row, which several rollouts share. Sampling splits the weights over eight chips, as many as
    the model has key-value heads.
    """
    config = recipes.opsd("qwen3-8b")
    config.adapter = config_lib.lora(rank=64, alpha=128.0)  # as in the code of arXiv 2601.18734
    config.opsd.optimizer.learning_rate = 1e-5  # ten times that of all parameters
    config.mesh = (1, 8, 1)
    config.decode_mesh = (1, 1, 8)
    config.opsd.update({"microbatch": 8, "packing": True})
    config.opsd.update({"buckets": (9216,), "teacher_buckets": (12_288,)})
    config.evaluation.slots = 32
    return config
