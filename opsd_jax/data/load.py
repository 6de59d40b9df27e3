"""The data of a run: every source that the config names, free of duplicates and of the evaluation.

Sources are taken in the order of their names, so that a config means the same however it is kept.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from typing import NamedTuple

from opsd_jax.data import sources
from opsd_jax.data.duplicates import without_duplicates
from opsd_jax.data.options import DataOptions
from opsd_jax.data.sources import Counts
from opsd_jax.problem import DataError, Problem
from opsd_jax.verify.pool import check_golds
from opsd_jax.verify.verdict import Verifier
from opsd_jax.verify.verifiers import from_options


class Data(NamedTuple):
    """The problems of each source by its name, what became of its rows, and who judges."""

    train: dict[str, list[Problem]]
    heldout: dict[str, list[Problem]]
    counts: dict[str, Counts]
    verifiers: dict[str, Verifier]


def load(options: DataOptions) -> Data:
    """Reads the sources of `config.data`, and tells standard error how many rows were left out.

    A training problem is left out whose question also stands in a held-out source or in one of
    `exclude`, or came before, as `normalise` has it.

    Raises:
      DataError: a source cannot be read, has bad rows, or has no problem left; or there is none
        held out.
    """
    verifiers: dict[str, Verifier] = {}
    data: dict[str, dict[str, list[Problem]]] = {"heldout": {}, "train": {}}
    counts: dict[str, Counts] = {}
    for part in data:
        # An evaluation has no others.
        if part == "heldout" and not options.heldout and not options.heldout_problems:
            raise DataError(
                f"config.data.{part} is empty; expected sources, such as "
                f"config.data.{part}.maths = config_lib.source('maths.jsonl'), or in "
                "config.data.heldout_problems how many of `train` to hold out."
            )
        for name, section in sorted(getattr(options, part).items()):
            field = f"data.{part}.{name}"
            try:
                verifiers[name] = from_options(section.verifier)
            except ValueError as error:
                raise DataError(f"config.{field}.verifier: {error}") from error
            check = functools.partial(check_golds, verifiers[name])
            data[part][name], counts[name] = sources.problems(name, section, field, check)
    evaluated = {name: [p.question for p in part] for name, part in data["heldout"].items()}
    for name, section in sorted(options.exclude.items()):
        field = f"data.exclude.{name}"
        evaluated[name], counts[name] = sources.questions(section, field)
    data["train"], counted = without_duplicates(data["train"], evaluated)
    for name, (overlap, repeated) in counted.items():
        kept = data["train"][name]
        counts[name] = counts[name]._replace(
            kept=len(kept),
            overlap=overlap,
            repeated=repeated,
            unsolved=sum(not problem.solution for problem in kept),
        )
        if not kept:
            raise DataError(f"config.data.train.{name}: no problem is left: {counts[name]}.")
    if not options.heldout:
        data["train"], data["heldout"] = hold_out(data["train"], options.heldout_problems)
    for part in ("heldout", "exclude", "train"):
        for name in sorted(getattr(options, part)):
            print(f"data: {part}.{name}: {counts[name]}", file=sys.stderr)
    if not options.heldout:
        shares = ", ".join(f"{len(part)} of {name}" for name, part in data["heldout"].items())
        print(f"data: held out of these: {shares}", file=sys.stderr)
    return Data(data["train"], data["heldout"], counts, verifiers)


def hold_out(
    train: dict[str, list[Problem]], number: int
) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]]]:
    """`(train, heldout)`: the problems apart of which `number`, chosen by a digest of the question
    alone, are held out: the same ones in another order, and nearly the same in a file that grew.

    Raises:
      DataError: no problem would be left to train on.
    """
    digest = lambda problem: hashlib.blake2b(problem.question.encode()).digest()
    digests = sorted(digest(problem) for part in train.values() for problem in part)
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
                f"config.data.heldout_problems is {number}, and takes all of train.{name}; "
                "expected fewer."
            )
        if mine := [problem for problem in problems if digest(problem) <= last]:
            held[name] = mine
    return kept, held
