"""Figures of an evaluation: k sampled responses to each of N problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def clustered_mean(values: np.ndarray) -> tuple[float, float]:
    """The mean of values [N, k], k samples of each of N problems, and its standard error.

    Samples of one problem are not independent, so the error is that of N problem means: their
    standard deviation (ddof 1) over sqrt(N). It is nan for a single problem.
    """
    means = np.asarray(values, np.float64).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else float("nan")
    return float(means.mean()), float(error)


def summarise(responses: Sequence[dict[str, Any]], samples: int) -> dict[str, float]:
    """The figures of responses as `evaluate.records` gives them, a problem's side by side.

    Args:
      responses: each has `correct`, `truncated` and `length` (tokens, EOS included).
      samples: responses a problem.

    Returns:
      `accuracy` and `truncation_rate` in [0, 1], `mean_length` in tokens, `mean_length_correct`
      over the correct alone (nan if there are none), standard errors `accuracy_se` and
      `mean_length_se` clustered by problem, and the numbers of `problems` and `samples`.
    """
    table = {
        name: np.array([r[name] for r in responses], np.float64).reshape(-1, samples)
        for name in ("correct", "truncated", "length")
    }
    accuracy, accuracy_se = clustered_mean(table["correct"])
    mean_length, mean_length_se = clustered_mean(table["length"])
    right = table["correct"] == 1
    return {
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "mean_length": mean_length,
        "mean_length_se": mean_length_se,
        "mean_length_correct": float(table["length"][right].mean())
        if right.any()
        else float("nan"),
        "truncation_rate": float(table["truncated"].mean()),
        "problems": len(table["correct"]),
        "samples": samples,
    }


def compare(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], samples: int
) -> dict[str, float]:
    """What changed between two models' responses to the same problems, paired by problem.

    Returns:
      `d_accuracy_points` (percentage points) and `d_length_percent` (of the mean length before),
      and their standard errors `..._se`: of the mean paired difference, and for the ratio of means
      by its linearisation.

    Raises:
      ValueError: the problems are not the same.
    """
    if [r["problem"] for r in before] != [r["problem"] for r in after]:
        raise ValueError("the two evaluations are not of the same problems in the same order.")

    def problem_means(responses, name):
        values = np.array([r[name] for r in responses], np.float64)
        return values.reshape(-1, samples).mean(axis=1)

    root = np.sqrt(len(before) / samples)
    gain = problem_means(after, "correct") - problem_means(before, "correct")
    old, new = problem_means(before, "length"), problem_means(after, "length")
    ratio = new.mean() / old.mean()
    return {
        "d_accuracy_points": 100 * float(gain.mean()),
        "d_accuracy_points_se": 100 * float(gain.std(ddof=1) / root),
        "d_length_percent": 100 * float(ratio - 1),
        "d_length_percent_se": 100 * float((new - ratio * old).std(ddof=1) / root / old.mean()),
    }
