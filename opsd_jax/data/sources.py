"""Converts the rows of a source to problems: checks, filters and counts the rows."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from opsd_jax.data import files
from opsd_jax.data.options import ColumnOptions, SourceOptions
from opsd_jax.data.pass_rates import pass_rates
from opsd_jax.problem import DataError, Problem
from opsd_jax.storage.foreign import listed, shown

LISTED = 10  # bad rows that a message lists
BAD_ROWS = 20_000  # bad rows at which reading stops, unless bad rows are dropped
TEXT = "a string that is not empty"  # what a question or an answer should be

# problems -> for each of them "" if its answer verifies against itself, otherwise why not
CheckGolds = Callable[[Sequence[Problem]], Sequence[str]]

logger = logging.getLogger(__name__)


class Counts(NamedTuple):
    """How many rows of a source were read, kept and left out.

    The rows from `bad` to `repeated` were left out.

    Attributes:
      rows: rows in the source.
      kept: problems that remain.
      bad: rows that cannot be used.
      difficulty: rows outside the bounds of `difficulty`.
      pass_rate: rows outside the bounds of `pass_rates`.
      overlap: evaluation set -> rows whose question is also in that set.
      repeated: rows whose question occurred before, in this or an earlier source.
      unrated: problems kept although `pass_rates` has no rate for them.
      unsolved: problems kept that have no solution.
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
            "outside the bounds of difficulty": self.difficulty,
            "outside the bounds of pass_rates": self.pass_rate,
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
    """A row's location, and the errors that were found in the row.

    Attributes:
      location: "file:number".
      errors: descriptions; empty for a row that can be used.
    """

    location: str
    errors: list[str]


class _Candidate(NamedTuple):
    """A row that was read without errors, and its problem. Later checks may add errors to the row.

    Attributes:
      row: the row, whose errors later checks extend.
      problem: the problem.
      difficulty: difficulty of the row; NaN if the source has no such column.
      numbered: whether the row has no id, so that its number is the id.
    """

    row: _Row
    problem: Problem
    difficulty: float
    numbered: bool


def problems(
    name: str, options: SourceOptions, field: str, check_golds: CheckGolds
) -> tuple[list[Problem], Counts]:
    """Returns the problems of a source in the order of its rows, and the `Counts` of these rows.

    Args:
      name: name of the source. The id of every problem starts with it.
      options: the source.
      field: config field of the source, for errors.
      check_golds: checks answers against themselves. It is called once, with the problems that
        pass the filters.

    Raises:
      DataError: rows are bad (one error lists all of them), no problem remains, or an option
        matches no row.
    """
    earlier, level = options.pass_rates, options.difficulty
    rates = pass_rates(earlier.path, name, f"{field}.pass_rates") if earlier.path else {}
    rows, read = _read_rows(name, options, field)
    _mark_repeated_ids(read, options.columns.id)
    good = [c for c in read if not c.row.errors]
    _check_solutions(good, options, field)
    _check_rates(good, rates, name, options, field)
    fitting = [c for c in good if not level.column or level.low <= c.difficulty <= level.high]
    wanted = [
        c for c in fitting if earlier.low <= rates.get(c.problem.id, earlier.low) <= earlier.high
    ]
    _mark_bad_golds(wanted, options, field, check_golds)
    bad = _refuse(rows, options, field)
    kept = [c.problem for c in wanted if not c.row.errors]
    counts = Counts(
        rows=len(rows),
        kept=len(kept),
        bad=bad,
        difficulty=len(good) - len(fitting),
        pass_rate=len(fitting) - len(wanted),
        unrated=sum(c.problem.id not in rates for c in wanted) if earlier.path else 0,
        unsolved=sum(not problem.solution for problem in kept),
    )
    if not kept:
        raise DataError(
            f"config.{field}: no problem of {options.path} remains ({counts}); expected at least "
            "one. Change the filters or the file."
        )
    return kept, counts


def questions(options: SourceOptions, field: str) -> tuple[list[str], Counts]:
    """Returns the questions of a source, ignoring all other columns, and the `Counts` of its rows.

    Raises:
      DataError: rows are bad. One error lists all of them.
    """
    column = options.columns.question
    rows: list[_Row] = []
    kept: list[str] = []
    for row in files.rows(options.path, options.split, field, {column}):
        reader = _Reader(row)
        text = reader(column, _text, TEXT)
        rows.append(reader.row)
        if not reader.row.errors:
            kept.append(text)
        elif len(rows) - len(kept) > BAD_ROWS and options.bad_rows != "drop":
            break
    bad = _refuse(rows, options, field)
    return kept, Counts(rows=len(rows), kept=len(kept), bad=bad)


