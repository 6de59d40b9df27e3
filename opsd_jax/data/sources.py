"""From the rows of a source to its problems: checked, filtered, and counted.

The options of a source are `opsd_jax.data.options.SourceOptions`.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from opsd_jax.data import files
from opsd_jax.data.options import ColumnOptions, SourceOptions
from opsd_jax.data.pass_rates import pass_rates
from opsd_jax.problem import DataError, Problem

LISTED = 10  # bad rows that a message shows
TEXT = "a string that is not empty"  # what is expected of a question and an answer

CheckGolds = Callable[[Sequence[Problem]], Sequence[str]]  # of each problem "", or what is wrong


class Counts(NamedTuple):
    """What became of the rows of a source; those from `bad` to `repeated` were left out.

    Attributes:
      rows: read.
      kept: problems that are left.
      bad: rows that cannot be used.
      difficulty: outside the bounds of `difficulty`.
      pass_rate: outside the bounds of `pass_rates`.
      overlap: evaluation set -> questions that stand there too.
      repeated: questions that came before, in this source or an earlier one.
      unrated: problems without a pass rate where `pass_rates` is given; it leaves them in.
      unsolved: of the problems kept, those without a solution.
    """

    rows: int
    kept: int
    bad: int = 0
    difficulty: int = 0
    pass_rate: int = 0
    overlap: Mapping[str, int] = {}
    repeated: int = 0
    unrated: int = 0
    unsolved: int = 0

    def __str__(self) -> str:
        left_out = {
            "bad": self.bad,
            "of another difficulty": self.difficulty,
            "of another pass rate": self.pass_rate,
            **{f"also in {name}": count for name, count in self.overlap.items()},
            "repeated": self.repeated,
        }
        left_in = {
            "without a pass rate": self.unrated,
            "without a solution": self.unsolved,
        }
        texts = lambda counts: [f"{count} {what}" for what, count in counts.items() if count]
        kept = [f"{self.kept} kept", *texts(left_in)]
        return ", ".join([f"{self.rows} rows", *texts(left_out), *kept])


class _Row(NamedTuple):
    """Where a row stands, and all that is wrong with it."""

    where: str
    wrong: list[str]


class _Candidate(NamedTuple):
    """What was read of a row that nothing was wrong with so far.

    Attributes:
      row: where it stands; what is found wrong later is noted there.
      problem: of the row.
      difficulty: NaN where none is asked for.
      numbered: it has no id: its number stands for one.
    """

    row: _Row
    problem: Problem
    difficulty: float
    numbered: bool


def problems(
    name: str, section: SourceOptions, field: str, check_golds: CheckGolds
) -> tuple[list[Problem], Counts]:
    """The problems of a source, in the order of its rows, and what became of the others.

    Args:
      name: of the source; every problem's id begins with it.
      section: of the config.
      field: of the config: where the section stands.
      check_golds: says whether each answer verifies against itself; asked once, of the problems
        that the filters leave.

    Raises:
      DataError: rows are bad, all of them in one message; no problem is left; or a field of the
        section fits none of the rows.
    """
    earlier, level = section.pass_rates, section.difficulty
    rates = pass_rates(earlier.path, name, f"{field}.pass_rates") if earlier.path else {}
    found = files.rows(section.path, section.split, field, _columns(section))
    rows: list[_Row] = []
    read: list[_Candidate] = []
    for number, row in enumerate(found, 1):
        reader = _Reader(row)
        candidate = _read(reader, number, name, section)
        rows.append(reader.row)
        if candidate:
            read.append(candidate)
    _mark_repeated_ids(read, section.columns.id)
    good = [c for c in read if not c.row.wrong]
    solution = section.columns.solution
    named = solution and solution != ColumnOptions().solution
    if named and good and not any(c.problem.solution for c in good):
        raise DataError(
            f"config.{field}.columns.solution is {solution!r}, which no row of {section.path} has; "
            "expected the name of a column, or '' for none."
        )
    if earlier.path and good and not any(c.problem.id in rates for c in good):
        ids = [str(key).removeprefix(f"{name}/") for key in rates]
        there = f"none of its problems, such as {ids[0]!r}," if ids else "no problem"
        raise DataError(
            f"config.{field}.pass_rates.path is {earlier.path!r}, in which {there} is one of "
            f"{section.path}, such as {good[0].problem.id!r}; expected the records of a run that "
            "rolled them out."
        )
    fitting = [c for c in good if not level.column or level.low <= c.difficulty <= level.high]
    asked_for = [
        c for c in fitting if earlier.low <= rates.get(c.problem.id, earlier.low) <= earlier.high
    ]
    reasons = check_golds([c.problem for c in asked_for])
    if not section.columns.answer and asked_for and all(reasons):
        raise DataError(
            f"config.{field}.columns.answer is '': no problem has an answer, and config.{field}."
            f"verifier, of kind {section.verifier.kind!r}, needs one ({reasons[0]}); expected the "
            "name of a column."
        )
    for candidate, reason in zip(asked_for, reasons, strict=True):
        if reason:
            answer = f"field {section.columns.answer!r} is {_shown(candidate.problem.answer)}"
            candidate.row.wrong.append(f"{answer}; it does not verify against itself: {reason}")
    bad = _refuse(rows, section, field)
    kept = [c.problem for c in asked_for if not c.row.wrong]
    counts = Counts(
        rows=len(rows),
        kept=len(kept),
        bad=bad,
        difficulty=len(good) - len(fitting),
        pass_rate=len(fitting) - len(asked_for),
        unrated=sum(c.problem.id not in rates for c in asked_for) if earlier.path else 0,
        unsolved=sum(not problem.solution for problem in kept),
    )
    if not kept:
        raise DataError(f"config.{field}: no problem is left of {section.path}: {counts}.")
    return kept, counts


def questions(section: SourceOptions, field: str) -> tuple[list[str], Counts]:
    """The questions of a source of which nothing else is needed, and what became of its rows.

    Raises:
      DataError: rows are bad, all of them in one message.
    """
    rows = files.rows(section.path, section.split, field, {section.columns.question})
    readers = [_Reader(row) for row in rows]
    read = [reader(section.columns.question, _text, TEXT) for reader in readers]
    bad = _refuse([reader.row for reader in readers], section, field)
    kept = [text for reader, text in zip(readers, read, strict=True) if not reader.row.wrong]
    return kept, Counts(rows=len(readers), kept=len(kept), bad=bad)


def _columns(section: SourceOptions) -> set[str]:
    """All columns that `_read` may read."""
    names = section.columns
    used = {names.id, names.question, names.answer, names.solution}
    return {*used, *section.extra, section.difficulty.column}


def _read(read: _Reader, number: int, name: str, section: SourceOptions) -> _Candidate | None:
    """What a row holds; None where something is wrong with it, which `read` has noted."""
    columns, level = section.columns, section.difficulty.column
    key = read(columns.id, _key, "a string or an integer", absent="")
    question = read(columns.question, _text, TEXT)
    solution = read(columns.solution, _string, "a string", absent="")
    after = section.answer_after
    answer = read(
        columns.answer,
        functools.partial(_answer_after, after) if after else _answer,
        f"a string with {after!r} and an answer behind it"
        if after
        else f"{TEXT}, an integer, or a list of one such string",
        absent=None if columns.answer else "",  # a verifier may go by `extra` alone
    )
    extra = {column: read(column, _present, "a value") for column in section.extra}
    difficulty = read(level, _number, "a number") if level else math.nan
    if read.row.wrong:
        return None
    problem = Problem(f"{name}/{key or number}", question, solution, answer, name, extra)
    return _Candidate(read.row, problem, difficulty, numbered=not key)


class _Reader:
    """Takes values out of a row, and notes in `row.wrong` each that is not what was expected."""

    def __init__(self, row: files.Row):
        self._columns = row.columns  # None: that there is none is what is wrong with it
        self._there = row.there or row.columns or ()
        self.row = _Row(row.where, [row.error] if row.error else [])

    def __call__(
        self, column: str, kind: Callable[[Any], Any], expected: str, absent: Any = None
    ) -> Any:
        """`kind(value)` of a column, or `absent` where there is none and that is given."""
        if self._columns is None:
            return absent
        value = reach(self._columns, column)
        if value is None and absent is not None:
            return absent
        try:
            return kind(value)
        except (TypeError, ValueError, OverflowError):
            found = f"is {_shown(value)}"
            has = ""
            if value is None:
                found, has = "is missing", f" (has {', '.join(self._there) or 'none'})"
            self.row.wrong.append(f"field {column!r} {found}; expected {expected}{has}")
            return absent


def reach(columns: Mapping[str, Any], column: str) -> Any:
    """The value of a column, None where there is none; a dot leads into an object or a list."""
    if column in columns:
        return columns[column]
    value: Any = columns
    for part in column.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _present(value: Any) -> Any:
    if value is None:
        raise TypeError
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half of a surrogate pair is no text; UnicodeEncodeError is a ValueError
    return value


def _text(value: Any) -> str:
    if not _string(value).strip():
        raise ValueError
    return value


def _key(value: Any) -> str:
    return str(value) if type(value) is int else _text(value)


def _answer(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        return _text(value[0])
    # Beyond that a float does not tell a number from the next one.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    return _key(value)


def _answer_after(mark: str, value: Any) -> str:
    _, found, answer = _string(value).rpartition(mark)
    if not found:
        raise ValueError
    return _text(answer.strip())


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _mark_repeated_ids(read: Sequence[_Candidate], column: str) -> None:
    first: dict[int | str, _Candidate] = {}
    for candidate in read:
        before = first.setdefault(candidate.problem.id, candidate)
        if before is candidate:
            continue
        there = before.row.where
        if candidate.numbered:
            wrong = f"field {column!r} is missing, and the row's number is the id of {there}"
        elif before.numbered:
            wrong = f"field {column!r} is the number of {there}, which has no id"
        else:
            wrong = f"field {column!r} is that of {there} too"
        candidate.row.wrong.append(f"{wrong}; expected one of its own")


def _refuse(rows: Sequence[_Row], section: SourceOptions, field: str) -> int:
    """The number of bad rows, which are told of; raises DataError if they are not to be dropped."""
    bad = [f"{row.where}: {'; '.join(row.wrong)}" for row in rows if row.wrong]
    if bad:
        listed = "\n".join(f"  {line}" for line in bad[:LISTED])
        more = f"\n  and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        message = f"config.{field}: {len(bad)} bad of {len(rows)} rows:\n{listed}{more}"
        if section.bad_rows != "drop":
            mend = f"Mend them, or leave them out with config.{field}.bad_rows='drop'."
            raise DataError(f"{message}\n{mend}")
        print(f"{message}\nleft out.", file=sys.stderr)
    return len(bad)
