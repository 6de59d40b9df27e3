"""The correctness gate, which weights each rollout in the OPSD loss by its outcome."""

from __future__ import annotations

from opsd_jax.losses.checks import as_floats

# Weights of correct, incorrect and truncated rollouts (arXiv 2605.06188).
GATES = {
    "correct": (1.0, 0.0, 0.0),  # the paper's Correct-only
    "incorrect": (0.0, 1.0, 1.0),  # the paper's Incorrect-only; truncated rollouts are not correct
    "all": (1.0, 1.0, 1.0),  # OPSD without a gate
}
# The texts that `parse_gate` accepts.
GATE_TEXTS = (
    f"one of {', '.join(GATES)}, or three weights for correct, incorrect and truncated rollouts, "
    "such as '1,0.5,0' (not negative, not all zero)"
)


def parse_gate(text: str) -> tuple[float, float, float]:
    """Parses a string such as "correct" or "1,0.5,0" into the three weights of a gate.

    Args:
      text: a name in `GATES`, or three numbers separated by commas: the weights of correct,
        incorrect and truncated rollouts.

    Returns:
      The weights `(correct, incorrect, truncated)`.

    Raises:
      ValueError: `text` is neither of these, a weight is negative or not finite, or all weights
        are 0.
    """
    if text in GATES:
        return GATES[text]
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(f"gate is {text!r}; expected {GATE_TEXTS}.")
    return weights


def gate_weights(correct, incorrect, truncated, gate: tuple[float, float, float]):
    """Computes each rollout's weight from its outcome and a gate, with NumPy or JAX arrays.

    Args:
      correct, incorrect, truncated: outcome masks, bool [N] each. At most one of them is true for a
        rollout.
      gate: weights of correct, incorrect and truncated rollouts; see `GATES` and `parse_gate`.

    Returns:
      float [N]. A rollout with no outcome has weight 0.
    """
    outcomes = map(as_floats, (correct, incorrect, truncated))
    return sum(weight * outcome for weight, outcome in zip(gate, outcomes, strict=True))
