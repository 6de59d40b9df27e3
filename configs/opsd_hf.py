"""OPSD (Correct-only) on your own Hugging Face model and problems.

    opsd-jax train --config configs/opsd_hf.py --workdir runs/opsd \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl

The model should come from RL; `configs/rlvr_hf.py` and `opsd-jax convert` make such a directory.
Each row of the data file has `problem`, `answer` and optionally `solution`. 64 problems are held
out. docs/own_model.md explains every step.

Hardware: sized for Qwen3-8B on 16 TPU v5p chips, but it has not run there. A smaller model needs
less.
Expected result: responses about 30 % shorter at equal accuracy, mostly within 25 steps. For other
models, check the report.
Settings: those of the paper's code (arXiv 2605.06188), with 32 problems per step, one rollout of up
to 8,192 tokens each, and a learning rate of 1e-6. The paper's teacher sees a memo that the model
writes from the answer. `opsd.contexts = ("memo",)` does the same here and samples a second time.
"""

from opsd_jax.config import recipes


def get_config():
    """Returns a config with one OPSD stage that starts from the model's own parameters."""
    return recipes.opsd()
