"""OPSD (Correct-only) on a Hugging Face model of yours, with problems of yours.

    opsd-jax train --config configs/opsd_hf.py --workdir runs/opsd \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl

The model should come from RL: `configs/rlvr_hf.py` and `opsd-jax convert` make such a directory. A
row of the file has `problem`, `answer` and, where there is one, `solution`; 64 problems are held
out. docs/own_model.md goes through it.

Hardware: sized for Qwen3-8B on 16 TPU v5p chips, and not run there; a smaller model does with less.
Sampling, batch and optimiser are those of the paper's code (arXiv 2605.06188): 32 problems a step,
one rollout each of up to 8,192 tokens, learning rate 1e-6. Its teacher sees a memo that the model
makes of the answer; `opsd.contexts = ("memo",)` does that here, for a second sampling. Expect
responses some 30 % shorter at the same accuracy, most of it within 25 steps; on another model look
at the report before you believe it.
"""

from opsd_jax.config import recipes


def get_config():
    """One stage, from the model as it is."""
    return recipes.opsd()
