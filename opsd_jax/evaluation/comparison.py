"""Paired changes between two evaluations of the same problems, with confidence intervals.

In the shapes, G is the number of problems and R the number of bootstrap resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opsd_jax.evaluation import statistics
from opsd_jax.evaluation.statistics import RATIOS, Records

RESAMPLES = 10_000
CHUNK = 500  # resamples computed at once
LEVEL = 0.95  # coverage of the intervals

Sums = Mapping[str, np.ndarray]  # count -> float64 [G]: `statistics.sums`


class Change(NamedTuple):
    """A metric, and whether its change is relative to its earlier value.

    Attributes:
      metric: one of `statistics.RATIOS`.
      relative: whether the change is divided by the metric's value before.
    """

    metric: str
    relative: bool


# Name -> change, which is multiplied by 100: points and percent.
CHANGES = {
    "d_accuracy_points": Change("accuracy", relative=False),
    "d_length_percent": Change("mean_length", relative=True),
    "d_length_correct_percent": Change("mean_length_correct", relative=True),
    "d_markers_percent": Change("markers_per_1000", relative=True),
}


def compare(before: Records, after: Records, *, seed: int = 0) -> dict[str, Any]:
    """Computes how metrics change between two evaluations, for all problems and for each source.

    Args:
      before, after: records of the same problems, in any order. The numbers of samples may differ.
      seed: seed of the bootstrap.

    Returns:
      A dictionary with the following entries. A value that cannot be computed is nan.
      - each of CHANGES; its standard error `..._se`, by linearisation; the bounds `..._low` and
        `..._high` of its 95 % percentile interval over RESAMPLES resamples of the problems;
      - `problems`: the number of problems;
      - `sources`: source -> the same entries for its problems; empty if there is only one source.

    Raises:
      ValueError: the two evaluations do not have the same problems.
    """
    old, new = statistics.by_problem(before), statistics.by_problem(after)
    if unpaired := [*(old.keys() - new.keys()), *(new.keys() - old.keys())]:
        raise ValueError(
            f"The first evaluation has {len(old)} problems, the second has {len(new)}, and "
            f"{len(old.keys() & new.keys())} are in both; expected the same problems in both. For "
            f"example, only one evaluation has problem {unpaired[0]!r}."
        )
    sources = statistics.by_source(group[0] for group in new.values())
    pairs = {problem: (old[problem], group) for problem, group in new.items()}
    several = {
        name: _changes([pairs[record["problem"]] for record in part], seed)
        for name, part in sources.items()
    }
    whole = _changes(list(pairs.values()), seed)
    return whole | {"sources": several if len(several) > 1 else {}}


def _changes(pairs: Sequence[tuple[Records, Records]], seed: int) -> dict[str, Any]:
    """Computes the changes for a set of problems from each problem's (before, after) records."""
    G = len(pairs)
    before, after = (statistics.sums(side) for side in zip(*pairs, strict=True))
    found: dict[str, Any] = {"problems": G}
    resampled = _resampled(before=before, after=after, seed=seed)
    ones_1xG = np.ones((1, G))
    tail = 100 * (1 - LEVEL) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nan, which `compare` documents
        for name, change in CHANGES.items():
            found[name] = 100 * float(_values(change, ones_1xG, before=before, after=after)[0])
            error = _standard_error(change, before=before, after=after) if G > 1 else np.nan
            found[f"{name}_se"] = 100 * error
            low, high = np.nanpercentile(resampled[name], (tail, 100 - tail))
            found[f"{name}_low"], found[f"{name}_high"] = 100 * float(low), 100 * float(high)
    return found


def _values(change: Change, weights_RxG: np.ndarray, *, before: Sums, after: Sums) -> np.ndarray:
    """Computes a change for each row of `weights_RxG`. A row has one weight per problem."""
    numerator, denominator, _ = RATIOS[change.metric]
    with np.errstate(all="ignore"):
        old_R, new_R = (
            (weights_RxG @ side[numerator]) / (weights_RxG @ side[denominator])
            for side in (before, after)
        )
        return new_R / old_R - 1 if change.relative else new_R - old_R


def _resampled(*, before: Sums, after: Sums, seed: int) -> dict[str, np.ndarray]:
    """Computes each change on RESAMPLES bootstrap resamples of the problems.

    Returns:
      For each of CHANGES its values, float64 [RESAMPLES].
    """
    rng = np.random.default_rng(seed)
    G = len(before["responses"])
    parts = []
    for first in range(0, RESAMPLES, CHUNK):
        drawn_RxG = rng.integers(G, size=(min(CHUNK, RESAMPLES - first), G))
        # One bincount for all resamples: the problems of each get numbers of their own.
        offsets_Rx1 = np.arange(len(drawn_RxG))[:, None] * G
        counts = np.bincount((drawn_RxG + offsets_Rx1).ravel(), minlength=drawn_RxG.size)
        weights_RxG = counts.reshape(drawn_RxG.shape).astype(np.float64)
        parts.append(
            {
                name: _values(change, weights_RxG, before=before, after=after)
                for name, change in CHANGES.items()
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in CHANGES}


def _standard_error(change: Change, *, before: Sums, after: Sums) -> float:
    """Returns the standard error of a metric's change, from each problem's influence on it."""
    with np.errstate(all="ignore"):
        old, old_influence_G = _influence(change.metric, before)
        new, new_influence_G = _influence(change.metric, after)
        if change.relative:
            influence_G = (new_influence_G - new / old * old_influence_G) / old
        else:
            influence_G = new_influence_G - old_influence_G
        return statistics.deviation(influence_G)


def _influence(metric: str, sums: Sums) -> tuple[float, np.ndarray]:
    """Returns the value of a metric, and an array [G] with each problem's influence on it."""
    numerator, denominator, _ = RATIOS[metric]
    value = sums[numerator].sum() / sums[denominator].sum()
    return value, (sums[numerator] - value * sums[denominator]) / sums[denominator].sum()
