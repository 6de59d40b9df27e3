"""RLVR: policy-gradient training with reward 1 for correct rollouts and 0 for all others.

`options.objective` combines the parts of GRPO, Dr.GRPO, DAPO, GSPO, RLOO, REINFORCE++ and CISPO
(opsd_jax/losses/policy_gradient.py).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from opsd_jax import losses
from opsd_jax.data.task import Task
from opsd_jax.options import fail, option, with_default
from opsd_jax.parallel.mesh import rows_in_context
from opsd_jax.policy import Policy
from opsd_jax.stages import drift, flops
from opsd_jax.stages.algorithm import Algorithm, Curve, Responses, RowFields
from opsd_jax.stages.batch import pack, response_head
from opsd_jax.stages.options import RolloutOptions, StageOptions
from opsd_jax.stages.packing import Lengths, Packing
from opsd_jax.stages.parts import Parts
from opsd_jax.stages.rollouts import (
    SAMPLER_CURVES,
    RollOut,
    check_prompts,
    make_roll_out,
    no_rollouts,
    rollout_sampling,
    step_data,
    student_lengths,
    student_rows,
)
from opsd_jax.stages.teacher import Keep, frozen
from opsd_jax.training.optimizer import OptimizerOptions
from opsd_jax.training.stage import Stage
from opsd_jax.verify.outcomes import Outcomes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLVROptions(RolloutOptions):
    """The options of an RLVR stage."""

    algorithm: str = with_default(StageOptions, "algorithm", "rlvr")
    steps: int = option(200, "Training steps.", at_least=1)
    group_size: int = option(8, "Rollouts per problem, whose rewards are compared.", at_least=2)
    updates: int = option(
        2, "Optimizer updates per step, on equal parts of the step's rollouts.", at_least=1
    )
    objective: losses.PolicyGradient = option(
        losses.PRESETS["grpo"]._replace(kl_coefficient=0.0, aggregation="token"),
        "The parts of the policy-gradient objective (opsd_jax.losses.PolicyGradient).",
    )
    overlong_buffer: int = option(
        0,
        "Tokens before the budget where DAPO's length penalty begins; 0 for no penalty.",
        at_least=0,
        expects="0 for no penalty, or at most response_tokens",
    )
    overlong_factor: float = option(
        1.0, "Length penalty of a response that fills its budget.", at_least=0
    )
    optimizer: OptimizerOptions = option(
        OptimizerOptions(learning_rate=1e-6, warmup=10, b2=0.999, weight_decay=0.01),
        "AdamW with a schedule.",
    )

    @property
    def capacity(self) -> int:
        """The largest number of rollouts that a step trains on."""
        return self.rollouts

    def optimizer_updates(self) -> int:
        return self.steps * self.updates

    def check(self, field: str) -> None:
        super().check(field)
        if self.overlong_buffer > self.response_tokens:
            expected = f"0 for no penalty, or at most response_tokens = {self.response_tokens}"
            fail(f"{field}.overlong_buffer", self.overlong_buffer, expected)
        if self.resample_rounds and not self.objective.drop_uninformative:
            expected = "0 without objective.drop_uninformative, because nothing is dropped"
            fail(f"{field}.resample_rounds", self.resample_rounds, expected)
        if self.prompts % self.updates:
            fail(f"{field}.updates", self.updates, f"a divisor of prompts = {self.prompts}")


def loss_fn(
    policy: Policy,
    objective: losses.PolicyGradient,
    temperature: float,
    chunk: int,
    params,
    teacher,
    microbatch,
):
    """Returns the sum of a microbatch's policy-gradient losses, the sum's divisor, and metrics.

    `temperature` is the sampling temperature; the policy ratio compares the distributions at this
    temperature. `teacher` holds the reference model's parameters, if the objective has a KL term.
    """
    tokens_mxT, mask_mxT = microbatch["targets"], microbatch["mask"]
    partition = rows_in_context()
    head = functools.partial(response_head, policy, sequences=microbatch["student"])
    reference_mxT = None
    if objective.kl_coefficient:
        reference_mxT = losses.response_logprobs(
            student=jax.lax.stop_gradient(head(teacher)),
            tokens=tokens_mxT,
            mask=mask_mxT,
            temperature=temperature,
            chunk=chunk,
            partition=partition,
        )
    loss = losses.policy_gradient(
        student=head(params),
        tokens=tokens_mxT,
        mask=mask_mxT,
        advantages=microbatch["advantages"],
        behaviour_logprobs=microbatch["behaviour_logprobs"],
        starts=microbatch.get("starts"),
        reference_logprobs=reference_mxT,
        options=objective,
        temperature=temperature,
        chunk=chunk,
        partition=partition,
    )
    metrics = drift.sums(loss) | {
        "entropy": loss.metric("entropy"),
        "ratio_outside_clip": loss.metric("clipped"),
    }
    if objective.kl_coefficient:
        metrics["reference_kl"] = loss.metric("kl")
    return loss.sum, (loss.weight, metrics)


def trains(options: RLVROptions, outcomes: Outcomes) -> np.ndarray:
    """Returns a mask, bool [N], of the rollouts that are used for training.

    All of them are used if the objective keeps uninformative groups.
    """
    if not options.objective.drop_uninformative:
        return np.ones(len(outcomes.correct), bool)
    return losses.informative(outcomes.correct.astype(np.float32), options.group_size)


def rewards_of(options: RLVROptions, outcomes: Outcomes, lengths: np.ndarray) -> np.ndarray:
    """Returns rewards, float32 [N]: 1 for a correct rollout, else 0, minus any length penalty.

    Args:
      options: the options of the stage.
      outcomes: the outcome masks, bool [N] each.
      lengths: tokens of the responses, int [N].
    """
    rewards = outcomes.correct.astype(np.float32)
    if not options.overlong_buffer:
        return rewards
    return rewards + losses.overlong_penalty(
        lengths.astype(np.float32),
        max_tokens=options.response_tokens,
        buffer=options.overlong_buffer,
        factor=options.overlong_factor,
    )


def buckets(options: RLVROptions) -> list[Lengths]:
    """Returns the padded shapes that a microbatch can have, one for each of `options.buckets`."""
    return [{"student": length} for length in options.buckets]


def stage(
    options: RLVROptions,
    task: Task,
    policy: Policy,
    roll_out: RollOut,
    keep: Keep = lambda params: params,
    packing: Packing | None = None,
) -> Stage:
    """Builds the `Stage` that trains with RLVR on the rollouts of `roll_out`.

    Args:
      options: the options of the stage.
      task: the data.
      policy: the model.
      roll_out: returns the rollouts of a step, in whole groups; see `RollOut`.
      keep: converts parameters to the form in which the reference model is stored.
      packing: how responses share rows; None if each has a row of its own.
    """
    batch_of = functools.partial(
        pack,
        buckets=buckets(options),
        microbatch=options.microbatch,
        capacity=options.capacity // options.updates,
        per_token=["behaviour_logprobs"],
        per_row=["advantages"],
        pad_id=task.tokenizer.pad_id,
        packing=packing,
    )

    def batches(step, params, *carried):
        rollouts = roll_out(step, params, *carried)
        rows = student_rows(rollouts, task, options.group_size)
        outcomes = rollouts.judged.outcomes  # waits for the verifier
        rewards = rewards_of(options, outcomes, rollouts.lengths)
        kept = np.flatnonzero(trains(options, outcomes))[: options.capacity]  # whole groups
        advantages = options.objective.advantages(rewards[kept], options.group_size)
        kept_rows = [
            rows(i) | {"advantages": advantage}
            for i, advantage in zip(kept, advantages, strict=True)
        ]
        parts = np.array_split(np.arange(len(kept_rows)), options.updates)
        made = [batch_of([kept_rows[i] for i in part]) for part in parts]
        return step_data(rollouts, task, options, made)

    return Stage(
        steps=options.steps,
        updates=options.updates,
        batches=batches,
        empty_batch=batch_of([]),
        loss=functools.partial(
            loss_fn, policy, options.objective, options.temperature, options.loss_chunk
        ),
        teacher=frozen(keep) if options.objective.kl_coefficient > 0 else None,
        summary=drift.summary,
        carried=no_rollouts(options),
    )


def _make(options: RLVROptions, parts: Parts) -> Stage:
    roll_out = make_roll_out(
        options, parts, capacity=options.capacity, trains=functools.partial(trains, options)
    )
    model = parts.model
    packing = parts.packing(options)
    made = stage(options, parts.task, model.policy, roll_out, model.decode_params, packing)
    reference = int(options.objective.kl_coefficient > 0)
    return made._replace(flops=flops.of_update(model, {"student": parts.trained + reference}))


def _step_rows(options: RLVROptions, responses: Responses) -> tuple[list[int], list[Lengths]]:
    return student_lengths(options, options.capacity // options.updates, responses)


ALGORITHM = Algorithm(
    options=RLVROptions,
    make=_make,
    buckets=buckets,
    check_data=check_prompts,
    step_rows=_step_rows,
    row_fields=RowFields(("prompts", "group_size"), divisor="updates"),
    sampling=rollout_sampling,
    curves=(Curve("reward", "reward"), Curve("length", "mean length, tokens"), *SAMPLER_CURVES),
    headline="accuracy",
)
