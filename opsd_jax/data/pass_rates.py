"""Reads how often earlier rollouts solved each problem correctly."""

from __future__ import annotations

import pathlib
from collections import Counter

from opsd_jax.problem import DataError
from opsd_jax.storage import files


def pass_rates(path: str, source: str, field: str) -> dict[int | str, float]:
    """Reads the pass rate of each problem: the fraction of its earlier rollouts that are correct.

    Args:
      path: JSON Lines `{"problem": id, "correct": bool or number of correct rollouts}`. A line may
        also have "rollouts", the number of rollouts (default value 1), and "source", the only
        source to which the line applies. `groups.jsonl` of a training stage and `responses.jsonl`
        of an evaluation have this form. An incomplete last line, which a killed run leaves, is
        ignored.
      source: name of the source. Ids in the file may have "source/" in front or not.
      field: config field of the section with the path, for errors.

    Returns:
      Problem id -> pass rate.

    Raises:
      DataError: the file cannot be read, or a line has another form. Names the first such line.
    """
    correct: Counter[str] = Counter()
    rollouts: Counter[str] = Counter()
    try:
        lines = files.read_json_lines(pathlib.Path(path), "Expected the records of rollouts.")
    except files.RecordError as error:
        raise DataError(f"config.{field}.path is {path!r}: {error}") from error
    for number, columns in enumerate(lines, 1):
        if not isinstance(columns, dict):
            raise DataError(
                f"config.{field}: {path}:{number} is a JSON value of type "
                f"{type(columns).__name__}; expected an object with the keys 'problem' and "
                "'correct'."
            )
        if columns.get("source", source) != source:
            continue
        problem, solved = columns.get("problem"), columns.get("correct")
        tried = columns.get("rollouts", 1)
        if not (
            isinstance(problem, str | int)
            and isinstance(solved, int)
            and isinstance(tried, int)
            and 0 <= solved <= tried > 0
        ):
            raise DataError(
                f"config.{field}: {path}:{number} has problem {problem!r}, correct {solved!r} and "
                f"rollouts {tried!r}; expected 'problem' to be an id, 'rollouts' an integer "
                "above 0, and 'correct' a bool or an integer from 0 to 'rollouts'."
            )
        key = f"{source}/{str(problem).removeprefix(f'{source}/')}"
        correct[key] += solved
        rollouts[key] += tried
    return {key: correct[key] / total for key, total in rollouts.items()}
