"""From rewards of rollouts to advantages; on the host (NumPy) or the device (JAX)."""

from __future__ import annotations

import numpy as np

from opsd_jax.losses.checks import check_option, check_range

BASELINES = ("group", "leave_one_out", "batch")
SCALES = ("group", "batch", "none")


def advantages(
    rewards, group_size: int, *, baseline: str = "group", scale: str = "group", eps: float = 1e-6
):
    """How much better than its baseline each rollout was, (r - b) / (s + eps).

    | | baseline | scale |
    |---|---|---|
    | GRPO (arXiv 2402.03300), DAPO, GSPO, CISPO | group | group |
    | Dr.GRPO (arXiv 2503.20783) | group | none |
    | RLOO (arXiv 2402.14740) | leave_one_out | none |
    | REINFORCE++ (arXiv 2501.03262) | batch | batch |
    | REINFORCE++-baseline | group | batch |

    Args:
      rewards: float [N], the rollouts of a problem next to each other.
      group_size: rollouts of a problem; divides N.
      baseline: b is the mean of the "group", that of the rest of the group ("leave_one_out"), or
        that of the "batch".
      scale: s is the standard deviation within the "group" (ddof 1, as in verl, TRL and Tunix),
        that of all r - b in the "batch" (ddof 0), or "none": no division.
      eps: added to s. Rewards that are all equal give zeros.

    Returns:
      float [N], of the same kind.

    Raises:
      ValueError: an option is none of these, `group_size` does not divide N, or is 1 where rollouts
        of a group are compared.
    """
    check_option("baseline", baseline, BASELINES)
    check_option("scale", scale, SCALES)
    check_range("eps", eps, 0)
    if baseline == "batch" and scale == "group":
        raise ValueError("baseline is 'batch' with scale 'group'; expected 'batch' or 'none'.")
    groups = _groups(rewards, group_size, at_least=1 if baseline == "batch" else 2)
    if baseline == "batch":
        differ = groups.max() != groups.min()
        centred = groups - groups.mean()
    else:
        differ = groups.max(axis=1, keepdims=True) != groups.min(axis=1, keepdims=True)
        centred = groups - groups.mean(axis=1, keepdims=True)
    centred = centred * differ  # a mean is rounded: equal rewards need not be equal to theirs
    if baseline == "leave_one_out":  # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1)
        centred = centred * (group_size / (group_size - 1))
    if scale == "group":
        centred = centred / (groups.std(axis=1, ddof=1, keepdims=True) + eps)
    elif scale == "batch":
        centred = centred / (centred.std() + eps)
    return centred.reshape(-1)


def _groups(rewards, group_size: int, at_least: int):
    """[N / group_size, group_size]."""
    if not hasattr(rewards, "reshape"):
        rewards = np.asarray(rewards, np.float32)
    if group_size < at_least or len(rewards) % group_size:
        raise ValueError(
            f"group_size is {group_size} for {len(rewards)} rewards; it must divide their number, "
            "and be at least 2 where rollouts of a group are compared."
        )
    return rewards.reshape(-1, group_size)


def informative(rewards, group_size: int):
    """Which rollouts are of a group whose rewards differ: bool [N].

    The others have an advantage of 0 from their group. Dynamic sampling (DAPO, arXiv 2503.14476)
    drops them, and samples others in their place: give `informative(...)` as the row weight. Its
    rewards are those of correctness, without a punishment of length. NaN differs from everything.
    """
    groups = _groups(rewards, group_size, at_least=1)
    differ = groups.max(axis=1) != groups.min(axis=1)
    return differ.repeat(group_size)


def overlong_penalty(lengths, *, max_tokens: int, buffer: int, factor: float = 1.0):
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13), to be added to the rewards.

    0 up to max_tokens - buffer tokens, from there falling linearly to -factor at max_tokens, and
    -factor beyond.

    Args:
      lengths: number [N], in tokens: never in characters.
      max_tokens: the budget of a response.
      buffer: how many tokens before it the punishment begins, in [1, max_tokens].
      factor: the punishment at the budget.

    Returns:
      float [N], of the kind of `lengths`.
    """
    check_range("buffer", buffer, 1, max_tokens)
    check_range("factor", factor, 0)
    over = (lengths * 1.0 - (max_tokens - buffer)) / buffer  # unsigned numbers would wrap
    return -factor * over.clip(0, 1)
