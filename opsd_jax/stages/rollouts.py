"""What the stages with rollouts share: which problems a step takes, and what is told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import jax
import ml_collections

from opsd_jax.data.task import Task
from opsd_jax.policy import Params
from opsd_jax.rollout.collect import Collector, Rollouts

RollOut = Callable[[int, Params], Rollouts]


def step_rollouts(
    config: ml_collections.ConfigDict, task: Task, collector: Collector, seed: int
) -> RollOut:
    """`(step, params) -> Rollouts` of the step's `config.prompts` problems: problems and random
    numbers are functions of (seed, step).
    """
    problems = task.train.shuffle(seed=seed).repeat()

    def roll_out(step: int, params: Params) -> Rollouts:
        first = step * config.prompts
        return collector(
            params,
            [problems[first + i] for i in range(config.prompts)],
            key=jax.random.fold_in(jax.random.key(seed), step),
            temperature=config.temperature,
        )

    return roll_out


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Numbers of a step's rollouts: reward, length in tokens, the groups, the verdicts' reasons."""
    correct, incorrect, truncated = rollouts.groups
    lengths = rollouts.lengths
    return {
        "reward": float(correct.mean()),
        "length": float(lengths.mean()),
        "incorrect": float(incorrect.mean()),
        "truncated": float(truncated.mean()),
        "tokens": float(lengths.sum()),
        "verifier_wait_seconds": rollouts.wait_seconds,
    } | {
        f"verdict/{reason.replace(' ', '_')}": float(count)
        for reason, count in Counter(v.reason for v in rollouts.verdicts).items()
    }
