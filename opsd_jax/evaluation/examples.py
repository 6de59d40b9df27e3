"""Chooses the examples in a report: pairs of responses by two models to the same problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd_jax.evaluation.statistics import Record


def choose(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Returns up to three (before, after) pairs of responses, one pair per problem.

    The first two pairs are correct both times, and the third is one whose verdict changed. Other
    pairs fill the places that are left.

    Args:
      before, after: the records of two evaluations.
    """
    earlier = {(b["problem"], b["sample"]): b for b in before}
    pairs = [(earlier[k], a) for a in after if (k := (a["problem"], a["sample"])) in earlier]
    both = [(a, b) for a, b in pairs if a["correct"] and b["correct"]]
    changed = [(a, b) for a, b in pairs if a["correct"] != b["correct"]]
    chosen: dict[Any, tuple[Record, Record]] = {}
    for most, candidates in ((2, both), (3, changed), (3, pairs)):
        for b, a in candidates:
            if len(chosen) < most:
                chosen.setdefault(a["problem"], (b, a))
    return list(chosen.values())
