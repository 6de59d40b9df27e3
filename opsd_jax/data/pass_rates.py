"""How often a problem was solved before, from the records of earlier rollouts."""

from __future__ import annotations

from collections import Counter

from opsd_jax.data import files
from opsd_jax.data.problem import DataError


def pass_rates(path: str, source: str, field: str) -> dict[int | str, float]:
    """The share of correct rollouts of each problem of a source that a file tells of.

    Args:
      path: JSON lines, each `{"problem": id, "correct": true, false or their number}`, with
        "rollouts", of how many, if not of one, and with "source", if not of any. The
        `responses.jsonl` of an evaluation and the `groups.jsonl` of a training stage are such.
      source: its name. Ids are taken with it before them and without.
      field: of the config: where the path stands.

    Raises:
      DataError: the file cannot be read, or a line is not such; names the first.
    """
    correct: Counter[str] = Counter()
    rollouts: Counter[str] = Counter()
    for where, columns, error in files.rows(path, field=field):
        if columns is None:
            raise DataError(f"config.{field}: {where}: {error}.")
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
                f"config.{field}: {where}: problem {problem!r}, correct {right!r}, rollouts {of!r};"
                " expected an id, and how many of how many rollouts are correct."
            )
        key = f"{source}/{str(problem).removeprefix(f'{source}/')}"
        correct[key] += right
        rollouts[key] += of
    return {key: correct[key] / of for key, of in rollouts.items()}
