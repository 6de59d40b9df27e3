"""OPSD: on-policy self-distillation, gated by correctness (arXiv 2605.06188).

Each step:
1. roll out problems with the current parameters, and verify (`roll_out`);
2. keep the rollouts that the gate gives weight; the others are not computed from here on;
3. score their tokens twice: the student from its own prompt, the teacher (the parameters that the
   stage began with) from the prompt that shows the worked solution;
4. minimise KL(student || teacher) over the whole vocabulary, the mean over rollouts of the mean
   over their tokens, with the gate's weights.
"""

from __future__ import annotations

import functools

import jax
import ml_collections
import numpy as np

from opsd_jax import losses
from opsd_jax.data.task import Task, check_fits
from opsd_jax.policy import Policy
from opsd_jax.stages.batch import pack_responses, response_logits
from opsd_jax.stages.rollouts import RollOut, rollout_metrics
from opsd_jax.stages.stage import Stage


def token_divergence(policy: Policy, temperature: float, params, teacher, microbatch) -> jax.Array:
    """KL(student || teacher) [m, R] at each response token; no gradient for the teacher.

    Both sides are compared at `temperature`, that of the sampling.
    """
    response_tokens = microbatch["mask"].shape[1]
    student_mxRxV = response_logits(
        policy, params, microbatch["student"], response_tokens, temperature
    )
    teacher_mxRxV = response_logits(
        policy, teacher, microbatch["teacher"], response_tokens, temperature
    )
    return losses.reverse_kl(
        student_logits=student_mxRxV, teacher_logits=jax.lax.stop_gradient(teacher_mxRxV)
    )


def loss_fn(policy: Policy, temperature: float, params, teacher, microbatch):
    """Sum over rollouts of weight x mean token divergence, and the sum of the weights."""
    values_mxR = token_divergence(policy, temperature, params, teacher, microbatch)
    mask_mxR = microbatch["mask"]
    total, weight = losses.sequence_mean(values_mxR, mask_mxR, microbatch["weight"])
    return total, (weight, {"token_kl": losses.token_mean(values_mxR, mask_mxR)})


def opsd(
    config: ml_collections.ConfigDict,
    task: Task,
    policy: Policy,
    roll_out: RollOut,
) -> Stage:
    """The OPSD stage; `config` is `config.opsd` (see opsd_jax/config.py).

    `roll_out(step, params)` gives the step's rollouts, `config.group_size` of each problem.
    """
    gate = losses.parse_gate(config.gate)
    rollouts_a_step = config.prompts * config.group_size
    capacity = min(config.max_rows or rollouts_a_step, rollouts_a_step)

    batch_of = functools.partial(
        pack_responses,
        config=config,
        capacity=capacity,
        prompt_tokens={"student": config.prompt_tokens, "teacher": config.teacher_prompt_tokens},
        per_row=["weight"],
        pad_id=task.tokenizer.pad_id,
    )

    def batches(step, params):
        rollouts = roll_out(step, params)
        weights = losses.gate_weights(*rollouts.groups, gate)
        active = np.flatnonzero(weights)[:capacity]
        rows = [
            {
                "student": task.prompt(rollouts.problems[i]),
                "teacher": check_fits(
                    task.teacher_prompt(rollouts.problems[i]),
                    config.teacher_prompt_tokens,
                    rollouts.problems[i],
                    "teacher_prompt_tokens",
                ),
                "response": rollouts.responses[i],
                "weight": weights[i],
            }
            for i in active
        ]
        return [batch_of(rows)], rollout_metrics(rollouts) | {"active_rows": float(len(active))}

    return Stage(
        steps=config.steps,
        updates=1,
        batches=batches,
        empty_batch=batch_of([]),
        loss=functools.partial(loss_fn, policy, config.temperature),
        has_teacher=True,
    )
