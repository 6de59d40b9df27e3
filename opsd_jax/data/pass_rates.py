"""How often a problem was solved before, from the records of earlier rollouts."""

from __future__ import annotations

import pathlib
from collections import Counter

from opsd_jax.problem import DataError
from opsd_jax.storage import files


def pass_rates(path: str, source: str, field: str) -> dict[int | str, float]:
    """The share of correct rollouts of each problem of a source that a file tells of.

    Args:
      path: JSON lines, each `{"problem": id, "correct": true, false or their number}`, with
        "rollouts", of how many, if not of one, and with "source", if not of any. The
        `groups.jsonl` of a training stage and the `responses.jsonl` of an evaluation are such; a
        last line that a killed run cut off is left out.
      source: its name. Ids are taken with it before them and without.
      field: of the config: where the path stands.

    Raises:
      DataError: the file cannot be read, or a line is not such; names the first.
    """
    correct: Counter[str] = Counter()
    rollouts: Counter[str] = Counter()
    try:
        lines = files.read_json_lines(pathlib.Path(path), "Expected the records of rollouts.")
    except (files.RecordError, UnicodeDecodeError) as error:
        raise DataError(f"config.{field}.path is {path!r}: {error}") from error
    for number, columns in enumerate(lines, 1):
        if not isinstance(columns, dict):
            raise DataError(
                f"config.{field}: {path}:{number}: a JSON {type(columns).__name__}; expected an "
                "object."
            )
        if columns.get("source", source) != source:
            continue
        problem, right = columns.get("problem"), columns.get("correct")
        of = columns.get("rollouts", 1)
        if not (
            isinstance(problem, str | int)
            and isinstance(right, int)
            and isinstance(of, int)
            and 0 <= right <= of > 0
        ):
            raise DataError(
                f"config.{field}: {path}:{number}: problem {problem!r}, correct {right!r}, "
                f"rollouts {of!r}; expected an id, and how many of how many rollouts are correct."
            )
        key = f"{source}/{str(problem).removeprefix(f'{source}/')}"
        correct[key] += right
        rollouts[key] += of
    return {key: correct[key] / of for key, of in rollouts.items()}
