"""`Problem`: one problem as text. Verifier processes import this module, so it has few imports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One problem from a dataset, as text.

    Attributes:
      id: Identifies the problem; unique among all problems of a run.
      question: The text that the student sees.
      solution: A worked solution, which can be the teacher's privileged context; "" for none.
      answer: The reference answer that the verifier compares a response with.
      source: Name of the data source; each source can have its own verifier. "" for none.
      extra: Values of the further columns that the config requests, by column name, such as the
        test cases of a programming problem.
    """

    id: int | str
    question: str
    solution: str
    answer: str
    source: str = ""
    extra: Mapping[str, Any] = {}


class DataError(ValueError):
    """Raised if the data can't be used. The message gives the source, the row and the reason."""
