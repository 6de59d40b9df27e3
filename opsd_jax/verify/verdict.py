"""What a verifier is, and what it says. Imports nothing heavy: workers start with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from opsd_jax.problem import Problem


class Verdict(NamedTuple):
    """Whether a response is correct, and in a word or two why: `reason` is counted in metrics."""

    correct: bool
    reason: str


MATCH, MISMATCH = Verdict(True, "match"), Verdict(False, "mismatch")
NO_ANSWER = Verdict(False, "no answer")
TRUNCATED = Verdict(False, "truncated")  # never asked: cut at its budget
TIMEOUT, CRASH, MEMORY = (Verdict(False, reason) for reason in ("timeout", "crash", "memory"))
REASONS = tuple(
    verdict.reason for verdict in (MATCH, MISMATCH, NO_ANSWER, TRUNCATED, TIMEOUT, CRASH, MEMORY)
)

Judge = Callable[[Problem, str], Verdict]  # (problem, response text) -> verdict
Extract = Callable[[Problem, str], str | None]  # (problem, response text) -> the answer in it
Question = Any  # what is left to be judged: picklable, and the same whenever the verdict is


def unchecked(problem: Problem) -> Verdict:
    """MATCH: there is no telling whether the problem's answer can be verified."""
    return MATCH


class Verifier(NamedTuple):
    """A judge in two halves, so that only what may be slow or hostile goes to a worker.

    Called with a problem and a response it runs both, without any bound on time or memory; a
    `VerifierPool` bounds the second and asks it once a question.

    Attributes:
      ask: `(problem, response) -> Verdict`, where that is quick and safe to find, or the question
        that is left. Runs in the caller.
      judge: `question -> Verdict`. Runs in a worker: a function of a module or a `partial` of one.
      ask_gold: `problem -> Verdict | question`, as `ask`, whether the problem's own answer can be
        verified against itself.
      extract: `(problem, response) -> the answer as the verifier reads it`, None where there is
        none. For majority votes; optional.
    """

    ask: Callable[[Problem, str], Verdict | Question]
    judge: Callable[[Question], Verdict]
    ask_gold: Callable[[Problem], Verdict | Question] = unchecked
    extract: Extract | None = None

    def __call__(self, problem: Problem, response: str) -> Verdict:
        question = self.ask(problem, response)
        return question if isinstance(question, Verdict) else self.judge(question)


def verdict_on(right: bool) -> Verdict:
    """MATCH or MISMATCH."""
    return MATCH if right else MISMATCH
