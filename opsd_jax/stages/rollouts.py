"""What the stages with rollouts share: which problems a step takes, and what is told of them."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import grain
import ml_collections
import numpy as np

from opsd_jax.data.task import Task
from opsd_jax.policy import Params
from opsd_jax.rollout import sampling
from opsd_jax.rollout.collect import Collector, Rollouts, concatenated
from opsd_jax.verify.outcomes import Groups
from opsd_jax.verify.verdict import REASONS

RollOut = Callable[[int, Params], Rollouts]


def step_rollouts(
    config: ml_collections.ConfigDict,
    task: Task,
    collector: Collector,
    seed: int,
    *,
    vocab_size: int,
    capacity: int,
    trains: Callable[[Groups], np.ndarray],
    poll: Callable[[], None] = lambda: None,
) -> RollOut:
    """`(step, params) -> Rollouts` of the step's problems.

    These and the random numbers are functions of (seed, step) alone, on any number of hosts.

    Dynamic sampling (DAPO, arXiv 2503.14476): where fewer than `capacity` rollouts train, up to
    `config.resample_rounds` further rounds roll out other problems, drawn apart from the epoch's
    order, as many as would do if all of theirs did.

    Args:
      config: of the stage.
      task: of the run.
      collector: samples and verifies.
      seed: of the stage.
      vocab_size: the model's.
      capacity: how many rollouts a step trains on.
      trains: which of some rollouts do, bool [N].
      poll: called while sampling; what it raises ends it.
    """

    def stream(seed: int) -> grain.MapDataset:
        return task.stream(seed) if task.stream else task.train.shuffle(seed=seed).repeat()

    other_seed = zlib.crc32(f"{seed}/resampled".encode()) >> 1
    problems, others = stream(seed), stream(other_seed)
    rule = sampling.rule(vocab_size, stop=task.tokenizer.eos_ids, temperature=config.temperature)

    def roll_out(step: int, params: Params) -> Rollouts:
        def sample(chosen: list, seed: int, draw: int) -> Rollouts:
            key = sampling.folded_key(seed, draw)
            return collector(params, chosen, key=key, rule=rule, poll=poll)

        first = step * config.prompts
        rollouts = sample([problems[first + i] for i in range(config.prompts)], seed, step)
        for again in range(config.resample_rounds):
            missing = capacity - int(trains(rollouts.judged.groups).sum())
            if missing <= 0:
                break
            draw = step * config.resample_rounds + again
            there = {problem.id for problem in rollouts.problems}
            wanted = -(-missing // config.group_size)  # at most config.prompts
            drawn = [others[draw * config.prompts + i] for i in range(wanted)]
            fresh = [*{p.id: p for p in drawn if p.id not in there}.values()]
            if not fresh:
                break
            rollouts = concatenated([rollouts.settled(), sample(fresh, other_seed, draw)])
        return rollouts

    return roll_out


def rollout_metrics(rollouts: Rollouts, group_size: int) -> dict[str, float]:
    """Numbers of a step's rollouts: reward, length in tokens, the groups of rollouts, how many
    problems were all right and all wrong, how many verdicts had which reason.
    """
    verdicts, (correct, incorrect, truncated), wait_seconds = rollouts.judged
    lengths = rollouts.lengths
    by_problem = correct.reshape(-1, group_size).mean(axis=1)
    reasons = Counter(dict.fromkeys(REASONS, 0))
    reasons.update(verdict.reason for verdict in verdicts)
    return {
        "reward": float(correct.mean()),
        "length": float(lengths.mean()),
        "incorrect": float(incorrect.mean()),
        "truncated": float(truncated.mean()),
        "tokens": float(lengths.sum()),
        "problems": float(len(by_problem)),
        "groups_all_correct": float(np.sum(by_problem == 1)),
        "groups_all_incorrect": float(np.sum(by_problem == 0)),
        "verifier_wait_seconds": wait_seconds,
    } | {f"verdict/{reason.replace(' ', '_')}": float(reasons[reason]) for reason in reasons}


def group_records(rollouts: Rollouts, group_size: int) -> list[dict[str, Any]]:
    """A JSON-ready record a problem: how many of how many rollouts were correct."""
    correct = rollouts.judged.groups.correct.reshape(-1, group_size).sum(axis=1)
    return [
        {
            "problem": problem.id,
            **({"source": problem.source} if problem.source else {}),
            "correct": int(right),
            "rollouts": group_size,
        }
        for problem, right in zip(rollouts.problems[::group_size], correct, strict=True)
    ]
