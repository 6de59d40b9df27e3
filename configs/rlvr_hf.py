"""RLVR (DAPO) on your own Hugging Face model and problems.

    opsd-jax train --config configs/rlvr_hf.py --workdir runs/rlvr \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax convert --workdir runs/rlvr --out models/after-rlvr    # for configs/opsd_hf.py

Each row of the data file has `problem` and `answer`. 64 problems are held out. docs/own_model.md
explains every step.

Hardware: sized for Qwen3-8B on 16 TPU v5p chips, but it has not run there. A smaller model needs
less.
Expected result: the accuracy rises slowly, over hundreds of steps.
Settings: a step samples 8 rollouts of up to 8,192 tokens for each of 32 problems. It replaces
problems whose rollouts are all correct or all incorrect.
"""

from opsd_jax.config import recipes


def get_config():
    """Returns a config with one RLVR stage that starts from the model's own parameters."""
    return recipes.rlvr()
