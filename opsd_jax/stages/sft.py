"""SFT: cross-entropy on demonstrations, over their response tokens."""

from __future__ import annotations

import functools

import ml_collections
import numpy as np

from opsd_jax import losses
from opsd_jax.data.task import Demonstration, Task
from opsd_jax.parallel.mesh import rows_in_context
from opsd_jax.policy import Policy
from opsd_jax.problem import DataError
from opsd_jax.stages.batch import pack, response_head, useful_fraction
from opsd_jax.training.stage import Stage, StepData

WINDOW = 16  # steps whose demonstrations are sorted by length together, so that each pads little


def loss_fn(policy: Policy, chunk: int, params, teacher, microbatch):
    """Sum over response tokens of -log p(token), and their number."""
    del teacher
    loss = losses.sft(
        student=response_head(policy, params, microbatch["student"]),
        tokens=microbatch["targets"],
        mask=microbatch["mask"],
        chunk=chunk,
        partition=rows_in_context(),
    )
    return loss.sum, (loss.weight, {"token_accuracy": loss.metric("accuracy")})


def stage(config: ml_collections.ConfigDict, task: Task, policy: Policy, seed: int) -> Stage:
    """The SFT stage; `config` is `config.sft` (see opsd_jax/config.py)."""
    demonstrations = task.demonstrations(seed)

    def length(row: Demonstration) -> int:
        tokens = len(row.prompt) + len(row.response)
        if tokens - 1 > config.buckets[-1]:
            raise DataError(
                f"the demonstration to {task.tokenizer.decode(row.prompt)[:60]!r} has {tokens} "
                f"tokens; the last of the stage's buckets is {config.buckets[-1]}, for one more."
            )
        return tokens

    batch_of = functools.partial(
        pack,
        buckets=[{"student": tokens} for tokens in config.buckets],
        microbatch=config.microbatch,
        capacity=config.batch_size,
        pad_id=task.tokenizer.pad_id,
    )

    @functools.lru_cache(maxsize=1)
    def window(index: int) -> list[list[Demonstration]]:
        """The rows of the WINDOW steps from index * WINDOW on, each step's alike in length."""
        size = config.batch_size * WINDOW
        rows = sorted((demonstrations[index * size + i] for i in range(size)), key=length)
        order = np.random.default_rng((seed, index)).permutation(WINDOW)
        return [rows[i * config.batch_size : (i + 1) * config.batch_size] for i in order]

    def batches(step, params):
        del params
        rows = window(step // WINDOW)[step % WINDOW]
        batch = batch_of([{"student": row.prompt, "response": row.response} for row in rows])
        metrics = {
            "length": float(np.mean([len(row.response) for row in rows])),
            "tokens": float(sum(map(length, rows))),
            "useful_tokens": useful_fraction([batch]),
        }
        return StepData([batch], metrics)

    return Stage(
        steps=config.steps,
        updates=1,
        batches=batches,
        empty_batch=batch_of([]),
        loss=functools.partial(loss_fn, policy, config.loss_chunk),
    )
