"""OPSD: on-policy self-distillation, gated by correctness (arXiv 2605.06188).

Each step:
1. roll out problems with the current parameters, and verify (`roll_out`);
2. keep the rollouts that the gate gives weight and that have a privileged context (`Privileged`);
   the others are not computed from here on;
3. score their tokens twice: the student from its own prompt, the teacher (`config.teacher`: the
   parameters that the stage began with, say) from the prompt that shows the context;
4. minimise KL(student || teacher) over the whole vocabulary, the mean over rollouts of the mean
   over their tokens, with the gate's weights; or what else `config.loss` says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import ml_collections
import numpy as np

from opsd_jax import losses
from opsd_jax.data.task import Task
from opsd_jax.parallel.mesh import rows_in_context
from opsd_jax.policy import Policy
from opsd_jax.stages import teacher as teacher_lib
from opsd_jax.stages.batch import Lengths, pack, response_head, useful_fraction
from opsd_jax.stages.privileged import Privileged, inserted_tokens
from opsd_jax.stages.rollouts import RollOut, group_records, rollout_metrics
from opsd_jax.training.stage import Stage, StepData
from opsd_jax.verify.outcomes import Groups


def loss_fn(
    policy: Policy,
    teacher_head: Callable[..., losses.Head],
    options: losses.OPSD,
    temperature: float,
    chunk: int,
    params,
    teacher,
    microbatch,
):
    """Sum over rollouts of gate x mean token divergence, and the sum of the gate's weights.

    That is with the default options; see `losses.opsd`. `teacher_head` is of `teacher.make_head`.
    """
    loss = losses.opsd(
        student=response_head(policy, params, microbatch["student"]),
        teacher=teacher_head(params, teacher, microbatch["teacher"]),
        mask=microbatch["mask"],
        outcomes=tuple(microbatch[group] > 0 for group in Groups._fields),
        tokens=microbatch["targets"],
        behaviour_logprobs=microbatch["behaviour_logprobs"],
        options=options,
        temperature=temperature,
        chunk=chunk,
        partition=rows_in_context(),
    )
    return loss.sum, (loss.weight, {"token_divergence": loss.metric("divergence")})


def options_of(config: ml_collections.ConfigDict) -> losses.OPSD:
    """The options of the loss, of a stage's section of the config."""
    return losses.OPSD(gate=losses.parse_gate(config.gate), **config.loss)


def capacity(config: ml_collections.ConfigDict) -> int:
    """The most rollouts that a step trains on."""
    rollouts = config.prompts * config.group_size
    return min(config.max_rows or rollouts, rollouts)


def buckets(config: ml_collections.ConfigDict) -> list[Lengths]:
    """The shapes of microbatches: padded lengths of the student's sequences and the teacher's."""
    inserted = inserted_tokens(config, config.response_tokens)
    lengths = config.teacher_buckets or [
        student + config.teacher_prompt_tokens + inserted for student in config.buckets
    ]
    return [
        {"student": student, "teacher": teacher}
        for student, teacher in zip(config.buckets, lengths, strict=True)
    ]


def trains(config: ml_collections.ConfigDict, groups: Groups) -> np.ndarray:
    """Which rollouts the gate gives weight, bool [N]."""
    return losses.gate_weights(*groups, losses.parse_gate(config.gate)) != 0


def stage(
    config: ml_collections.ConfigDict,
    task: Task,
    policy: Policy,
    roll_out: RollOut,
    privileged: Privileged,
    keep: teacher_lib.Keep = lambda params: params,
) -> Stage:
    """The OPSD stage; `config` is `config.opsd` (see opsd_jax/config.py).

    `roll_out(step, params)` gives the step's rollouts, `config.group_size` of each problem, and
    `privileged` their contexts; `keep` says how the teacher's parameters are kept.
    """
    options = options_of(config)
    batch_of = functools.partial(
        pack,
        buckets=buckets(config),
        microbatch=config.microbatch,
        capacity=capacity(config),
        per_token=["behaviour_logprobs"],
        per_row=Groups._fields,
        pad_id=task.tokenizer.pad_id,
    )

    def batches(step, params):
        rollouts = roll_out(step, params)
        prompts = {p.id: task.prompt(p) for p in rollouts.problems[:: config.group_size]}
        groups = rollouts.judged.groups  # the first need of the masks
        wanted = np.flatnonzero(trains(config, groups)).tolist()
        taught = privileged(step, params, rollouts, wanted, capacity=capacity(config))
        rows = [
            seen
            | {
                "student": prompts[rollouts.problems[i].id],
                "response": rollouts.responses[i],
                "behaviour_logprobs": rollouts.sampling_logprobs[i],
            }
            | {group: members[i] for group, members in groups._asdict().items()}
            for i, seen in taught.rows.items()
        ]
        metrics = rollout_metrics(rollouts, config.group_size) | taught.metrics
        batch = batch_of(rows)
        return StepData(
            [batch],
            metrics | {"active_rows": float(len(rows)), "useful_tokens": useful_fraction([batch])},
            group_records(rollouts, config.group_size),
        )

    return Stage(
        steps=config.steps,
        updates=1,
        batches=batches,
        empty_batch=batch_of([]),
        loss=functools.partial(
            loss_fn,
            policy,
            teacher_lib.make_head(policy, config.teacher),
            options,
            config.temperature,
            config.loss_chunk,
        ),
        teacher=teacher_lib.from_config(config.teacher, keep),
    )
