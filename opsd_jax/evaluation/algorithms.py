"""What the report shows of a stage, for each training algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Curve(NamedTuple):
    """A training metric that the report draws.

    Attributes:
      metric: its name in `metrics.jsonl`.
      label: the label of its axis.
      scale: a factor on its values.
    """

    metric: str
    label: str
    scale: float = 1


class Algorithm(NamedTuple):
    """What the report shows of a stage.

    Attributes:
      curves: the metrics of the training plot.
      headline: what comes first where the report gives the change that the stage made: "accuracy"
        or "length"; "" leaves the change out there.
      before_and_after: whether a section of the report compares the responses before the stage with
        those after it.
      reported: options of the stage that `report.json` holds.
    """

    curves: Sequence[Curve]
    headline: str = ""
    before_and_after: bool = False
    reported: Sequence[str] = ()


ALGORITHMS = {
    "sft": Algorithm(
        curves=(
            Curve("loss", "loss, nats a token"),
            Curve("token_accuracy", "token accuracy, %", 100),
        ),
    ),
    "rlvr": Algorithm(
        curves=(Curve("reward", "reward"), Curve("length", "mean length, tokens")),
        headline="accuracy",
    ),
    "opsd": Algorithm(
        curves=(
            Curve("token_divergence", "divergence a token, nats"),
            Curve("length", "mean length, tokens"),
            Curve("reward", "reward"),
        ),
        headline="length",
        before_and_after=True,
        reported=("gate",),
    ),
}
