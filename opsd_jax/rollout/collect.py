"""Rollouts of problems, verified: the device samples one call while workers judge the last.

Verdicts are waited for when they are asked for, and no sooner.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from opsd_jax.data.problem import Problem
from opsd_jax.data.task import Task, check_fits
from opsd_jax.policy import Params
from opsd_jax.rollout.engine import Engine
from opsd_jax.verify.groups import Groups, groups
from opsd_jax.verify.pool import VerifierPool
from opsd_jax.verify.verdict import TRUNCATED, Verdict


class Judged(NamedTuple):
    """What the verifier says of N rollouts.

    Attributes:
      verdicts: one a rollout; "truncated" where it was not asked.
      groups: the masks that they make.
      wait_seconds: how long the device had to wait for them.
    """

    verdicts: list[Verdict]
    groups: Groups
    wait_seconds: float


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """N rollouts on the host, ragged: lists hold one entry a rollout.

    Attributes:
      problems: the problem of each; those of a group stand next to each other.
      responses: int32 arrays, the sampled ids with EOS, as the device drew them.
      logprobs: float32 arrays, behaviour log-probability of each token.
      truncated: bool [N], cut at the budget.
      replies: the verdict of each, or the future of it.
      waited: seconds that the device waited for verdicts already.
    """

    problems: list[Problem]
    responses: list[np.ndarray]
    logprobs: list[np.ndarray]
    truncated: np.ndarray
    replies: list[Verdict | Future[Verdict]]
    waited: float = 0.0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each response, int [N]."""
        return np.array([len(response) for response in self.responses])

    @functools.cached_property
    def judged(self) -> Judged:
        """The verdicts. To ask for them is to wait until the last is there: ask late."""
        began = time.monotonic()
        verdicts = [r if isinstance(r, Verdict) else r.result() for r in self.replies]
        waited = self.waited + time.monotonic() - began
        return Judged(verdicts, groups(verdicts, self.truncated), waited)

    def __add__(self, other: Rollouts) -> Rollouts:
        """These, then those of other problems."""
        return Rollouts(
            self.problems + other.problems,
            self.responses + other.responses,
            self.logprobs + other.logprobs,
            np.concatenate([self.truncated, other.truncated]),
            [*self.judged.verdicts, *other.judged.verdicts],
            self.judged.wait_seconds + other.judged.wait_seconds,
        )


class Collector:
    """Samples and verifies rollouts."""

    def __init__(self, engine: Engine, task: Task, pool: VerifierPool):
        self.shape, self._engine, self._task, self._pool = engine.shape, engine, task, pool

    def calls(
        self,
        params: Params,
        problems: Sequence[Problem],
        *,
        key: jax.Array,
        temperature: float,
        offset: int = 0,
    ) -> Iterator[Rollouts]:
        """G rollouts of each problem, in order, those of one device call at a time.

        The arguments are those of `Engine`, with problems for prompts.

        Raises:
          DataError: a prompt is too long; names the problem.
        """
        _, P, G, _ = self.shape
        prompts = [
            check_fits(self._task.prompt(problem), P, problem, "prompt_tokens")
            for problem in problems
        ]
        decode = self._task.tokenizer.decode
        for call in self._engine(params, prompts, key=key, temperature=temperature, offset=offset):
            answered = [problems[call.first + i // G] for i in range(len(call.responses))]
            replies: list[Verdict | Future[Verdict]] = []
            waited = 0.0
            for problem, ids, truncated in zip(
                answered, call.responses, call.truncated, strict=True
            ):
                text = self._task.begun + decode(ids.tolist())
                began, idle = time.monotonic(), call.device_idles()
                replies.append(TRUNCATED if truncated else self._pool.submit(problem, text))
                waited += (time.monotonic() - began) * idle
            yield Rollouts(answered, call.responses, call.logprobs, call.truncated, replies, waited)

    def __call__(
        self,
        params: Params,
        problems: Sequence[Problem],
        *,
        key: jax.Array,
        temperature: float,
    ) -> Rollouts:
        """As `calls`, all of them together; there is a problem at least."""
        calls = [*self.calls(params, problems, key=key, temperature=temperature)]
        return Rollouts(
            problems=[problem for call in calls for problem in call.problems],
            responses=[ids for call in calls for ids in call.responses],
            logprobs=[values for call in calls for values in call.logprobs],
            truncated=np.concatenate([call.truncated for call in calls]),
            replies=[reply for call in calls for reply in call.replies],
            waited=sum(call.waited for call in calls),
        )
