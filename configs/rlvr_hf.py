"""RLVR (DAPO) on a Hugging Face model of yours, with problems of yours.

    opsd-jax train --config configs/rlvr_hf.py --workdir runs/rlvr \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax convert --workdir runs/rlvr --out models/after-rlvr    # for configs/opsd_hf.py

A row of the file has `problem` and `answer`; 64 problems are held out. docs/own_model.md goes
through it.

Hardware: sized for Qwen3-8B on 16 TPU v5p chips, and not run there; a smaller model does with less.
256 rollouts a step, 8 of each of 32 problems, of up to 8,192 tokens; problems that are always or
never solved are left out and replaced. Expect accuracy to rise slowly, over hundreds of steps.
"""

from opsd_jax.config import recipes


def get_config():
    """One stage, from the model as it is."""
    return recipes.rlvr()
