"""Measures what padding, packing and dropped rows cost in the OPSD train step.

    python benchmarks/step.py [--repeats 5]

A step has 128 rollouts with exponentially distributed lengths (mean 128, at most 512 tokens),
prompts of 16 to 64 tokens, and 32 to 128 more tokens of context for the teacher. The model has
Qwen3's architecture with 4 layers of width 256, a vocabulary of 4,096 tokens and float32 weights.

Several responses share a row, of one of two padded lengths. In the `apart` case, each response has
a row of its own, of one of eight padded lengths. The `plain` cases run the same step with one
padded length for all rows. They drop no rows, so rows with weight 0 are computed like the others.
The cases run alternately. Times are medians of the
process's CPU seconds, which vary less than wall-clock time on a shared machine. The benchmark takes
about ten minutes on two cores.
"""

import argparse
import functools
import json
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opsd_jax import config as config_lib
from opsd_jax import losses
from opsd_jax.models import decoder
from opsd_jax.stages import batch as batch_lib
from opsd_jax.stages import opsd
from opsd_jax.stages.packing import Packing
from opsd_jax.stages.teacher import TeacherOptions, frozen, make_head
from opsd_jax.training.state import init_state
from opsd_jax.training.step import make_train_step
from opsd_jax.verify.outcomes import Outcomes

ROWS, MICROBATCH, V = 128, 4, 4096
FEW, LARGE_MICROBATCH = 32, 16  # responses and rows of `useful_token_fraction_32_rows`
PROMPT, CONTEXT, RESPONSE = 64, 128, 512  # largest number of tokens
WHOLE = [{"student": PROMPT + RESPONSE, "teacher": PROMPT + CONTEXT + RESPONSE}]
SHARED = [{"student": 288, "teacher": 464}, *WHOLE]
APART = [
    {"student": student, "teacher": student + CONTEXT - 48}
    for student in (96, 128, 160, 208, 264, 344, 448)
] + WHOLE


def rollouts(seed: int = 0) -> list[dict]:
    """Returns the rows of a step's rollouts, all of them correct."""
    rng = np.random.default_rng(seed)
    token_ids = lambda n: rng.integers(1, V, n).tolist()
    rows = []
    for _ in range(ROWS):
        length = int(np.clip(rng.exponential(128), 1, RESPONSE))
        prompt = token_ids(rng.integers(16, PROMPT + 1))
        rows.append(
            {
                "student": prompt,
                "teacher": prompt + token_ids(rng.integers(32, CONTEXT + 1)),
                "response": token_ids(length),
                "behaviour_logprobs": [-1.0] * length,
                "correct": True,
                "incorrect": False,
                "truncated": False,
            }
        )
    return rows


def pack(rows: list[dict], buckets: list[dict], microbatch: int = MICROBATCH) -> batch_lib.Batch:
    """Packs responses into microbatches of the buckets' shapes. They share rows in SHARED."""
    return batch_lib.pack(
        rows,
        buckets=buckets,
        microbatch=microbatch,
        capacity=ROWS,
        per_token=["behaviour_logprobs"],
        per_row=Outcomes._fields,
        pad_id=0,
        packing=Packing() if buckets is SHARED else None,
    )


def main(repeats: int) -> None:
    """Checks that padding does not change the loss; prints the times, and last a line of JSON."""
    section = config_lib.decoder(
        vocab_size=V, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=4,
        num_kv_heads=2, head_dim=64, scan_unroll=1, remat="full",
    )  # fmt: skip
    model = decoder.from_config(section)
    head = make_head(model.policy, TeacherOptions())
    loss = functools.partial(opsd.loss_fn, model.policy, head, losses.OPSD(), 1.0, 0)
    optimizer = optax.adamw(1e-5)
    params = jax.jit(model.init)(jax.random.key(0))
    state = init_state(params, optimizer, frozen())
    state["teacher"] = jax.tree.map(lambda x: 1.05 * x, state["teacher"])
    step = jax.jit(make_train_step(loss, optimizer))

    rows = rollouts()
    chosen = set(np.random.default_rng(1).permutation(ROWS)[: ROWS // 4].tolist())
    kept = [row for i, row in enumerate(rows) if i in chosen]
    gated = [row | {"correct": i in chosen} for i, row in enumerate(rows)]
    cases = {
        "all": pack(rows, SHARED),
        "quarter": pack(kept, SHARED),
        "apart": pack(rows, APART),
        "plain": pack(rows, WHOLE),
        "plain, quarter": pack(gated, WHOLE),
    }
    found = {name: jax.device_get(step(state, batch)[1]["loss"]) for name, batch in cases.items()}
    for ours, plain in (("all", "plain"), ("apart", "plain"), ("quarter", "plain, quarter")):
        np.testing.assert_allclose(found[ours], found[plain], rtol=1e-4)

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, batch in cases.items():
            began = time.process_time()
            jax.block_until_ready(step(state, batch))
            seconds[name].append(time.process_time() - began)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    few = {
        "few": pack(rows[:FEW], SHARED, LARGE_MICROBATCH),
        "few, apart": pack(rows[:FEW], APART, LARGE_MICROBATCH),
    }
    useful = {name: batch_lib.useful_fraction([b]) for name, b in (cases | few).items()}
    for name in cases:
        counts = [int(bucket["count"]) for bucket in cases[name]]
        print(
            f"{name:<16}{median[name]:8.2f} s   useful {useful[name]:.3f}   "
            f"microbatches {counts}   ({min(seconds[name]):.2f} to {max(seconds[name]):.2f} s)"
        )
    print(
        json.dumps(
            {
                "quarter_active_time_ratio": round(median["quarter"] / median["all"], 3),
                "packed_time_ratio": round(median["all"] / median["apart"], 3),
                "useful_token_fraction": round(useful["all"], 3),
                "useful_token_fraction_apart": round(useful["apart"], 3),
                "useful_token_fraction_32_rows": round(useful["few"], 3),
                "useful_token_fraction_32_rows_apart": round(useful["few, apart"], 3),
                "useful_token_fraction_padded": round(useful["plain"], 3),
                "speedup_over_padded": round(median["plain"] / median["all"], 2),
                "speedup_over_padded_quarter_active": round(
                    median["plain, quarter"] / median["quarter"], 2
                ),
                "device": str(jnp.zeros(1).devices().pop()),
                "repeats": repeats,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    main(parser.parse_args().repeats)
