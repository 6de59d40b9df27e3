"""A problem, as text. Imports nothing heavy: a verifier's worker, too, meets one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One problem, as text.

    Attributes:
      id: unique in the data of a run.
      question: what the student sees.
      solution: a worked solution, the teacher's privileged context; "" where there is none.
      answer: what the verifier compares with.
      source: the part of the data that it comes from, which may have a verifier of its own.
      extra: what else its row holds and the config asks for, by name: test cases, say.
    """

    id: int | str
    question: str
    solution: str
    answer: str
    source: str = ""
    extra: Mapping[str, Any] = {}


class DataError(ValueError):
    """A row of the data that cannot be used; says which and why."""