def _read_rows(
    name: str, options: SourceOptions, field: str
) -> tuple[list[_Row], list[_Candidate]]:
    """Returns all rows of a source, and a `_Candidate` for each row without an error."""
    names = options.columns
    columns = {names.id, names.question, names.answer, names.solution, options.difficulty.column}
    found = files.rows(options.path, options.split, field, columns | {*options.extra})
    rows: list[_Row] = []
    candidates: list[_Candidate] = []
    for number, row in enumerate(found, 1):
        reader = _Reader(row)
        candidate = _read(reader, number, name, options)
        rows.append(reader.row)
        if candidate:
            candidates.append(candidate)
        elif len(rows) - len(candidates) > BAD_ROWS and options.bad_rows != "drop":
            _refuse(rows, options, field)
    return rows, candidates


def _read(read: _Reader, number: int, name: str, options: SourceOptions) -> _Candidate | None:
    """Reads row `number` as a `_Candidate`. Returns None if the row has an error."""
    columns, level = options.columns, options.difficulty.column
    key = read(columns.id, _key, "a string or an integer", absent="")
    question = read(columns.question, _text, TEXT)
    solution = read(columns.solution, _string, "a string", absent="")
    mark = options.answer_after
    answer = read(
        columns.answer,
        functools.partial(_answer_after, mark) if mark else _answer,
        f"a string with {mark!r} and an answer after it"
        if mark
        else f"{TEXT}, an integer, or a list of one such string",
        absent=None if columns.answer else "",  # some verifiers only need `extra`
    )
    extra = {column: read(column, _present, "a value") for column in options.extra}
    difficulty = read(level, _number, "a number") if level else math.nan
    if read.row.errors:
        return None
    problem = Problem(f"{name}/{key or number}", question, solution, answer, name, extra)
    return _Candidate(read.row, problem, difficulty, numbered=not key)


class _Reader:
    """Reads and converts the values of one row, and collects the errors.

    Attributes:
      row: the row's location and errors. Each value that is not as expected adds an error.
    """

    def __init__(self, row: files.Row):
        """Creates a reader for a row, which may already have an error."""
        self._columns = row.columns  # None if the row cannot be read, which is an error already
        self._all_columns = row.all_columns or row.columns or ()
        self.row = _Row(row.location, [row.error] if row.error else [])

    def __call__(
        self, column: str, convert: Callable[[Any], Any], expected: str, absent: Any = None
    ) -> Any:
        """Returns the value of a column after conversion. Records an error if the value is invalid.

        Args:
          column: name of the column, which may be dotted.
          convert: returns the value in its final type, or raises if it is not as expected.
          expected: what the value should be, for the error.
          absent: result if the column has no value. None makes a missing value an error.
        """
        if self._columns is None:
            return absent
        value = reach(self._columns, column)
        if value is None and absent is not None:
            return absent
        try:
            return convert(value)
        except (TypeError, ValueError, OverflowError):
            found = f"is {shown(value)}"
            has = ""
            if value is None:
                columns = listed([*self._all_columns]) or "no columns"
                found, has = "is missing", f" (the row has {columns})"
            self.row.errors.append(f"field {column!r} {found}; expected {expected}{has}")
            return absent


def reach(columns: Mapping[str, Any], column: str) -> Any:
    """Returns the value of a column in a row, or None if the row has no such value.

    Args:
      columns: column -> value, for one row.
      column: name. A dot reads inside an object or, before a number, inside a list, unless a column
        has the dotted name itself.
    """
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


# The functions below convert the value of a column, and raise if it is not as expected.


def _present(value: Any) -> Any:
    """Returns `value` unchanged. Raises TypeError if it is None."""
    if value is None:
        raise TypeError
    return value


def _string(value: Any) -> str:
    """Returns `value`, which must be a string that UTF-8 can encode. Raises for other values."""
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return value


def _text(value: Any) -> str:
    """Returns `value`, which must be a string that is not blank. Raises for other values."""
    if not _string(value).strip():
        raise ValueError
    return value


def _key(value: Any) -> str:
    """Returns `value`, an integer or a non-blank string, as a string. Raises for other values."""
    return str(value) if type(value) is int else _text(value)


