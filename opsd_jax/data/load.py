"""Loads the data of a run: reads its sources, removes duplicates, and holds out problems.

Sources are processed in the order of their names, so the order of a config's fields has no effect.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping
from typing import NamedTuple

from opsd_jax.data import sources
from opsd_jax.data.duplicates import without_duplicates
from opsd_jax.data.options import DataOptions, SourceOptions
from opsd_jax.data.sources import Counts
from opsd_jax.problem import DataError, Problem
from opsd_jax.verify.pool import check_golds
from opsd_jax.verify.verdict import Verifier
from opsd_jax.verify.verifiers import from_options

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """A run's training and held-out problems, and the verifier and row counts of each source.

    Attributes:
      train: source -> problems to train on.
      heldout: source -> problems to evaluate on.
      counts: source -> numbers of rows that were kept and left out.
      verifiers: source -> its verifier, for sources in `train` and `heldout`.
    """

    train: dict[str, list[Problem]]
    heldout: dict[str, list[Problem]]
    counts: dict[str, Counts]
    verifiers: dict[str, Verifier]


def load(options: DataOptions) -> Data:
    """Loads the problems of all sources in `config.data`, and logs how many rows each source keeps.

    A training problem is removed if its question is in a source of `heldout` or `exclude`, or
    equals an earlier question (`duplicates.normalise` decides which questions are equal).

    Raises:
      DataError: a source cannot be read, has bad rows, or has no problem left; or no problem is
        held out.
    """
    if not options.heldout and not options.heldout_problems:
        raise DataError(
            "config.data.heldout is empty; expected sources to evaluate on, such as "
            "config.data.heldout.maths = config_lib.source('maths.jsonl'). Otherwise, set "
            "config.data.heldout_problems to the number of `train` problems to hold out."
        )
    counts: dict[str, Counts] = {}
    verifiers: dict[str, Verifier] = {}

    def read(section: str) -> dict[str, list[Problem]]:
        read: dict[str, list[Problem]] = {}
        for name, source in sorted(getattr(options, section).items()):
            field = f"data.{section}.{name}"
            verifiers[name] = _verifier(source, field)
            check = functools.partial(check_golds, verifiers[name])
            read[name], counts[name] = sources.problems(name, source, field, check)
        return read

    heldout, train = read("heldout"), read("train")
    evaluated = {name: [p.question for p in problems] for name, problems in heldout.items()}
    for name, source in sorted(options.exclude.items()):
        evaluated[name], counts[name] = sources.questions(source, f"data.exclude.{name}")
    train, removed = without_duplicates(train, evaluated)
    for name, (overlap, repeated) in removed.items():
        counts[name] = counts[name]._replace(
            kept=len(train[name]),
            overlap=overlap,
            repeated=repeated,
            unsolved=sum(not problem.solution for problem in train[name]),
        )
        if not train[name]:
            raise DataError(
                f"config.data.train.{name}: no problems are left ({counts[name]}); expected at "
                "least one problem that is not in an evaluation set or an earlier training source."
            )
    if not options.heldout:
        train, heldout = hold_out(train, options.heldout_problems)
    _log(options, counts, heldout)
    return Data(train, heldout, counts, verifiers)


def _verifier(source: SourceOptions, field: str) -> Verifier:
    """Returns the verifier of a source. Raises DataError if its options are invalid."""
    try:
        return from_options(source.verifier)
    except ValueError as error:
        raise DataError(f"config.{field}.verifier: {error}") from error


def _log(
    options: DataOptions, counts: Mapping[str, Counts], heldout: Mapping[str, list[Problem]]
) -> None:
    """Logs the row counts of each source, and the number of held-out problems per source."""
    for section in ("heldout", "exclude", "train"):
        for name in sorted(getattr(options, section)):
            logger.info("data: %s.%s: %s", section, name, counts[name])
    if not options.heldout:
        numbers = ", ".join(f"{len(problems)} of {name}" for name, problems in heldout.items())
        logger.info("data: held out of these: %s", numbers)


def hold_out(
    train: dict[str, list[Problem]], number: int
) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]]]:
    """Splits training problems into problems to train on and problems to evaluate on.

    The split depends only on a digest of each question. It does not depend on the order of the
    problems, and changes little when problems are added.

    Args:
      train: source -> problems.
      number: number of problems to hold out.

    Returns:
      `(train, heldout)`, each as source -> problems.

    Raises:
      DataError: a source would have no problem left to train on.
    """
    digest = lambda problem: hashlib.blake2b(problem.question.encode()).digest()
    digests = sorted(digest(problem) for problems in train.values() for problem in problems)
    if number >= len(digests):
        raise DataError(
            f"config.data.heldout_problems is {number}; expected fewer than the {len(digests)} "
            "problems of config.data.train."
        )
    last = digests[number - 1]
    kept, held = {}, {}
    for name, problems in train.items():
        kept[name] = [problem for problem in problems if digest(problem) > last]
        if not kept[name]:
            raise DataError(
                f"config.data.heldout_problems is {number}, which holds out all problems of "
                f"config.data.train.{name}; expected a smaller number."
            )
        if held_out := [problem for problem in problems if digest(problem) <= last]:
            held[name] = held_out
    return kept, held
