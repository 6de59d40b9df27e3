"""The divergence KL(student || teacher) at each position of the response.

In the shapes, m is the number of rows of a microbatch and T the padded length of the student's
sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from opsd_jax import losses
from opsd_jax.data.task import Task
from opsd_jax.evaluation.options import EvaluationOptions
from opsd_jax.evaluation.statistics import ratio
from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.program import ProgramKey, ProgramKind
from opsd_jax.policy import Params, Policy
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.stages.batch import collate, response_head
from opsd_jax.stages.privileged import PrivilegedOptions, inserted_tokens

FILE = "divergence.json"
MULTIPLE = 128  # padded lengths are multiples of it, so that a mesh can split them

Curve = dict[str, list[float]]  # "mean", "se" and "count" at each position


def token_kl(
    policy: Policy, temperature: float, chunk: int, student: Params, teacher: Params, rows: Any
) -> jax.Array:
    """Computes KL(student || teacher) at each response token of a microbatch.

    Args:
      policy: the model.
      temperature: temperature of both distributions.
      chunk: number of tokens whose logits are computed at once; 0 chooses it.
      student, teacher: parameters.
      rows: a microbatch that `stages.batch.collate` made.

    Returns:
      float32 [m, T], in nats. The value of a response token is in the column that predicts it.
    """

    def loss(student, teacher, _):
        return losses.reverse_kl(
            student_logits=student, teacher_logits=teacher, temperature=temperature
        ), {}

    return losses.token_values(
        loss,
        rows["mask"],
        student=response_head(policy, student, rows["student"]),
        teacher=response_head(policy, teacher, rows["teacher"]),
        chunk=chunk,
        partition=mesh_lib.rows_in_context(),
    )


def probed(evaluation: EvaluationOptions, problems: int) -> int:
    """Returns the number of evaluated problems for which the divergence is measured.

    A curve needs at least two.

    Args:
      evaluation: options of the evaluation, with `divergence_responses` above 0.
      problems: the number of evaluated problems.
    """
    return min(problems, max(2, evaluation.divergence_responses // evaluation.samples))


class DivergenceProbe:
    """Measures the divergence of a student from a teacher that sees a privileged context."""

    def __init__(
        self,
        options: PrivilegedOptions,
        evaluation: EvaluationOptions,
        task: Task,
        policy: Policy,
        mesh: jax.sharding.Mesh,
        abstract_params: Params,
    ):
        """Compiles the program that computes the divergence.

        Args:
          options: options of the stage.
          evaluation: options of the evaluation that the responses come from.
          task: the task that the problems belong to.
          policy: the model of both student and teacher.
          mesh: the mesh to compute on.
          abstract_params: shapes of the parameters, with their shardings.
        """
        self._microbatch, self._task = options.microbatch, task
        self._response_tokens = evaluation.response_tokens
        inserted = inserted_tokens(options, evaluation.response_tokens)
        round_up = lambda tokens: -(-tokens // MULTIPLE) * MULTIPLE
        self._lengths = {
            "student": round_up(evaluation.prompt_tokens + evaluation.response_tokens),
            "teacher": round_up(
                options.teacher_prompt_tokens + evaluation.response_tokens + inserted
            ),
        }
        self._rows = mesh_lib.rows(mesh)
        score = functools.partial(token_kl, policy, options.temperature, options.loss_chunk)
        empty = self._collate([])
        rows = mesh_lib.abstract_of(empty, jax.tree.map(lambda _: self._rows, empty))
        with jax.set_mesh(mesh):
            lowered = jax.jit(score, out_shardings=mesh_lib.replicated(mesh)).lower(
                abstract_params, abstract_params, rows
            )
            self._token_kl = aot.compiled(ProgramKey(ProgramKind.PROBE), lowered)

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Collates responses into one microbatch, with a row each. Adds empty rows to fill it."""
        pad_id = self._task.tokenizer.pad_id
        return collate(
            [[row] for row in rows], self._lengths, microbatch=self._microbatch, pad_id=pad_id
        )

    def __call__(
        self,
        *,
        student: Params,
        teacher: Params,
        rollouts: Rollouts,
        taught: Mapping[int, Mapping[str, Any]],
        advance: Callable[[int], None],
    ) -> dict[str, Curve]:
        """Computes the mean divergence at each response position, separately for each outcome.

        Args:
          student: parameters of the student.
          teacher: parameters of the teacher.
          rollouts: verified held-out rollouts.
          taught: index of a rollout -> the teacher's part of its row (`TeacherInputs.rows`).
            Rollouts that are absent are left out.
          advance: called after each microbatch with the number of its rollouts.

        Returns:
          For each outcome with rollouts of at least two problems, its `by_position` curve. The
          divergence is in nats.
        """
        chosen = list(taught)
        kl_NxR = np.full((len(chosen), self._response_tokens), np.nan)
        for first in range(0, len(chosen), self._microbatch):
            part = chosen[first : first + self._microbatch]
            rows = self._collate([self._row(rollouts, i, taught[i]) for i in part])
            placed = mesh_lib.placed(rows, jax.tree.map(lambda _: self._rows, rows))
            kl_mxT = jax.device_get(self._token_kl(student, teacher, placed))
            for n in range(len(part)):
                mask_T = rows["mask"][n]
                kl_NxR[first + n, : mask_T.sum()] = kl_mxT[n][mask_T]
            advance(len(part))
        ids_N = np.array([rollouts.problems[i].id for i in chosen])
        _, outcomes, _ = rollouts.judged
        curves = {}
        for outcome, mask in outcomes._asdict().items():
            mask_N = mask[chosen]
            if len(set(ids_N[mask_N])) > 1:
                curves[outcome] = by_position(kl_NxR[mask_N], clusters_N=ids_N[mask_N])
        return curves

    def _row(self, rollouts: Rollouts, i: int, taught: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row for `collate`: `taught` with the student's prompt and response added."""
        prompt = self._task.prompt(rollouts.problems[i])
        return {**taught, "student": prompt, "response": rollouts.responses[i]}


def by_position(values_NxR: np.ndarray, *, clusters_N: np.ndarray) -> Curve:
    """Computes the mean value at each position, with a standard error clustered by `clusters_N`.

    Stops at the first position that fewer than two clusters reach.

    Args:
      values_NxR: one row per response and one column per position; nan after a response's end.
      clusters_N: the cluster of each row, such as its problem. Rows of the same cluster are not
        independent.

    Returns:
      Lists over the columns: `mean`, its standard error `se`, clustered, and `count`, the number
      of rows that reach the column.
    """
    curve: Curve = {"mean": [], "se": [], "count": []}
    for column_N in values_NxR.T:
        reached_N = ~np.isnan(column_N)
        _, cluster = np.unique(clusters_N[reached_N], return_inverse=True)
        counts_G = np.bincount(cluster)
        if len(counts_G) < 2:
            break
        sums_G = np.bincount(cluster, weights=column_N[reached_N])
        mean, error = ratio(sums_G, denominator_G=counts_G)
        curve["mean"].append(mean)
        curve["se"].append(error)
        curve["count"].append(int(reached_N.sum()))
    return curve
