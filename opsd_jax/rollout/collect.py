"""Samples rollouts for problems, and verifies finished rollouts while others are sampled.

Verdicts are futures. The host waits for them only when it needs them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from opsd_jax.data.task import Task, check_fits
from opsd_jax.parallel import hosts
from opsd_jax.parallel.watchdog import waiting
from opsd_jax.policy import Params
from opsd_jax.problem import Problem
from opsd_jax.rollout.engine import STOP_LENGTH, Engine, Response
from opsd_jax.rollout.sampling import SamplingParams
from opsd_jax.verify.outcomes import Outcomes, outcomes_of
from opsd_jax.verify.pool import VerifierPool
from opsd_jax.verify.verdict import TRUNCATED, Verdict

# A verdict, a future verdict, or None for a rollout that another host verifies.
Reply = Verdict | Future[Verdict] | None


class Judged(NamedTuple):
    """The verdicts and outcomes of N rollouts.

    Attributes:
      verdicts: one per rollout. A truncated rollout is not verified; its verdict is TRUNCATED.
      outcomes: the outcome masks that follow from the verdicts.
      wait_seconds: how long the device was idle because the host waited for verdicts.
    """

    verdicts: list[Verdict]
    outcomes: Outcomes
    wait_seconds: float


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """N sampled rollouts in host memory. Each field that is a list has one entry per rollout.

    Attributes:
      problems: the problem of each rollout. Rollouts of one group are adjacent.
      responses: int32 arrays, the sampled token ids, including EOS, exactly as sampled.
      sampling_logprobs: float32 arrays, log-probability of each token under the distribution that
        it was drawn from.
      model_logprobs: float32 arrays, log-probability of each token under the model's own
        distribution, at temperature 1.
      truncated: bool [N], whether the rollout reached its token budget.
      replies: each rollout's verdict, its future verdict, or None if another host verifies it.
      wait_seconds: how long the device was idle so far because the host waited for verdicts.
    """

    problems: list[Problem]
    responses: list[np.ndarray]
    sampling_logprobs: list[np.ndarray]
    model_logprobs: list[np.ndarray]
    truncated: np.ndarray
    replies: list[Reply]
    wait_seconds: float = 0.0

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each response, int [N]."""
        return np.array([len(response) for response in self.responses])

    @property
    def are_judged(self) -> bool:
        """Whether all verdicts that this host requested have arrived."""
        return all(reply.done() for reply in self.replies if isinstance(reply, Future))

    @functools.cached_property
    def judged(self) -> Judged:
        """The verdicts and outcomes of all rollouts.

        The first access waits until every host has the verdicts that it requested. All hosts must
        access this property at the same point of the program. Access it as late as possible.
        """
        began = time.monotonic()
        known = {i: reply for i, reply in enumerate(self.replies) if isinstance(reply, Verdict)}
        if len(known) < len(self.replies):
            with waiting("the verifier"):
                for of_host in hosts.each(self._await_own):
                    known |= of_host
        verdicts = [known[i] for i in range(len(self.replies))]
        wait_seconds = self.wait_seconds + time.monotonic() - began
        return Judged(verdicts, outcomes_of(verdicts, self.truncated), wait_seconds)

    def _await_own(self) -> dict[int, Verdict]:
        """Waits for the verdicts that this host requested, and returns them by rollout index."""
        return {
            i: reply.result() for i, reply in enumerate(self.replies) if isinstance(reply, Future)
        }

    def settled(self) -> Rollouts:
        """Waits for all verdicts, and returns a copy of the rollouts that contains the verdicts."""
        return dataclasses.replace(
            self, replies=[*self.judged.verdicts], wait_seconds=self.judged.wait_seconds
        )


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """Concatenates one or more `Rollouts` in the given order."""
    lists = {
        field: [value for part in parts for value in getattr(part, field)]
        for field in ("problems", "responses", "sampling_logprobs", "model_logprobs", "replies")
    }
    return Rollouts(
        **lists,
        truncated=np.concatenate([part.truncated for part in parts]),
        wait_seconds=sum(part.wait_seconds for part in parts),
    )


