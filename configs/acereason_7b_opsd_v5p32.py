"""OPSD (Correct-only) on AceReason-Nemotron-7B with the paper's settings (arXiv 2605.06188).

    opsd-jax train --config configs/acereason_7b_opsd_v5p32.py --workdir runs/acereason \
        --config.model.path=/models/AceReason-7B --config.data.train.problems.path=problems.jsonl

Hardware: a TPU v5p-32 (16 chips with 95 GB each).
Memory: the fullest phase leaves 82.1 GiB of 95.74 GiB free on each chip.
Time: 0.945 to 1.11 hours for 100 steps and the evaluations, at the chips' peak rates. Compilation,
verification and checkpoints take additional time.
Expected result: the paper reports responses 29 % shorter and an accuracy 3.5 points higher, mostly
within 25 steps.

Plan: configs/plans/acereason_7b_opsd_v5p32.txt, whose first line is the command that makes it.
The programs were compiled for this hardware but have not run on it.
"""

from opsd_jax.config import recipes


def get_config():
    """Returns the paper's OPSD config with the meshes of qwen3_8b_opsd_v5p32.py.

    The model has four key-value heads, so sampling cannot split it over more than four chips.
    """
    config = recipes.paper_opsd("acereason-nemotron-7b")
    config.mesh = (1, 8, 2)
    config.opsd.microbatch = 8
    config.decode_mesh = (1, 4, 4)
    config.opsd.memo.slots = 32
    return config
