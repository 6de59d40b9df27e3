"""Rollouts of problems, verified: the device samples one call while workers judge the last.

Verdicts are waited for when they are asked for, and no sooner.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from opsd_jax.data.problem import Problem
from opsd_jax.data.task import Task, check_fits
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Params, Policy
from opsd_jax.rollout import sampler
from opsd_jax.verify.groups import Groups, groups
from opsd_jax.verify.pool import VerifierPool
from opsd_jax.verify.verdict import TRUNCATED, Verdict


class SamplerShape(NamedTuple):
    """The shapes of one sampling program, all fixed before it is compiled.

    Attributes:
      prompts: prompts a call, N.
      prompt_tokens: the longest prompt, P.
      group_size: rollouts of each prompt, G.
      response_tokens: the budget of a response, L; a rollout that fills it is truncated.
    """

    prompts: int
    prompt_tokens: int
    group_size: int
    response_tokens: int


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


def left_pad(prompts: Sequence[Sequence[int]], width: int, pad_id: int):
    """Prompts in the form that sampling and scoring take: int32 `(tokens, positions)`, [N, width].

    Raises:
      ValueError: a prompt is longer than `width`.
    """
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for i, ids in enumerate(prompts):
        if not 0 < len(ids) <= width:
            raise ValueError(f"prompt {i} has {len(ids)} tokens; between 1 and {width} fit.")
        tokens[i, width - len(ids) :] = ids
        positions[i, width - len(ids) :] = np.arange(len(ids))
    return tokens, positions


def _is_there(samples: sampler.Samples) -> bool:
    """Whether the device has made them."""
    return samples.tokens.is_ready()  # type: ignore[attr-defined]


class Collector:
    """Samples and verifies rollouts of one shape. The program compiles here, once."""

    def __init__(
        self,
        policy: Policy,
        abstract_params: Params,
        mesh: jax.sharding.Mesh,
        task: Task,
        pool: VerifierPool,
        shape: SamplerShape,
    ):
        """`abstract_params`: the parameters' shapes, with shardings."""
        self.shape, self._mesh, self._task, self._pool = shape, mesh, task, pool
        rows, whole = mesh_lib.rows(mesh), mesh_lib.replicated(mesh)
        N, P, G, L = shape

        def arg(sharding, dtype, *dims):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

        key = jax.eval_shape(lambda: jax.random.key(0))
        args = (
            abstract_params,
            arg(rows, np.int32, N, P),
            arg(rows, np.int32, N, P),
            arg(rows, np.int32, N * G),
            arg(whole, key.dtype),
            arg(whole, np.float32),
            arg(whole, np.int32),
            arg(whole, np.int32),
        )
        self._shardings = tuple(a.sharding for a in args[1:])
        program = jax.jit(
            lambda *a: sampler.generate(policy, *a, max_new_tokens=L), out_shardings=rows
        )
        with jax.set_mesh(mesh):
            self._generate = program.lower(*args).compile()

    def __call__(
        self,
        params: Params,
        problems: Sequence[Problem],
        *,
        key: jax.Array,
        temperature: float,
        progress: Callable[[int], None] = lambda rollouts: None,
    ) -> Rollouts:
        """G rollouts of each problem, in order.

        Args:
          params: the policy's.
          problems: any number; the last call is filled up and what fills it dropped.
          key: PRNG key of this step and purpose; rollout j of problem i uses the id i * G + j.
          temperature: of sampling, 0 for greedy.
          progress: is told the number of rollouts done after each call.

        Raises:
          DataError: a prompt is too long; names the problem.
        """
        N, P, G, _ = self.shape
        prompts = [
            check_fits(self._task.prompt(problem), P, problem, "prompt_tokens")
            for problem in problems
        ]
        tokenizer = self._task.tokenizer
        scalars = np.float32(temperature), np.int32(tokenizer.eos_id), np.int32(tokenizer.pad_id)

        def sample(first: int) -> sampler.Samples:
            ids = prompts[first : first + N]
            arrays = left_pad(ids + ids[-1:] * (N - len(ids)), P, tokenizer.pad_id)
            rollout_ids = np.arange(first * G, (first + N) * G, dtype=np.int32)
            arguments = jax.device_put((*arrays, rollout_ids, key, *scalars), self._shardings)
            return self._generate(params, *arguments)

        responses, logprobs, truncated = [], [], []
        replies: list[Verdict | Future[Verdict]] = []
        waited = 0.0
        starts = range(0, len(problems), N)
        ahead: sampler.Samples | None = sample(0)
        for first in starts:
            # The device gets its next call before the host looks at what it has done.
            call, ahead = ahead, sample(first + N) if first + N in starts else None
            samples = jax.device_get(call)
            for row in range(min(N, len(problems) - first) * G):
                ids = samples.tokens[row, : samples.lengths[row]]
                responses.append(ids)
                logprobs.append(samples.logprobs[row, : len(ids)])
                truncated.append(samples.stop[row] == sampler.STOP_LENGTH)
                text, problem = tokenizer.decode(ids.tolist()), problems[first + row // G]
                began, idle = time.monotonic(), ahead is None or _is_there(ahead)
                replies.append(TRUNCATED if truncated[-1] else self._pool.submit(problem, text))
                waited += (time.monotonic() - began) * idle
            progress(len(responses))
        return Rollouts(
            problems=[problem for problem in problems for _ in range(G)],
            responses=responses,
            logprobs=logprobs,
            truncated=np.array(truncated),
            replies=replies,
            waited=waited,
        )
