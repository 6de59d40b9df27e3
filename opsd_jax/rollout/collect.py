"""Rollouts of problems, verified: workers judge those that have ended while the device samples on.

Verdicts are waited for when they are asked for, and no sooner.
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


class Judged(NamedTuple):
    """What the verifier says of N rollouts.

    Attributes:
      verdicts: one a rollout; "truncated" where it was not asked.
      outcomes: the masks that they make.
      wait_seconds: how long the device had to wait for them.
    """

    verdicts: list[Verdict]
    outcomes: Outcomes
    wait_seconds: float


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """N rollouts on the host, ragged: lists hold one entry a rollout.

    Attributes:
      problems: the problem of each; those of a group stand next to each other.
      responses: int32 arrays, the sampled ids with EOS, as the device drew them.
      sampling_logprobs: float32 arrays, of each token under the distribution it was drawn from.
      model_logprobs: float32 arrays, under the model's own, at temperature 1.
      truncated: bool [N], cut at the budget.
      replies: the verdict of each, or the future of it; None where another host asks.
      waited: seconds that the device waited for verdicts already.
    """

    problems: list[Problem]
    responses: list[np.ndarray]
    sampling_logprobs: list[np.ndarray]
    model_logprobs: list[np.ndarray]
    truncated: np.ndarray
    replies: list[Verdict | Future[Verdict] | None]
    waited: float = 0.0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each response, int [N]."""
        return np.array([len(response) for response in self.responses])

    @property
    def are_judged(self) -> bool:
        """Whether every verdict that this host asks for is there."""
        return all(reply.done() for reply in self.replies if isinstance(reply, Future))

    @functools.cached_property
    def judged(self) -> Judged:
        """The verdicts. To ask for them is to wait until the last is there, on every host: ask
        late, and on all of them.
        """
        began = time.monotonic()
        known = {i: reply for i, reply in enumerate(self.replies) if isinstance(reply, Verdict)}
        if len(known) < len(self.replies):
            with waiting("the verifier"):
                for answers in hosts.each(self._answers):
                    known |= answers
        verdicts = [known[i] for i in range(len(self.replies))]
        waited = self.waited + time.monotonic() - began
        return Judged(verdicts, outcomes_of(verdicts, self.truncated), waited)

    def _answers(self) -> dict[int, Verdict]:
        """The verdicts that this host asked for."""
        return {
            i: reply.result() for i, reply in enumerate(self.replies) if isinstance(reply, Future)
        }

    def settled(self) -> Rollouts:
        """These, with their verdicts in place of what was promised."""
        return dataclasses.replace(
            self, replies=[*self.judged.verdicts], waited=self.judged.wait_seconds
        )


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """The rollouts of several, one at least, in this order."""
    lists = {
        field: [value for part in parts for value in getattr(part, field)]
        for field in ("problems", "responses", "sampling_logprobs", "model_logprobs", "replies")
    }
    truncated = np.concatenate([part.truncated for part in parts])
    return Rollouts(**lists, truncated=truncated, waited=sum(part.waited for part in parts))


class Collector:
    """Samples and verifies rollouts, `group_size` (G) of each problem."""

    def __init__(self, engine: Engine, task: Task, pool: VerifierPool, group_size: int):
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
        """The rollouts of each problem, with its index, when the last of them has ended.

        Args:
          params, key, sampling_params, poll: as `Engine` has them.
          problems: any number.
          numbers: of the problems, distinct under one key; by default their indices. Rollout j of
            problem i has the id numbers[i] * G + j, which with the key chooses its random numbers.

        Raises:
          DataError: a prompt is too long; names the problem.
        """
        G = self.group_size
        prompts = [
            check_fits(self._task.prompt(p), self._engine.shape.prompt_tokens, p, "prompt_tokens")
            for p in problems
        ]
        numbers = range(len(problems)) if numbers is None else numbers
        ids = [range(number * G, (number + 1) * G) for number in numbers]
        ended: list[dict[int, tuple[Response, Verdict | Future[Verdict] | None]]]
        ended = [{} for _ in problems]
        waited = 0.0
        for batch in self._engine(
            params, prompts, ids, key=key, sampling_params=sampling_params, poll=poll
        ):
            for response in batch.responses:
                problem, group = problems[response.prompt], ended[response.prompt]
                began, idle = time.monotonic(), batch.device_is_idle()
                group[response.member] = response, self._reply(problem, response)
                waited += (time.monotonic() - began) * idle
                if len(group) == G:
                    responses, replies = zip(*(group.pop(j) for j in range(G)), strict=True)
                    yield (
                        response.prompt,
                        Rollouts(
                            problems=[problem] * G,
                            responses=[r.tokens for r in responses],
                            sampling_logprobs=[r.sampling_logprobs for r in responses],
                            model_logprobs=[r.model_logprobs for r in responses],
                            truncated=np.array([r.stop == STOP_LENGTH for r in responses]),
                            replies=[*replies],
                            waited=waited,
                        ),
                    )
                    waited = 0.0

    def _reply(self, problem: Problem, response: Response) -> Verdict | Future[Verdict] | None:
        """The verdict, or the future of it; each host asks for those of its own rollouts."""
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
        """As `by_problem`, all of them in the order of the problems; there is one at least."""
        made = dict(
            self.by_problem(params, problems, key=key, sampling_params=sampling_params, poll=poll)
        )
        return concatenate([made[i] for i in range(len(problems))])
