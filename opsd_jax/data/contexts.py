"""Privileged contexts: texts that the teacher's prompt contains and the student's does not.

`CONTEXTS` is the table of all kinds. An OPSD stage names one or more of them, or a function of your
own as "package.module:function". A rollout without a usable context is not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from opsd_jax.options import fail, import_function
from opsd_jax.problem import Problem
from opsd_jax.verify.extract import after_thinking

SIBLINGS = ("shortest", "first")


class Context(NamedTuple):
    """The privileged context of one rollout.

    Attributes:
      kind: key of CONTEXTS. It selects the wording around the text.
      text: the context itself.
    """

    kind: str
    text: str


class Attempt(NamedTuple):
    """A rollout as the `Find` functions see it: its text, length and correctness.

    Attributes:
      text: the decoded response.
      tokens: length of the response, in tokens.
      correct: whether the verifier accepted it.
    """

    text: str
    tokens: int
    correct: bool


# (problem, index of the rollout in its group, all rollouts of the group) -> the text of the
# context, or None if this rollout has none.
Find = Callable[[Problem, int, Sequence[Attempt]], str | None]


class ContextOptions(Protocol):
    """The options of an OPSD stage that determine how its privileged contexts are found."""

    @property
    def group_size(self) -> int: ...

    @property
    def sibling(self) -> str: ...

    @property
    def sibling_thinking(self) -> bool: ...

    @property
    def context_column(self) -> str: ...


def solution(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
    """Returns the problem's worked solution, or None if the problem has no solution."""
    return problem.solution or None


def answer(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
    """Returns the problem's answer, or None if the problem has no answer."""
    return problem.answer or None


def nothing(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
    """Returns "" as the context, for context kinds whose wording has no {context} placeholder."""
    return ""


def sibling(which: str = "shortest", *, thinking: bool = False) -> Find:
    """Returns a function that picks the context from the problem's other correct rollouts.

    Args:
      which: "shortest" picks the correct rollout with the fewest tokens, "first" the one with the
        lowest index.
      thinking: whether the text includes the rollout's thinking. If not, the text is what follows
        `</think>`, or the whole response if it contains no thinking.
    """

    def find(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
        others = [other for i, other in enumerate(group) if i != rollout and other.correct]
        if which == "shortest":
            others.sort(key=lambda other: other.tokens)  # stable: ties keep the order of the group
        for other in others:
            text = other.text if thinking else after_thinking(other.text)
            if text and (text := text.strip()):
                return text
        return None

    return find


def column(name: str) -> Find:
    """Returns a function that reads the context from the extra column `name` of the data."""

    def find(problem: Problem, rollout: int, group: Sequence[Attempt]) -> str | None:
        value = problem.extra.get(name)
        return None if value is None else str(value).strip() or None

    return find


class ContextKind(NamedTuple):
    """A kind of privileged context: how to find its text, and the wording around this text.

    Attributes:
      find: takes the options of the OPSD stage and returns the function that finds the text. None
        if the model writes the text during the run (stages/memos.py).
      wording: default value of `config.data.contexts.<kind>`, the sentence around the text. "" if
        the teacher's prompt is the same as the student's.
      needs_group: whether the text depends on the other rollouts of the problem.
      needs_context: whether the wording must contain "{context}".
      check: `(options, field of the section)`: raises ConfigError for options that the kind cannot
        use.
    """

    find: Callable[[ContextOptions], Find] | None
    wording: str
    needs_group: bool = False
    needs_context: bool = True
    check: Callable[[ContextOptions, str], None] = lambda options, field: None


def _needs_siblings(options: ContextOptions, field: str) -> None:
    if options.group_size < 2:
        fail(
            f"{field}.group_size",
            options.group_size,
            "at least 2, because kind 'sibling' needs several rollouts of each problem",
        )


def _needs_column(options: ContextOptions, field: str) -> None:
    if not options.context_column:
        fail(f"{field}.context_column", "", "the name of one of the sources' `extra` columns")


CONTEXTS: dict[str, ContextKind] = {
    "solution": ContextKind(
        find=lambda options: solution,
        wording="Here is a reference solution:\n{context}",
    ),
    "answer": ContextKind(
        find=lambda options: answer,
        wording="The correct final answer is {context}.",
    ),
    "sibling": ContextKind(
        find=lambda options: sibling(options.sibling, thinking=options.sibling_thinking),
        wording="Here is a correct solution:\n{context}",
        needs_group=True,
        check=_needs_siblings,
    ),
    "concise": ContextKind(
        find=lambda options: nothing,
        wording="Think as briefly as you can: go straight at the answer, take each step once, and "
        "leave out whatever the solution does not need.",
        needs_context=False,
    ),
    "memo": ContextKind(
        find=None,
        wording="You have worked on problems like this one, and recall:\n{context}\n"
        "Use it to solve the problem correctly and without detours.",
    ),
    "column": ContextKind(
        find=lambda options: column(options.context_column),
        wording="{context}",
        check=_needs_column,
    ),
    # The control: student and teacher read the same prompt.
    "none": ContextKind(find=lambda options: nothing, wording="", needs_context=False),
}


def context_kind(name: str, field: str) -> ContextKind:
    """Returns the `ContextKind` for a name: a key of CONTEXTS, or the name of a user's function.

    Args:
      name: key of CONTEXTS, or "package.module:function" of a `Find`.
      field: the config field that holds the name, for the error.

    Raises:
      ConfigError: the function cannot be imported.
    """
    if ":" not in name:
        return CONTEXTS[name]
    find: Find = import_function(name, field)
    return CONTEXTS[worded_as(name)]._replace(find=lambda options: find, needs_group=True)


def is_written(name: str) -> bool:
    """Returns whether the model itself writes the contexts of a kind during the run.

    Args:
      name: as for `context_kind`.
    """
    return ":" not in name and CONTEXTS[name].find is None


def worded_as(name: str) -> str:
    """Returns the key of the entry of CONTEXTS whose wording a context kind uses.

    Args:
      name: as for `context_kind`. A user's function has the wording of "column".
    """
    return "column" if ":" in name else name