class Collector:
    """Samples and verifies a group of `group_size` (G) rollouts for each problem."""

    def __init__(self, engine: Engine, task: Task, pool: VerifierPool, group_size: int):
        """Creates a collector from an engine, a task and a verifier pool.

        Args:
          engine: samples the responses.
          task: renders the prompts and decodes the responses.
          pool: verifies the responses.
          group_size: G, rollouts per problem.
        """
        self.group_size, self._engine, self._task, self._pool = group_size, engine, task, pool

    def by_problem(
        self,
        params: Params,
        problems: Sequence[Problem],
        *,
        key: jax.Array,
        sampling_params: SamplingParams,
        numbers: Sequence[int] | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Rollouts]]:
        """Samples rollouts, and yields each problem's group once all its rollouts have ended.

        Args:
          params, key, sampling_params, poll: see `Engine.__call__`.
          problems: any number of problems.
          numbers: one number for each problem, all different under one key. The default values are
            the problems' indices. Rollout j of problem i has the id `numbers[i] * G + j`, which
            selects its random numbers.

        Yields:
          `(i, rollouts)`: the index of a problem and its G rollouts.

        Raises:
          DataError: a prompt is too long.
        """
        G = self.group_size
        prompts = [
            check_fits(self._task.prompt(p), self._engine.shape.prompt_tokens, p, "prompt_tokens")
            for p in problems
        ]
        numbers = range(len(problems)) if numbers is None else numbers
        ids = [range(number * G, (number + 1) * G) for number in numbers]
        groups: list[dict[int, tuple[Response, Reply]]] = [{} for _ in problems]
        wait_seconds = 0.0
        for batch in self._engine(
            params, prompts, ids, key=key, sampling_params=sampling_params, poll=poll
        ):
            for response in batch.responses:
                i = response.prompt
                began, is_idle = time.monotonic(), batch.device_is_idle()
                groups[i][response.member] = response, self._verify(problems[i], response)
                wait_seconds += (time.monotonic() - began) * is_idle
                if len(groups[i]) == G:
                    group = [groups[i].pop(j) for j in range(G)]
                    yield i, _rollouts(problems[i], group, wait_seconds)
                    wait_seconds = 0.0

    def _verify(self, problem: Problem, response: Response) -> Reply:
        """Returns the verdict, or a future of it; None if another host verifies the response."""
        if response.stop == STOP_LENGTH:
            return TRUNCATED
        if (response.prompt * self.group_size + response.member) % hosts.count() != hosts.number():
            return None
        text = self._task.tokenizer.decode(response.tokens.tolist())
        return self._pool.submit(problem, self._task.begun + text)

    def __call__(
        self,
        params: Params,
        problems: Sequence[Problem],
        *,
        key: jax.Array,
        sampling_params: SamplingParams,
        poll: Callable[[], None] = lambda: None,
    ) -> Rollouts:
        """Samples G rollouts for each problem, and returns them in the order of the problems.

        Args:
          params, key, sampling_params, poll: see `Engine.__call__`.
          problems: at least one problem.

        Returns:
          G rollouts of each problem. Their verdicts may still be pending.

        Raises:
          DataError: a prompt is too long.
        """
        parts = dict(
            self.by_problem(params, problems, key=key, sampling_params=sampling_params, poll=poll)
        )
        return concatenate([parts[i] for i in range(len(problems))])


def _rollouts(
    problem: Problem, group: Sequence[tuple[Response, Reply]], wait_seconds: float
) -> Rollouts:
    """Builds the `Rollouts` of one problem from a `(Response, Reply)` pair for each rollout."""
    responses = [response for response, _ in group]
    return Rollouts(
        problems=[problem] * len(group),
        responses=[r.tokens for r in responses],
        sampling_logprobs=[r.sampling_logprobs for r in responses],
        model_logprobs=[r.model_logprobs for r in responses],
        truncated=np.array([r.stop == STOP_LENGTH for r in responses]),
        replies=[reply for _, reply in group],
        wait_seconds=wait_seconds,
    )
