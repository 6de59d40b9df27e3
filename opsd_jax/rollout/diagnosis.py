"""Tells the user what is wrong if most responses have no answer, and which settings to change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from opsd_jax.storage.foreign import escape
from opsd_jax.verify.verdict import NO_ANSWER, TRUNCATED

MANY = 0.5  # fraction of responses without an answer, from which the details say what to change
SHOWN = 2  # responses whose ends are shown
END = 160  # characters of such an end


class Diagnosis(NamedTuple):
    """What a group of responses looks like.

    Attributes:
      counts: how many of them are correct, have no readable answer, and are truncated.
      details: the ends of some responses, and what to change. "" if there is little to change.
    """

    counts: str
    details: str

    def __str__(self) -> str:
        return "\n".join(filter(None, self))


def diagnose(
    reasons: Sequence[str],
    correct: int,
    text: Callable[[int], str],
    *,
    section: str,
    response_tokens: int,
    unanswered: str,
) -> Diagnosis:
    """Describes verified responses, and says what to change if few of them have an answer.

    Args:
      reasons: the reason of each response's verdict.
      correct: number of correct responses.
      text: index of a response -> its text.
      section: the config section with the sampling options, such as "evaluation" or "rlvr".
      response_tokens: the token budget of a response.
      unanswered: what to do about responses without a readable answer (`Task.unanswered`).
    """
    total = len(reasons)
    unread, cut = reasons.count(NO_ANSWER.reason), reasons.count(TRUNCATED.reason)
    counts = (
        f"{correct} of {total} responses are correct, {unread} have no readable answer, and {cut} "
        f"are truncated at {response_tokens} tokens."
    )
    if correct and unread + cut < MANY * total:
        return Diagnosis(counts, "")
    lines = [f"One ends {_end(text(i))}" for i in _examples(reasons)]
    if cut >= MANY * total / 2:
        flag = ", or --response-tokens of `evaluate`" if section == "evaluation" else ""
        lines.append(f"Truncated responses: raise config.{section}.response_tokens{flag}.")
    if unread >= MANY * total / 2:
        lines.append(f"No readable answer: {unanswered}.")
    if not correct and unread + cut < MANY * total:
        lines.append("Wrong answers only: choose easier problems, or train with SFT first.")
    return Diagnosis(counts, "\n".join(lines))


def _examples(reasons: Sequence[str]) -> list[int]:
    """Returns the indices of responses to show: one without an answer and one truncated, if any."""
    wanted = (NO_ANSWER.reason, TRUNCATED.reason)
    lacking = [i for i, reason in enumerate(reasons) if reason in wanted]
    first = [reasons.index(reason) for reason in wanted if reason in reasons]
    return sorted([*first, *(i for i in lacking if i not in first)][:SHOWN])


def _end(text: str) -> str:
    """Returns the quoted end of a text."""
    start = "..." if len(text) > END else ""
    return f"'{start}{escape(text[-END:])}'"
