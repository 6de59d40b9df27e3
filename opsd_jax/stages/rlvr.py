"""RLVR: GRPO (DeepSeekMath, arXiv 2402.03300) on rewards of 1 for a correct rollout, else 0."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import ml_collections
import numpy as np

from opsd_jax import losses
from opsd_jax.data.task import Task
from opsd_jax.policy import Policy
from opsd_jax.stages.batch import pack_responses, response_logits
from opsd_jax.stages.rollouts import RollOut, rollout_metrics
from opsd_jax.stages.stage import Stage


def loss_fn(
    policy: Policy,
    temperature: float,
    clip_low: float,
    clip_high: float,
    params,
    teacher,
    microbatch,
):
    """Sum over response tokens of the clipped surrogate, and their number.

    `temperature` is that of the sampling: the ratio compares the distributions sampled from.
    """
    del teacher
    response_mxR, mask_mxR = microbatch["response"], microbatch["mask"]
    logits_mxRxV = response_logits(
        policy, params, microbatch["student"], response_mxR.shape[1], temperature
    )
    logprobs_mxR = losses.token_logprobs(logits_mxRxV, response_mxR)
    values_mxR = losses.clipped_surrogate(
        logprobs=logprobs_mxR,
        behaviour_logprobs=microbatch["behaviour_logprobs"],
        advantages=microbatch["advantages"][:, None],
        clip_low=clip_low,
        clip_high=clip_high,
    )
    ratio_mxR = jnp.exp(logprobs_mxR - microbatch["behaviour_logprobs"])
    clipped_mxR = (ratio_mxR < 1 - clip_low) | (ratio_mxR > 1 + clip_high)
    total, weight = losses.token_mean(values_mxR, mask_mxR)
    return total, (
        weight,
        {
            "entropy": losses.token_mean(losses.entropy(logits_mxRxV), mask_mxR),
            "ratio_outside_clip": losses.token_mean(clipped_mxR, mask_mxR),
        },
    )


def rlvr(
    config: ml_collections.ConfigDict,
    task: Task,
    policy: Policy,
    roll_out: RollOut,
) -> Stage:
    """The RLVR stage; `config` is `config.rlvr` (see opsd_jax/config.py).

    `roll_out(step, params)` gives the step's rollouts, `config.group_size` of each problem.
    """
    size = config.prompts * config.group_size // config.updates  # rollouts an update
    batch_of = functools.partial(
        pack_responses,
        config=config,
        capacity=size,
        prompt_tokens={"student": config.prompt_tokens},
        per_token=["behaviour_logprobs"],
        per_row=["advantages"],
        pad_id=task.tokenizer.pad_id,
    )

    def batches(step, params):
        rollouts = roll_out(step, params)
        rewards = rollouts.groups.correct.astype(np.float32)
        advantages = losses.group_advantages(rewards, config.group_size)
        rows = [
            {
                "student": task.prompt(problem),
                "response": rollouts.responses[i],
                "behaviour_logprobs": rollouts.logprobs[i],
                "advantages": advantages[i],
            }
            for i, problem in enumerate(rollouts.problems)
        ]
        parts = [batch_of(rows[i : i + size]) for i in range(0, len(rows), size)]
        by_group = rewards.reshape(-1, config.group_size).mean(axis=1)
        return parts, rollout_metrics(rollouts) | {
            "groups_all_correct": float(np.mean(by_group == 1)),
            "groups_all_wrong": float(np.mean(by_group == 0)),
        }

    return Stage(
        steps=config.steps,
        updates=config.updates,
        batches=batches,
        empty_batch=batch_of([]),
        loss=functools.partial(
            loss_fn, policy, config.temperature, config.clip_low, config.clip_high
        ),
    )