def _answer(value: Any) -> str:
    """Converts an answer (a text, a whole number or a list with one text) to a string.

    Raises for other values.
    """
    if isinstance(value, list) and len(value) == 1:
        return _text(value[0])
    # Larger floats cannot represent every integer.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    return _key(value)


def _answer_after(mark: str, value: Any) -> str:
    """Returns the text after the last `mark` in a string. Raises if there is no such text."""
    _, found, answer = _string(value).rpartition(mark)
    if not found:
        raise ValueError
    return _text(answer.strip())


def _number(value: Any) -> float:
    """Returns `value`, an int or float, as a float. Raises for NaN and for other types."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError
    return float(value)


def _mark_repeated_ids(candidates: Sequence[_Candidate], column: str) -> None:
    """Adds an error to each row that has the same id as an earlier row.

    Args:
      candidates: rows without an error.
      column: name of the column with the id.
    """
    first: dict[int | str, _Candidate] = {}
    for candidate in candidates:
        earlier = first.setdefault(candidate.problem.id, candidate)
        if earlier is candidate:
            continue
        location = earlier.row.location
        if candidate.numbered:
            error = f"field {column!r} is missing, and the row's number is the id of {location}"
        elif earlier.numbered:
            error = f"field {column!r} is the number of {location}, which has no id"
        else:
            error = f"field {column!r} is also the id of {location}"
        candidate.row.errors.append(f"{error}; expected a unique id")


def _check_solutions(good: Sequence[_Candidate], options: SourceOptions, field: str) -> None:
    """Raises DataError if the config names a solution column that no row has."""
    column = options.columns.solution
    named = column and column != ColumnOptions().solution
    if named and good and not any(c.problem.solution for c in good):
        raise DataError(
            f"config.{field}.columns.solution is {column!r}, which no row of {options.path} has; "
            "expected the name of a column, or '' for no solutions."
        )


def _check_rates(
    good: Sequence[_Candidate],
    rates: Mapping[int | str, float],
    name: str,
    options: SourceOptions,
    field: str,
) -> None:
    """Raises DataError if the file of pass rates has no rate for any problem of the source.

    Args:
      good: rows without an error.
      rates: problem id -> pass rate.
      name: name of the source.
      options: the source.
      field: config field of the source.
    """
    path = options.pass_rates.path
    if path and good and not any(c.problem.id in rates for c in good):
        ids = [str(key).removeprefix(f"{name}/") for key in rates]
        found = f"has problem ids such as {ids[0]!r}" if ids else "has no records of this source"
        raise DataError(
            f"config.{field}.pass_rates.path is {path!r}, which {found}, but the problems of "
            f"{options.path} have ids such as {good[0].problem.id!r}; expected the records of a "
            "run with these problems."
        )


def _mark_bad_golds(
    wanted: Sequence[_Candidate], options: SourceOptions, field: str, check_golds: CheckGolds
) -> None:
    """Adds an error to each row whose own answer the source's verifier rejects.

    Raises:
      DataError: the source has no answers, and its verifier needs them.
    """
    reasons = check_golds([c.problem for c in wanted])
    if not options.columns.answer and wanted and all(reasons):
        raise DataError(
            f"config.{field}.columns.answer is '', so no problem has an answer, but config.{field}."
            f"verifier, of kind {options.verifier.kind!r}, needs one ({reasons[0]}); expected the "
            "name of a column."
        )
    for candidate, reason in zip(wanted, reasons, strict=True):
        if reason:
            answer = f"field {options.columns.answer!r} is {shown(candidate.problem.answer)}"
            candidate.row.errors.append(f"{answer}; it does not verify against itself: {reason}")


def _refuse(rows: Sequence[_Row], options: SourceOptions, field: str) -> int:
    """Raises DataError if any row is bad. If `bad_rows` is "drop", only logs and counts bad rows.

    Returns the number of bad rows.

    Raises:
      DataError: rows are bad, and `bad_rows` is not "drop".
    """
    bad = [f"{row.location}: {'; '.join(row.errors)}" for row in rows if row.errors]
    if bad:
        lines = listed(bad, "\n  ", LISTED)
        message = f"config.{field}: {len(bad)} bad of {len(rows)} rows:\n  {lines}"
        if options.bad_rows != "drop":
            fix = f"Fix them, or leave them out with config.{field}.bad_rows='drop'."
            raise DataError(f"{message}\n{fix}")
        logger.warning("%s\nThese rows are left out.", message)
    return len(bad)
