"""What a teacher is shown that the student does not see: the privileged context of a rollout.

Each kind is a small function of (problem, rollout, its group): the text, or None where there is
none to be had. A rollout without a usable context does not train.

| kind | the teacher is shown |
|---|---|
| "solution" | the problem's worked solution |
| "answer" | its answer |
| "sibling" | a correct rollout of the same problem, never the rollout itself |
| "concise" | nothing but the request to be brief |
| "memo" | what the model itself wrote when it looked back at the rollout (stages/memos.py) |
| "column" | a further column of the data |
| "package.module:function" | what a `Find` of one's own returns, in the wording of "column" |
| "none" | nothing: the control; the divergence is 0 where teacher and student are the same |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from opsd_jax.problem import Problem
from opsd_jax.verify.extract import after_thinking

KINDS = ("solution", "answer", "sibling", "concise", "memo", "column", "none")
SIBLINGS = ("shortest", "first")


class Context(NamedTuple):
    """A privileged context: its kind, which chooses the wording around it, and its text."""

    kind: str
    text: str


class Attempt(NamedTuple):
    """A rollout as a context sees it: its text, its length in tokens, and whether it is correct."""

    text: str
    tokens: int
    correct: bool


Find = Callable[[Problem, int, Sequence[Attempt]], str | None]  # (problem, rollout, group) -> text


def solution(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
    """The worked solution of the data."""
    return problem.solution or None


def answer(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
    """The answer of the data."""
    return problem.answer or None


def nothing(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
    """No text: the wording, if there is one, says it all."""
    return ""


def sibling(which: str = "shortest", *, thinking: bool = False) -> Find:
    """A correct rollout of the group, the shortest in tokens or the first; never itself.

    Args:
      which: one of SIBLINGS.
      thinking: show its thinking too; else what follows `</think>`, and of one that did not think
        everything.
    """

    def find(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
        others = [other for i, other in enumerate(group) if i != rollout and other.correct]
        if which == "shortest":
            others.sort(key=lambda other: other.tokens)  # stable: the first of the shortest
        for other in others:
            text = other.text if thinking else after_thinking(other.text)
            if text and (text := text.strip()):
                return text
        return None

    return find


def column(name: str) -> Find:
    """A column that the source's `extra` keeps."""

    def find(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
        value = problem.extra.get(name)
        return None if value is None else str(value).strip() or None

    return find
