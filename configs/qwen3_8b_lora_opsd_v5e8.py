"""OPSD (Correct-only) on Qwen3-8B with a low-rank adapter, on a small TPU with eight chips.

    opsd-jax train --config configs/qwen3_8b_lora_opsd_v5e8.py --workdir runs/qwen3_8b_lora_v5e8 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
"""

from opsd_jax import config as config_lib
from opsd_jax.config import recipes


def get_config():
    """Returns the OPSD recipe with an adapter of rank 64 on all matrices of the layers.

    Training splits the base model over eight chips, and gathers one layer at a time. Sampling
    splits the weights over eight chips, as many as the model has key-value heads.
    """
    config = recipes.opsd("qwen3-8b")
    config.adapter = config_lib.lora(rank=64, alpha=128.0)  # as in the code of arXiv 2601.18734
    config.opsd.optimizer.learning_rate = 1e-5  # ten times that of all parameters
    config.mesh = (1, 8, 1)
    config.decode_mesh = (1, 1, 8)
    config.opsd.microbatch = 8
    config.evaluation.slots = 32
    return config
