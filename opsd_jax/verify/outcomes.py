"""The three groups of rollouts that gate the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opsd_jax.verify.verdict import Verdict


class Outcomes(NamedTuple):
    """Boolean masks [N] over rollouts: disjoint, and together they cover every rollout."""

    correct: np.ndarray
    incorrect: np.ndarray
    truncated: np.ndarray


def outcomes_of(verdicts: Sequence[Verdict], truncated: np.ndarray) -> Outcomes:
    """The groups of N rollouts.

    Args:
      verdicts: one a rollout; that of a truncated one is not looked at.
      truncated: bool [N], the rollout was cut at its token budget. It is neither correct nor
        incorrect: whatever it holds, it was not finished.
    """
    truncated = np.asarray(truncated, bool)
    correct = np.array([v.correct for v in verdicts], bool)
    if correct.shape != truncated.shape:
        raise ValueError(f"{len(verdicts)} verdicts for truncated{list(truncated.shape)}.")
    return Outcomes(correct & ~truncated, ~correct & ~truncated, truncated)
