"""The result of a verification, and the interface of a verifier.

This module imports nothing heavy, because every worker process imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from opsd_jax.problem import Problem


class Verdict(NamedTuple):
    """The result of verifying one response.

    Attributes:
      correct: whether the response is correct.
      reason: why, in a word or two. The metrics count each reason.
    """

    correct: bool
    reason: str


MATCH, MISMATCH = Verdict(True, "match"), Verdict(False, "mismatch")
NO_ANSWER = Verdict(False, "no answer")
TRUNCATED = Verdict(False, "truncated")  # the response filled its budget and is not verified
TIMEOUT, CRASH, MEMORY = (Verdict(False, reason) for reason in ("timeout", "crash", "memory"))
REASONS = tuple(
    verdict.reason for verdict in (MATCH, MISMATCH, NO_ANSWER, TRUNCATED, TIMEOUT, CRASH, MEMORY)
)

Judge = Callable[[Problem, str], Verdict]  # (problem, response text) -> verdict
Extract = Callable[[Problem, str], str | None]  # (problem, response text) -> answer in the response
# A verification job: the input of a verifier's `judge`. It is picklable, and equal jobs have equal
# verdicts.
Job = Any


def accept_gold(problem: Problem) -> Verdict:
    """Returns MATCH for every problem. It is the default `prepare_gold` of a `Verifier`."""
    return MATCH


class Verifier(NamedTuple):
    """A verifier in two parts: a fast one for the calling process, and a slow one for a worker.

    Calling a verifier with a problem and a response runs both parts in the calling process, without
    a limit on time or memory. A `VerifierPool` runs `judge` in a worker with limits, once per job.

    Attributes:
      prepare: `(problem, response) -> Verdict` if the verdict is fast and safe to find, otherwise
        the `Job` for `judge`. Runs in the calling process.
      judge: `job -> Verdict`. Runs in a worker, so it must be a module-level function or a
        `functools.partial` of one.
      prepare_gold: `problem -> Verdict | Job`, like `prepare`, but checks whether the problem's own
        (gold) answer verifies against itself.
      extract: `(problem, response) -> answer` as the verifier reads it, or None if the response has
        no answer. Optional; evaluations use it for majority votes.
    """

    prepare: Callable[[Problem, str], Verdict | Job]
    judge: Callable[[Job], Verdict]
    prepare_gold: Callable[[Problem], Verdict | Job] = accept_gold
    extract: Extract | None = None

    def __call__(self, problem: Problem, response: str) -> Verdict:
        prepared = self.prepare(problem, response)
        return prepared if isinstance(prepared, Verdict) else self.judge(prepared)


def checked(found: tuple[bool, str]) -> Verdict:
    """Returns what a verifier has returned as a `Verdict`.

    Raises:
      TypeError, ValueError: it is not a pair of a bool and a reason.
    """
    correct, reason = found
    if correct not in (True, False):
        raise TypeError(f"a verifier returned {found!r}; expected a Verdict.")
    return Verdict(bool(correct), str(reason))


def verdict_on(right: bool) -> Verdict:
    """Returns MATCH if `right` is true, otherwise MISMATCH."""
    return MATCH if right else MISMATCH
