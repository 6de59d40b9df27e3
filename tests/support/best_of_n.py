"""A fourth algorithm, as a user would write one: best-of-n SFT on correct rollouts.

Each step samples n rollouts per problem and imitates the shortest correct one.
"""

import dataclasses
import functools

import numpy as np

from opsd_jax.options import fail, option
from opsd_jax.stages import sft
from opsd_jax.stages.algorithm import Algorithm, Curve, RowFields
from opsd_jax.stages.batch import pack
from opsd_jax.stages.options import RolloutOptions
from opsd_jax.stages.rollouts import (
    check_prompts,
    make_roll_out,
    no_rollouts,
    rollout_sampling,
    step_data,
    student_lengths,
    student_rows,
)
from opsd_jax.training.stage import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfNOptions(RolloutOptions):
    """The options of a best-of-n stage."""

    algorithm: str = option("best_of_n:ALGORITHM", "Algorithm of the stage.")
    least: int = option(1, "Correct rollouts that a problem needs to be trained on.", at_least=1)

    def check(self, field):
        super().check(field)
        if self.least > self.group_size:
            fail(f"{field}.least", self.least, f"at most group_size = {self.group_size}")


def chosen(options, rollouts):
    """Returns the index of the shortest correct rollout of each problem with enough of them."""
    correct = rollouts.judged.outcomes.correct.reshape(-1, options.group_size)
    lengths = np.where(correct, rollouts.lengths.reshape(correct.shape), np.inf)
    best = np.arange(len(correct)) * options.group_size + lengths.argmin(axis=1)
    return best[correct.sum(axis=1) >= options.least].tolist()


def make(options, parts):
    roll_out = make_roll_out(options, parts, capacity=options.rollouts, trains=lambda o: o.correct)
    batch_of = functools.partial(
        pack, buckets=sft.buckets(options), microbatch=options.microbatch,
        capacity=options.prompts, pad_id=parts.task.tokenizer.pad_id,
    )  # fmt: skip

    def batches(step, params, *carried):
        rollouts = roll_out(step, params, *carried)
        rows = student_rows(rollouts, parts.task, options.group_size)
        batch = batch_of([rows(i) for i in chosen(options, rollouts)])
        return step_data(rollouts, parts.task, options, [batch])

    loss = functools.partial(sft.loss_fn, parts.model.policy, options.loss_chunk)
    return Stage(options.steps, 1, batches, batch_of([]), loss, carried=no_rollouts(options))


ALGORITHM = Algorithm(
    options=BestOfNOptions,
    make=make,
    buckets=sft.buckets,
    check_data=check_prompts,
    step_rows=lambda options, responses: student_lengths(options, options.prompts, responses),
    row_fields=RowFields(("prompts",)),
    sampling=rollout_sampling,
    curves=(Curve("reward", "reward"), Curve("loss", "loss, nats a token")),
    headline="accuracy",
)
