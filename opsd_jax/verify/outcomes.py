"""The outcome masks (correct, incorrect, truncated) that select the rollouts for each loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opsd_jax.verify.verdict import Verdict


class Outcomes(NamedTuple):
    """Boolean masks [N] for the outcomes of N rollouts. Each rollout is in exactly one mask.

    Attributes:
      correct: the verifier accepts the response.
      incorrect: the verifier rejects the response.
      truncated: the response was cut at its token budget, whatever its verdict.
    """

    correct: np.ndarray
    incorrect: np.ndarray
    truncated: np.ndarray


def outcomes_of(verdicts: Sequence[Verdict], truncated: np.ndarray) -> Outcomes:
    """Returns the outcome masks of N rollouts from their verdicts and truncation flags.

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
            f"`verdicts` has length {len(verdicts)}, but `truncated` has shape "
            f"{list(truncated.shape)}; expected one verdict and one flag per rollout."
        )
    return Outcomes(correct & ~truncated, ~correct & ~truncated, truncated)
