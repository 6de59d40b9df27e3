"""RLVR: policy gradient on rewards of 1 for a correct rollout, else 0.

GRPO, Dr.GRPO, DAPO, GSPO, RLOO, REINFORCE++, CISPO or another choice of the parts that make them
up: `config.objective` (opsd_jax/losses/policy_gradient.py).
"""

from __future__ import annotations

import functools

import jax
import ml_collections
import numpy as np

from opsd_jax import losses
from opsd_jax.data.task import Task
from opsd_jax.parallel.mesh import rows_in_context
from opsd_jax.policy import Policy
from opsd_jax.stages.batch import pack, response_head, useful_fraction
from opsd_jax.stages.rollouts import RollOut, group_records, rollout_metrics
from opsd_jax.stages.teacher import Keep, frozen
from opsd_jax.training.stage import Stage, StepData
from opsd_jax.verify.outcomes import Outcomes


def loss_fn(
    policy: Policy,
    options: losses.PolicyGradient,
    temperature: float,
    chunk: int,
    params,
    teacher,
    microbatch,
):
    """Sum over response tokens of the policy-gradient loss, and its normaliser.

    `temperature` is that of the sampling: the ratio compares the distributions sampled from.
    `teacher` is the reference, if the options have a KL to one.
    """
    tokens_mxT, mask_mxT = microbatch["targets"], microbatch["mask"]
    partition = rows_in_context()
    head = functools.partial(response_head, policy, sequences=microbatch["student"])
    reference_mxT = None
    if options.kl_coefficient:
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
        reference_logprobs=reference_mxT,
        options=options,
        temperature=temperature,
        chunk=chunk,
        partition=partition,
    )
    metrics = {
        "entropy": loss.metric("entropy"),
        "ratio_outside_clip": loss.metric("clipped"),
    }
    if options.kl_coefficient:
        metrics["reference_kl"] = loss.metric("kl")
    return loss.sum, (loss.weight, metrics)


def capacity(config: ml_collections.ConfigDict) -> int:
    """The most rollouts that a step trains on."""
    return config.prompts * config.group_size


def trains(config: ml_collections.ConfigDict, outcomes: Outcomes) -> np.ndarray:
    """Which rollouts have a signal, bool [N]; all, if the objective does not ask."""
    if not config.objective.drop_uninformative:
        return np.ones(len(outcomes.correct), bool)
    return losses.informative(outcomes.correct.astype(np.float32), config.group_size)


def stage(
    config: ml_collections.ConfigDict,
    task: Task,
    policy: Policy,
    roll_out: RollOut,
    keep: Keep = lambda params: params,
) -> Stage:
    """The RLVR stage; `config` is `config.rlvr` (see opsd_jax/config.py).

    `roll_out(step, params)` gives the step's rollouts, `config.group_size` of each problem; `keep`
    says how the reference's parameters are kept.
    """
    options = losses.PolicyGradient(**config.objective)
    batch_of = functools.partial(
        pack,
        buckets=[{"student": length} for length in config.buckets],
        microbatch=config.microbatch,
        capacity=capacity(config) // config.updates,
        per_token=["behaviour_logprobs"],
        per_row=["advantages"],
        pad_id=task.tokenizer.pad_id,
    )

    def batches(step, params):
        rollouts = roll_out(step, params)
        prompts = {p.id: task.prompt(p) for p in rollouts.problems[:: config.group_size]}
        outcomes = rollouts.judged.outcomes  # the first need of the masks
        rewards = outcomes.correct.astype(np.float32)
        if config.overlong_buffer:
            rewards = rewards + losses.overlong_penalty(
                rollouts.lengths.astype(np.float32),
                max_tokens=config.response_tokens,
                buffer=config.overlong_buffer,
                factor=config.overlong_factor,
            )
        kept = np.flatnonzero(trains(config, outcomes))[: capacity(config)]  # whole groups
        rows = [
            {
                "student": prompts[rollouts.problems[i].id],
                "response": rollouts.responses[i],
                "behaviour_logprobs": rollouts.sampling_logprobs[i],
                "advantages": advantage,
            }
            for i, advantage in zip(
                kept, options.advantages(rewards[kept], config.group_size), strict=True
            )
        ]
        parts = np.array_split(np.arange(len(rows)), config.updates)
        made = [batch_of([rows[i] for i in part]) for part in parts]
        metrics = rollout_metrics(rollouts, config.group_size)
        return StepData(
            made,
            metrics | {"useful_tokens": useful_fraction(made)},
            group_records(rollouts, config.group_size),
        )

    return Stage(
        steps=config.steps,
        updates=config.updates,
        batches=batches,
        empty_batch=batch_of([]),
        loss=functools.partial(loss_fn, policy, options, config.temperature, config.loss_chunk),
        teacher=frozen(keep) if options.kl_coefficient > 0 else None,
    )
