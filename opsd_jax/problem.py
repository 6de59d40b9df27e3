"""A problem as text. This module imports nothing heavy, because verifier workers import it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One problem, as text.

    Attributes:
      id: unique in the data of a run.
      question: text of the question, from which the prompts are made.
      solution: a worked solution; "" if there is none.
      answer: the right answer, which the verifier compares with a response's answer.
      source: name of the data source, which selects the verifier.
      extra: column -> value of the further columns that the source's `extra` lists, such as test
        cases.
    """

    id: int | str
    question: str
    solution: str
    answer: str
    source: str = ""
    extra: Mapping[str, Any] = {}


class DataError(ValueError):
    """Data that cannot be used. The message names the place, what was found and the fix."""
