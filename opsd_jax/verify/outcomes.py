"""The outcome masks of rollouts, which gate the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opsd_jax.verify.verdict import Verdict


class Outcomes(NamedTuple):
    """Boolean masks [N] over N rollouts. They are disjoint and cover every rollout.

    Attributes:
      correct: the verifier accepts the response.
      incorrect: the verifier rejects the response.
      truncated: the response was cut at its token budget, whatever its verdict.
    """

    correct: np.ndarray
    incorrect: np.ndarray
    truncated: np.ndarray


def outcomes_of(verdicts: Sequence[Verdict], truncated: np.ndarray) -> Outcomes:
    """Returns the outcome masks of N rollouts.

    Args:
      verdicts: one per rollout. The verdicts of truncated rollouts are ignored.
      truncated: bool [N], whether the rollout was cut at its token budget.

    Raises:
      ValueError: the lengths differ.
    """
    truncated = np.asarray(truncated, bool)
    correct = np.array([v.correct for v in verdicts], bool)
    if correct.shape != truncated.shape:
        raise ValueError(
            f"{len(verdicts)} verdicts for a mask of shape {list(truncated.shape)}; expected as "
            "many verdicts as the mask has rollouts."
        )
    return Outcomes(correct & ~truncated, ~correct & ~truncated, truncated)
