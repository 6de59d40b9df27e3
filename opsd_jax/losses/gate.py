"""The gate: which rollouts train, and how much, by their verdict."""

from __future__ import annotations

GATES = {
    "correct": (1.0, 0.0, 0.0),  # the paper's Correct-only
    "incorrect": (0.0, 1.0, 1.0),  # its Incorrect-only: one that ran out of room is not correct
    "all": (1.0, 1.0, 1.0),  # plain OPSD
}


def parse_gate(text: str) -> tuple[float, float, float]:
    """The weights `(correct, incorrect, truncated)` of a gate's name or of text as "1,0.5,0".

    Raises:
      ValueError: neither, or a weight is negative or not finite, or all are zero.
    """
    if text in GATES:
        return GATES[text]
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(
            f"gate is {text!r}; expected one of {', '.join(GATES)}, or three weights for correct, "
            "incorrect, truncated, none negative and not all zero, such as '1,0.5,0'."
        )
    return weights


def gate_weights(correct, incorrect, truncated, gate: tuple[float, float, float]):
    """The weight of each rollout, float [N], from the disjoint boolean masks [N] of the groups."""
    return gate[0] * correct + gate[1] * incorrect + gate[2] * truncated
