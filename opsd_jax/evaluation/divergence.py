"""KL(student || teacher) by position in the response: where the teacher would say otherwise."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from opsd_jax import losses
from opsd_jax.data.task import Task
from opsd_jax.evaluation.statistics import ratio
from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.program import ProgramKey, ProgramKind
from opsd_jax.policy import Params, Policy
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.stages.batch import collate, response_head
from opsd_jax.stages.privileged import inserted_tokens

FILE = "divergence.json"
PROBED = 1024  # held-out responses at most whose divergence a run measures
MULTIPLE = 128  # of padded lengths: a mesh may cut them


def token_kl(
    policy: Policy, temperature: float, chunk: int, params: Params, teacher: Params, rows: Any
) -> jax.Array:
    """KL(student || teacher) [m, T] where each response token is predicted, of a microbatch."""

    def loss(student, teacher, _):
        return losses.reverse_kl(
            student_logits=student, teacher_logits=teacher, temperature=temperature
        ), {}

    return losses.token_values(
        loss,
        rows["mask"],
        student=response_head(policy, params, rows["student"]),
        teacher=response_head(policy, teacher, rows["teacher"]),
        chunk=chunk,
        partition=mesh_lib.rows_in_context(),
    )


class DivergenceProbe:
    """Scores responses under a student and a teacher that sees the solution; compiles once."""

    def __init__(
        self,
        config: ConfigDict,
        evaluation: ConfigDict,
        task: Task,
        policy: Policy,
        mesh: jax.sharding.Mesh,
        abstract_params: Params,
    ):
        """`config` is the section of an OPSD stage, `evaluation` that of the responses;
        `abstract_params` are the shapes of the parameters, with shardings.
        """
        self._microbatch, self._task = config.microbatch, task
        self._response_tokens = evaluation.response_tokens
        inserted = inserted_tokens(config, evaluation.response_tokens)
        whole = lambda tokens: -(-tokens // MULTIPLE) * MULTIPLE
        self._lengths = {
            "student": whole(evaluation.prompt_tokens + evaluation.response_tokens),
            "teacher": whole(config.teacher_prompt_tokens + evaluation.response_tokens + inserted),
        }
        self._rows = mesh_lib.rows(mesh)
        score = functools.partial(token_kl, policy, config.temperature, config.loss_chunk)
        empty = self._collate([])
        rows = mesh_lib.abstract_of(empty, jax.tree.map(lambda _: self._rows, empty))
        with jax.set_mesh(mesh):
            lowered = jax.jit(score, out_shardings=mesh_lib.replicated(mesh)).lower(
                abstract_params, abstract_params, rows
            )
            self._divergence = aot.compiled(ProgramKey(ProgramKind.PROBE), lowered)

    def _collate(self, rows: list[dict[str, Any]]) -> Any:
        pad_id = self._task.tokenizer.pad_id
        return collate(rows, self._lengths, microbatch=self._microbatch, pad_id=pad_id)

    def __call__(
        self,
        params: Params,
        teacher: Params,
        rollouts: Rollouts,
        taught: dict[int, dict[str, Any]],
    ) -> dict[str, dict[str, list[float]]]:
        """The mean divergence at each position of the response, by group.

        Args:
          params: the student's.
          teacher: the teacher's.
          rollouts: held-out ones, judged.
          taught: `Taught.rows` of them; those that are not there are left out.

        Returns:
          For each group that occurs, lists over positions: `mean` in nats, its standard error `se`
          clustered by problem, and the `count` of responses that are so long. Positions that fewer
          than two problems' responses reach are left out.
        """
        m, chosen = self._microbatch, list(taught)
        n = len(chosen)
        values = np.full((n, self._response_tokens), np.nan)
        for first in range(0, n, m):
            part = chosen[first : first + m]
            rows = self._collate(
                [
                    taught[i]
                    | {
                        "student": self._task.prompt(rollouts.problems[i]),
                        "response": rollouts.responses[i],
                    }
                    for i in part
                ]
            )
            placed = mesh_lib.placed(rows, jax.tree.map(lambda _: self._rows, rows))
            scored = self._divergence(params, teacher, placed)
            scored = jax.device_get(scored)
            for i in range(first, first + len(part)):
                mask = rows["mask"][i - first]
                values[i, : mask.sum()] = scored[i - first][mask]
        ids = np.array([rollouts.problems[i].id for i in chosen])
        return {
            group: by_position(values[members[chosen]], ids[members[chosen]])
            for group, members in rollouts.judged.groups._asdict().items()
            if len(set(ids[members[chosen]])) > 1
        }


def by_position(values: np.ndarray, clusters: np.ndarray) -> dict[str, list[float]]:
    """Mean, clustered standard error and count of each column of values [N, R].

    Args:
      values: nan where there is none: after a row's end.
      clusters: [N], rows of one cluster are not independent.
    """
    curve: dict[str, list[float]] = {"mean": [], "se": [], "count": []}
    for column in values.T:
        there = ~np.isnan(column)
        _, cluster = np.unique(clusters[there], return_inverse=True)
        counts = np.bincount(cluster)
        if len(counts) < 2:
            break
        mean, error = ratio(np.bincount(cluster, weights=column[there]), counts)
        curve["mean"].append(mean)
        curve["se"].append(error)
        curve["count"].append(int(there.sum()))
    return curve
