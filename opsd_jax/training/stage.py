"""What the training loop knows of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from opsd_jax.policy import Params

Batch = tuple[dict[str, Any], ...]  # of `stages.batch.pack`
Microbatch = dict[str, Any]  # of `stages.batch.collate`
# A sum and its weight: the mean is their quotient, once everything has been added up.
Metric = tuple[jax.Array, jax.Array]


class Teacher(NamedTuple):
    """The part of a stage's state that is its teacher.

    Attributes:
      init: the stage's first parameters -> the teacher.
      update: `(teacher, params, number, applied) -> teacher`, after the optimiser's update of this
        number, counted from 1, which was applied or skipped. None: the teacher stays as it is.
    """

    init: Callable[[Params], Params]
    update: Callable[[Params, Params, jax.Array, jax.Array], Params] | None = None


class StepData(NamedTuple):
    """What the host makes for a step.

    Attributes:
      batches: one an optimiser update.
      metrics: plain numbers of their making, among them `tokens`, how many were sampled or read.
      groups: JSON-ready records of the problems that were rolled out, how many of how many rollouts
        were correct: a later run can choose its problems by them.
    """

    batches: list[Batch]
    metrics: dict[str, float]
    groups: Sequence[dict[str, Any]] = ()


class Stage(NamedTuple):
    """A training stage. The loop does not know which.

    Attributes:
      steps: how many steps it has.
      updates: optimiser updates a step.
      batches: `(step, params) -> StepData`, on the host, with `updates` batches: a function of the
        two arguments alone.
      empty_batch: a batch without rows: the shapes that the train step is compiled for.
      loss: `(params, teacher, microbatch) -> (sum, (weight, metrics))`: the loss summed over the
        microbatch, what it is to be divided by in the end, and metrics as `Metric`s. Pure.
      teacher: how the state's teacher is made and changes; None if the loss gets None for it.
    """

    steps: int
    updates: int
    batches: Callable[[int, Params], StepData]
    empty_batch: Batch
    loss: Callable[
        [Params, Params | None, Microbatch],
        tuple[jax.Array, tuple[jax.Array, dict[str, Metric]]],
    ]
    teacher: Teacher | None = None
