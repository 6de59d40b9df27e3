"""What changed between two evaluations of the same problems: paired, with bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from opsd_jax.evaluation import statistics
from opsd_jax.evaluation.statistics import RATIOS, Records

RESAMPLES = 10_000
AT_ONCE = 500  # resamples
LEVEL = 0.95

# Change -> (the figure that changes, whether in percent of its value before, scale).
CHANGES = {
    "d_accuracy_points": ("accuracy", False, 100),
    "d_length_percent": ("mean_length", True, 100),
    "d_length_correct_percent": ("mean_length_correct", True, 100),
    "d_markers_percent": ("markers_per_1000", True, 100),
}


def compare(before: Records, after: Records, *, seed: int = 0) -> dict[str, Any]:
    """The changes from `before` to `after`, over all problems and of each source.

    Args:
      before, after: records of the same problems, in any order; numbers of samples may differ.
      seed: of the resamples.

    Returns:
      For each of CHANGES its value, its standard error `..._se` by linearisation, and the bounds
      `..._low` and `..._high` of the 95 % percentile interval over RESAMPLES resamples of the
      problems; the number of `problems`; and in `sources` the same of each source, where there are
      several. nan where a figure cannot be formed.

    Raises:
      ValueError: the problems are not the same; names one.
    """
    old, new = statistics.by_problem(before), statistics.by_problem(after)
    missing = [*(old.keys() - new.keys()), *(new.keys() - old.keys())]
    if missing:
        raise ValueError(
            f"the two evaluations are not of the same problems: {len(old)} and {len(new)}, of "
            f"which {len(old.keys() & new.keys())} are in both; {missing[0]!r} is in one alone."
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
    G = len(pairs)
    old, new = (statistics.sums(side) for side in zip(*pairs, strict=True))
    change: dict[str, Any] = {"problems": G}
    resampled = _resampled(old, new, seed)
    ones = np.ones((1, G))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nan of nothing, as promised
        for name, (figure, relative, scale) in CHANGES.items():
            change[name] = scale * float(_change(figure, relative, old, new, ones)[0])
            error = _linearised(figure, relative, old, new) if G > 1 else np.nan
            change[f"{name}_se"] = scale * error
            tail = 100 * (1 - LEVEL) / 2
            bounds = np.nanpercentile(resampled[name], (tail, 100 - tail))
            change[f"{name}_low"], change[f"{name}_high"] = (scale * float(b) for b in bounds)
    return change


def _change(figure: str, relative: bool, old: dict, new: dict, weights_RxG: np.ndarray):
    """A change under each of R weightings of the problems, [R]."""
    top, bottom, _ = RATIOS[figure]
    with np.errstate(all="ignore"):
        was, now = ((weights_RxG @ x[top]) / (weights_RxG @ x[bottom]) for x in (old, new))
        return now / was - 1 if relative else now - was


def _resampled(old: dict, new: dict, seed: int) -> dict[str, np.ndarray]:
    """Each change in RESAMPLES resamples of the problems, with replacement."""
    rng = np.random.default_rng(seed)
    G = len(old["responses"])
    parts = []
    for first in range(0, RESAMPLES, AT_ONCE):
        drawn = rng.integers(G, size=(min(AT_ONCE, RESAMPLES - first), G))
        rows = np.arange(len(drawn))[:, None] * G
        times = np.bincount((drawn + rows).ravel(), minlength=drawn.size)
        weights = times.reshape(drawn.shape).astype(np.float64)
        parts.append(
            {
                name: _change(figure, relative, old, new, weights)
                for name, (figure, relative, _) in CHANGES.items()
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in CHANGES}


def _linearised(figure: str, relative: bool, old: dict, new: dict) -> float:
    """The standard error of a change, by the influence of each problem on it."""
    top, bottom, _ = RATIOS[figure]
    with np.errstate(all="ignore"):
        (was, pull_was), (now, pull_now) = (
            (r := x[top].sum() / x[bottom].sum(), (x[top] - r * x[bottom]) / x[bottom].sum())
            for x in (old, new)
        )
        pull_G = (pull_now - now / was * pull_was) / was if relative else pull_now - pull_was
        return statistics.deviation(pull_G)
