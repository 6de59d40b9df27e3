"""OPSD: on-policy self-distillation, gated by correctness (arXiv 2605.06188).

Each step:
1. roll out problems with the current parameters, and verify the rollouts (`roll_out`);
2. keep the rollouts that the gate gives weight and that have a privileged context
   (`ContextFinder`); the other rollouts cost nothing from here on;
3. score the tokens of each rollout twice: the student from its own prompt, the teacher
   (`options.teacher`, by default the parameters from the start of the stage) from the prompt that
   shows the context;
4. minimise KL(student || teacher) over the whole vocabulary, as the mean over rollouts of the mean
   over their tokens, weighted by the gate; `options.loss` selects other divergences and weights.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from opsd_jax import losses
from opsd_jax.data.task import Task
from opsd_jax.losses.gate import GATE_TEXTS
from opsd_jax.options import fail, import_function, option, with_default
from opsd_jax.parallel.mesh import rows_in_context
from opsd_jax.policy import Policy
from opsd_jax.stages import drift, flops
from opsd_jax.stages import privileged as privileged_lib
from opsd_jax.stages import teacher as teacher_lib
from opsd_jax.stages.algorithm import Algorithm, Curve, DataSample, Responses, RowFields
from opsd_jax.stages.batch import pack, response_head
from opsd_jax.stages.memos import make_memos, memo_sampling
from opsd_jax.stages.options import LENGTHS, StageOptions, ascending
from opsd_jax.stages.packing import Lengths, Packing
from opsd_jax.stages.parts import Parts, Sampling, TokenLimits
from opsd_jax.stages.privileged import ContextFinder, PrivilegedOptions, inserted_tokens
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
from opsd_jax.stages.teacher import TeacherOptions
from opsd_jax.training.optimizer import OptimizerOptions
from opsd_jax.training.stage import Stage
from opsd_jax.verify.outcomes import Outcomes

logger = logging.getLogger(__name__)


def _is_gate(text: str) -> bool:
    try:
        losses.parse_gate(text)
    except ValueError:
        return False
    return True


def _import_divergences(loss: Any, field: str) -> None:
    """Adds the functions that a section `loss` names as "package.module:function" to the table.

    Args:
      loss: the section.
      field: its place in the config.

    Raises:
      ConfigError: a function cannot be imported, or does not take logits.
    """
    text = loss.get("divergence", "")
    for name in map(str.strip, text.split(",") if isinstance(text, str) else ()):
        if ":" not in name or name in losses.DIVERGENCES:
            continue
        found = import_function(name, f"{field}.divergence")
        takes = inspect.signature(found).parameters if callable(found) else {}
        if not {"student_logits", "teacher_logits"} <= {*takes}:
            expected = "the name of a function of student_logits and teacher_logits"
            fail(f"{field}.divergence", name, expected)
        losses.DIVERGENCES[name] = found


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPSDOptions(PrivilegedOptions):
    """The options of an OPSD stage."""

    algorithm: str = with_default(StageOptions, "algorithm", "opsd")
    gate: str = option(
        "correct",
        "Outcomes that train: 'correct', 'incorrect' (truncated too), 'all', or weights of "
        "correct, incorrect and truncated rollouts such as '1,0.5,0'.",
        expects=GATE_TEXTS,
        check=_is_gate,
    )
    group_size: int = option(1, "Rollouts per problem.", at_least=1)
    slots: int = option(
        32, "Decoding slots: rollouts sampled at the same time, over all devices.", at_least=1
    )
    teacher: TeacherOptions = option(TeacherOptions(), "The teacher.")
    max_rows: int = option(
        0, "Train on at most this many of the rollouts that the gate keeps; 0 for all.", at_least=0
    )
    teacher_buckets: tuple[int, ...] = option(
        (3072, 4608, 6656, 12_288),
        "Padded lengths with the teacher's prompt, one for each of `buckets`; () adds "
        "teacher_prompt_tokens to each.",
        expects=f"{LENGTHS}, or ()",
        check=lambda lengths: not lengths or ascending(lengths),
    )
    loss: losses.OPSD = option(
        losses.OPSD(),
        "The divergence and its weights (opsd_jax.losses.OPSD).",
        omit=("gate",),
        prepare=_import_divergences,
    )
    checkpoint_every: int = option(25, "Steps between checkpoints.", at_least=1)
    optimizer: OptimizerOptions = option(
        OptimizerOptions(learning_rate=1e-6, b2=0.999, weight_decay=0.01),
        "AdamW with a schedule.",
    )

    @property
    def capacity(self) -> int:
        """The largest number of rollouts that a step trains on."""
        return min(self.max_rows or self.rollouts, self.rollouts)

    def loss_options(self) -> losses.OPSD:
        """Returns `self.loss` with the outcome weights that `self.gate` specifies."""
        return self.loss._replace(gate=losses.parse_gate(self.gate))

    def check(self, field: str) -> None:
        super().check(field)
        longest = self.teacher_prompt_tokens + self.response_tokens - 1
        longest += inserted_tokens(self, self.response_tokens)
        there = self.teacher_buckets
        if there and (len(there) != len(self.buckets) or there[-1] < longest):
            expected = (
                f"one length for each entry of config.{field}.buckets, with a last length of at "
                f"least {longest}, or () to choose the lengths automatically"
            )
            fail(f"{field}.teacher_buckets", there, expected)


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
    """Returns the weighted sum of the OPSD losses in a microbatch, the sum of weights, and metrics.

    With the default options, a rollout's divergence is the mean over its tokens, and its weight is
    the gate's. See `losses.opsd` for other options. `teacher_head` comes from `teacher.make_head`.
    """
    loss = losses.opsd(
        student=response_head(policy, params, microbatch["student"]),
        teacher=teacher_head(params, teacher, microbatch["teacher"]),
        mask=microbatch["mask"],
        outcomes=tuple(microbatch[outcome] > 0 for outcome in Outcomes._fields),
        tokens=microbatch["targets"],
        behaviour_logprobs=microbatch["behaviour_logprobs"],
        starts=microbatch.get("starts"),
        options=options,
        temperature=temperature,
        chunk=chunk,
        partition=rows_in_context(),
    )
    metrics = drift.sums(loss) | {"token_divergence": loss.metric("divergence")}
    return loss.sum, (loss.weight, metrics)


def buckets(options: OPSDOptions) -> list[Lengths]:
    """Returns the padded shapes that a microbatch can have: student and teacher lengths."""
    inserted = inserted_tokens(options, options.response_tokens)
    teacher = options.teacher_buckets or [
        student + options.teacher_prompt_tokens + inserted for student in options.buckets
    ]
    return [
        {"student": student, "teacher": length}
        for student, length in zip(options.buckets, teacher, strict=True)
    ]


def trains(options: OPSDOptions, outcomes: Outcomes) -> np.ndarray:
    """Returns a mask, bool [N], of the rollouts whose gate weight is not zero."""
    return losses.gate_weights(*outcomes, losses.parse_gate(options.gate)) != 0


def stage(
    options: OPSDOptions,
    task: Task,
    policy: Policy,
    roll_out: RollOut,
    privileged: ContextFinder,
    keep: teacher_lib.Keep = lambda params: params,
    packing: Packing | None = None,
) -> Stage:
    """Builds the `Stage` that trains with OPSD on the rollouts of `roll_out`.

    Args:
      options: the options of the stage.
      task: the data.
      policy: the model.
      roll_out: returns the rollouts of a step, in whole groups; see `RollOut`.
      privileged: finds the contexts of rollouts.
      keep: converts parameters to the form in which the teacher stores them.
      packing: how responses share rows; None if each has a row of its own.
    """
    batch_of = functools.partial(
        pack,
        buckets=buckets(options),
        microbatch=options.microbatch,
        capacity=options.capacity,
        per_token=["behaviour_logprobs"],
        per_row=Outcomes._fields,
        pad_id=task.tokenizer.pad_id,
        packing=packing,
    )

    def batches(step, params, *carried):
        rollouts = roll_out(step, params, *carried)
        students = student_rows(rollouts, task, options.group_size)
        outcomes = rollouts.judged.outcomes  # waits for the verifier
        wanted = np.flatnonzero(trains(options, outcomes)).tolist()
        taught = privileged(step, params, rollouts, wanted, capacity=options.capacity)
        rows = [
            seen | students(i) | {name: mask[i] for name, mask in outcomes._asdict().items()}
            for i, seen in taught.rows.items()
        ]
        metrics = taught.metrics | {"active_rows": float(len(rows))}
        return step_data(rollouts, task, options, [batch_of(rows)], metrics)

    head = teacher_lib.make_head(policy, options.teacher)
    return Stage(
        steps=options.steps,
        updates=1,
        batches=batches,
        empty_batch=batch_of([]),
        loss=functools.partial(
            loss_fn, policy, head, options.loss_options(), options.temperature, options.loss_chunk
        ),
        teacher=teacher_lib.make_teacher(options.teacher, keep),
        summary=drift.summary,
        carried=no_rollouts(options),
    )


def _privileged(
    options: OPSDOptions, parts: Parts, limits: TokenLimits, group_size: int, seed: int
) -> ContextFinder:
    """Makes a `ContextFinder`. Compiles engines if the options request memos."""
    memos = None
    if options.has_memos:
        memos = make_memos(options.memo, parts, seed, limits.prompt_tokens, limits.response_tokens)
    return ContextFinder(options, parts.task, group_size, memos)


def _make(options: OPSDOptions, parts: Parts) -> Stage:
    roll_out = make_roll_out(
        options, parts, capacity=options.capacity, trains=functools.partial(trains, options)
    )
    seed = parts.seed_of(f"{parts.seed}/memos")
    privileged = _privileged(options, parts, options, options.group_size, seed)
    model = parts.model
    made = stage(
        options,
        parts.task,
        model.policy,
        roll_out,
        privileged,
        model.decode_params,
        parts.packing(options),
    )
    passes = {"student": parts.trained, "teacher": 1}
    return made._replace(flops=flops.of_update(model, passes))


def _check_data(options: OPSDOptions, name: str, data: DataSample) -> None:
    check_prompts(options, name, data)
    privileged_lib.check_contexts(options, name, data.task, data.problems())
    if warning := teacher_lib.warning(options.teacher):
        logger.warning("%s: %s", name, warning)


def _step_rows(options: OPSDOptions, responses: Responses) -> tuple[list[int], list[Lengths]]:
    targets, students = student_lengths(options, options.capacity, responses)
    longest = options.teacher_prompt_tokens
    rows: list[Lengths] = [
        {**student, "teacher": longest + inserted_tokens(options, n) + n - 1}
        for student, n in zip(students, targets, strict=True)
    ]
    return targets, rows


def _privileged_sampling(
    options: OPSDOptions, limits: TokenLimits, rollouts: int, task: Task | None = None
) -> tuple[Sampling, ...]:
    if not options.has_memos:
        return ()
    return memo_sampling(options.memo, limits.prompt_tokens, limits.response_tokens, rollouts, task)


def _sampling(options: OPSDOptions, task: Task | None = None) -> tuple[Sampling, ...]:
    memos = _privileged_sampling(options, options, options.capacity, task)
    return (*rollout_sampling(options), *memos)


ALGORITHM = Algorithm(
    options=OPSDOptions,
    make=_make,
    buckets=buckets,
    check_data=_check_data,
    step_rows=_step_rows,
    row_fields=RowFields(("prompts", "group_size")),
    sampling=_sampling,
    privileged=_privileged,
    privileged_sampling=_privileged_sampling,
    curves=(
        Curve("token_divergence", "divergence a token, nats"),
        Curve("length", "mean length, tokens"),
        Curve("reward", "reward"),
        *SAMPLER_CURVES,
    ),
    headline="length",
    before_and_after=True,
    reported=("gate",),
)
