"""Samples rollouts for problems, and verifies finished rollouts while others are sampled.

Verdicts are futures. The host waits for them only when it needs them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from opsd_jax.data.task import Task, check_fits
from opsd_jax.parallel import hosts
from opsd_jax.parallel.watchdog import Wait, waiting
from opsd_jax.policy import Params
from opsd_jax.problem import Problem
from opsd_jax.rollout.carry import Carried
from opsd_jax.rollout.decoding import Decoding
from opsd_jax.rollout.engine import NO_TOKENS, RUNNING, STOP_LENGTH, Engine, Response
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
      staleness: int [N], for how many steps each rollout has been carried over; None if rollouts
        are not carried over.
      carried: the rollouts that go on in the next step; None likewise.
      decoding: the memory traffic and the time of the calls of the engine that sampled them; None
        if it is unknown.
    """

    problems: list[Problem]
    responses: list[np.ndarray]
    sampling_logprobs: list[np.ndarray]
    model_logprobs: list[np.ndarray]
    truncated: np.ndarray
    replies: list[Reply]
    wait_seconds: float = 0.0
    staleness: np.ndarray | None = None
    carried: Carried | None = None
    decoding: Decoding | None = None

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
            with waiting(Wait.VERIFIER):
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
    """Concatenates one or more `Rollouts`, none of them carried over, in the given order."""
    lists: dict[str, Any] = {
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
        groups = _Groups([()] * len(problems), self.group_size)
        for i, rollouts in self._sample(
            params,
            problems,
            groups,
            key=key,
            sampling_params=sampling_params,
            numbers=numbers,
            poll=poll,
        ):
            groups.forget(i)
            yield i, rollouts

    def some(
        self,
        params: Params,
        problems: Sequence[Problem],
        begun: Sequence[Sequence[Response]],
        *,
        wanted: int,
        first: int,
        key: jax.Array,
        sampling_params: SamplingParams,
        poll: Callable[[], None] = lambda: None,
    ) -> tuple[dict[int, Rollouts], dict[int, list[Response]]]:
        """Samples until enough groups have ended, and returns the responses of the others too.

        Where more groups end at the same time, those with the lowest indices are returned.

        Args:
          params, key, sampling_params, poll: see `Engine.__call__`.
          problems: any number of problems.
          begun: for each problem, the G responses so far, some of which may be RUNNING; () for a
            problem without any. The rollouts that have not ended continue.
          wanted: the number of groups to return.
          first: how many problems, from the first one on, have to be among them; at most `wanted`.

        Returns:
          `(ended, others)`: the rollouts of `wanted` problems whose groups have ended, and the
          responses so far of all other problems, by the index of the problem.

        Raises:
          DataError: a prompt is too long.
        """
        groups = _Groups(begun, self.group_size, wanted, first)
        ended = dict(
            self._sample(
                params, problems, groups, key=key, sampling_params=sampling_params, poll=poll
            )
        )
        kept = {i: ended[i] for i in sorted(ended)[:wanted]}
        return kept, {i: groups.responses(i) for i in range(len(problems)) if i not in kept}

    def _sample(
        self,
        params: Params,
        problems: Sequence[Problem],
        groups: _Groups,
        *,
        key: jax.Array,
        sampling_params: SamplingParams,
        numbers: Sequence[int] | None = None,
        poll: Callable[[], None],
    ) -> Iterator[tuple[int, Rollouts]]:
        """Samples the rollouts that are missing from `groups`, as in `by_problem`."""
        G, wait_seconds = self.group_size, 0.0
        prompts = [
            check_fits(self._task.prompt(p), self._engine.shape.prompt_tokens, p, "prompt_tokens")
            for p in problems
        ]
        numbers = range(len(problems)) if numbers is None else numbers
        for i, j in groups.ended():
            groups.replies[i, j] = self._verify(problems[i], groups.found[i, j])
        for i in filter(groups.is_complete, range(len(problems))):
            yield i, groups.rollouts(i, problems[i], wait_seconds)
        if groups.are_enough:
            return
        members, begun = groups.missing()
        with waiting(Wait.TRAIN_STEP):
            jax.block_until_ready(params)
        for batch in self._engine(
            params,
            prompts,
            [[number * G + j for j in own] for number, own in zip(numbers, members, strict=True)],
            key=key,
            sampling_params=sampling_params,
            begun=begun,
            enough=groups.count,
            poll=poll,
        ):
            for response in batch.responses:
                i, j = response.prompt, members[response.prompt][response.member]
                response = groups.found[i, j] = response._replace(member=j)
                if response.stop == RUNNING:
                    continue
                began, is_idle = time.monotonic(), batch.device_is_idle()
                groups.replies[i, j] = self._verify(problems[i], response)
                wait_seconds += (time.monotonic() - began) * is_idle
                if groups.is_complete(i):
                    yield i, groups.rollouts(i, problems[i], wait_seconds)
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


class _Groups:
    """The responses and replies of groups of rollouts while the groups are sampled.

    Attributes:
      found: the response so far of rollout j of problem i, by (i, j).
      replies: the reply to each response that has ended, by (i, j).
    """

    def __init__(
        self,
        begun: Sequence[Sequence[Response]],
        group_size: int,
        wanted: int | None = None,
        first: int = 0,
    ):
        """Starts from the responses `begun`. `wanted` and `first`: see `Collector.some`."""
        self._begun, self._group_size = begun, group_size
        self._wanted, self._first = wanted, first
        self.found = {(i, j): r for i, group in enumerate(begun) for j, r in enumerate(group)}
        self.replies: dict[tuple[int, int], Reply] = {}
        self._running = [group_size] * len(begun)
        for i, _ in self.ended():
            self._running[i] -= 1

    def ended(self) -> list[tuple[int, int]]:
        """Returns the places of the responses that have ended."""
        return [place for place, response in self.found.items() if response.stop != RUNNING]

    def missing(self) -> tuple[list[list[int]], dict[tuple[int, int], Response]]:
        """Returns the rollouts that have not ended.

        Returns:
          `(members, begun)`: for each problem, the members of its group that have not ended, and
          the responses so far of those, by problem and place in `members`.
        """
        G, ended = self._group_size, {*self.ended()}
        members = [[j for j in range(G) if (i, j) not in ended] for i in range(len(self._begun))]
        places = ((i, n, (i, j)) for i, own in enumerate(members) for n, j in enumerate(own))
        return members, {(i, n): self.found[at] for i, n, at in places if at in self.found}

    @property
    def are_enough(self) -> bool:
        """Whether enough groups have ended."""
        if self._wanted is None:
            return False
        ended = [running == 0 for running in self._running]
        return sum(ended) >= self._wanted and all(ended[: self._first])

    def count(self, ended: Sequence[Response]) -> bool:
        """Counts responses that have ended. Returns `are_enough`."""
        for response in ended:
            self._running[response.prompt] -= 1
        return self.are_enough

    def is_complete(self, i: int) -> bool:
        """Returns whether all rollouts of problem i have a reply."""
        return all((i, j) in self.replies for j in range(self._group_size))

    def forget(self, i: int) -> None:
        """Frees the memory of the rollouts of problem i."""
        for j in range(self._group_size):
            del self.found[i, j], self.replies[i, j]

    def responses(self, i: int) -> list[Response]:
        """Returns the responses so far of the rollouts of problem i."""
        none = Response(i, 0, *NO_TOKENS, RUNNING)
        return [self.found.get((i, j), none._replace(member=j)) for j in range(self._group_size)]

    def rollouts(self, i: int, problem: Problem, wait_seconds: float) -> Rollouts:
        """Returns the `Rollouts` of problem i, whose group is complete."""
        responses = self.responses(i)
        return Rollouts(
            problems=[problem] * len(responses),
            responses=[r.tokens for r in responses],
            sampling_logprobs=[r.sampling_logprobs for r in responses],
            model_logprobs=[r.model_logprobs for r in responses],
            truncated=np.array([r.stop == STOP_LENGTH for r in responses]),
            replies=[self.replies[i, j] for j in range(self._group_size)],
            wait_seconds=wait_seconds,
        )
