"""Computes the advantages of rollouts from their rewards, with NumPy or JAX arrays."""

from __future__ import annotations

import numpy as np

from opsd_jax.losses.checks import OneOf, Range, as_floats

BASELINES = ("group", "leave_one_out", "batch")
SCALES = ("group", "batch", "none")


def advantages(
    rewards, group_size: int, *, baseline: str = "group", scale: str = "group", eps: float = 1e-6
):
    """Computes each rollout's advantage (reward - b) / (s + eps), for a baseline b and a scale s.

    A group is the `group_size` rollouts of one prompt. The choices of published algorithms:

    | algorithm | baseline | scale |
    |---|---|---|
    | GRPO (arXiv 2402.03300), DAPO, GSPO, CISPO | group | group |
    | Dr.GRPO (arXiv 2503.20783) | group | none |
    | RLOO (arXiv 2402.14740) | leave_one_out | none |
    | REINFORCE++ (arXiv 2501.03262) | batch | batch |
    | REINFORCE++-baseline | group | batch |

    Args:
      rewards: float [N]. The rollouts of one prompt are adjacent.
      group_size: rollouts per prompt; divides N.
      baseline: how b is computed. "group": the mean reward of the group. "leave_one_out": the mean
        reward of the other rollouts of the group. "batch": the mean reward of the batch.
      scale: how s is computed. "group": the standard deviation of the group's rewards (ddof 1, as
        in verl, TRL and Tunix). "batch": the standard deviation of all reward - b (ddof 0). "none":
        the result is not divided.
      eps: added to s.

    Returns:
      float [N], a NumPy or a JAX array like `rewards`. Advantages are exactly 0 where all rewards
      that are compared are equal.

    Raises:
      ValueError: an option is unknown, `group_size` does not divide N, or `group_size` is 1 with a
        baseline that compares the rollouts of a group.
    """
    OneOf(BASELINES).check("baseline", baseline)
    OneOf(SCALES).check("scale", scale)
    Range(0).check("eps", eps)
    if baseline == "batch" and scale == "group":
        raise ValueError(
            "scale is 'group', but baseline is 'batch'; expected scale 'batch' or 'none'."
        )
    groups = _split_into_groups(rewards, group_size, at_least=1 if baseline == "batch" else 2)
    if baseline == "batch":
        differ = _differ(groups.reshape(1, -1))
        centred = groups - groups.mean()
    else:
        differ = _differ(groups)
        centred = groups - groups.mean(axis=1, keepdims=True)
    # Equal rewards can differ from their mean, which is rounded.
    centred = centred * differ.astype(centred.dtype)
    if baseline == "leave_one_out":  # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1)
        centred = centred * (group_size / (group_size - 1))
    if scale == "group":
        centred = centred / (groups.std(axis=1, ddof=1, keepdims=True) + eps)
    elif scale == "batch":
        centred = centred / (centred.std() + eps)
    return centred.reshape(-1)


def _split_into_groups(rewards, group_size: int, at_least: int):
    """Reshapes rewards [N] to [N / group_size, group_size], one row for each prompt."""
    if not hasattr(rewards, "reshape"):
        rewards = np.asarray(rewards, np.float32)
    if group_size < at_least or len(rewards) % group_size:
        raise ValueError(
            f"group_size is {group_size}, and there are {len(rewards)} rewards; expected a "
            f"group_size of at least {at_least} that divides the number of rewards."
        )
    return rewards.reshape(-1, group_size)


def informative(rewards, group_size: int):
    """Returns a mask that is true for the rollouts in groups whose rewards are not all equal.

    A group is the `group_size` rollouts of one prompt. The rollouts of the other groups have an
    advantage of 0 with a group baseline. DAPO's dynamic sampling (arXiv 2503.14476) drops them and
    samples other prompts instead. To drop them, pass the result as the `row_weight` of
    `policy_gradient`.

    Args:
      rewards: float [N], rewards for correctness only, without a length penalty. The rollouts of
        one prompt are adjacent. NaN differs from every number, itself included.
      group_size: rollouts per prompt; divides N.

    Returns:
      bool [N].

    Raises:
      ValueError: `group_size` does not divide N.
    """
    groups = _split_into_groups(rewards, group_size, at_least=1)
    return _differ(groups).reshape(-1).repeat(group_size)


def _differ(groups):
    """Returns whether the rewards of each row differ by more than rounding, as bool [rows, 1].

    The limit is 8 units in the last place of float32. NaN differs from every number.
    """
    highest, lowest = groups.max(axis=1, keepdims=True), groups.min(axis=1, keepdims=True)
    limit = 8 * np.finfo(np.float32).eps * abs(groups).max(axis=1, keepdims=True)
    return ~(highest - lowest <= limit)


def overlong_penalty(lengths, *, max_tokens: int, buffer: int, factor: float = 1.0):
    """Computes DAPO's soft penalty for overlong responses. Add the result to the rewards.

    The penalty is 0 up to `max_tokens - buffer` tokens, falls linearly to `-factor` at
    `max_tokens`, and stays at `-factor` beyond.

    Args:
      lengths: number [N], response lengths in tokens.
      max_tokens: the longest allowed response, in tokens.
      buffer: width of the linear part, in tokens, in [1, max_tokens].
      factor: magnitude of the penalty at `max_tokens`; not negative.

    Returns:
      float [N], a NumPy or a JAX array like `lengths`.

    Raises:
      ValueError: `buffer` or `factor` is out of range.

    Reference: DAPO (arXiv 2503.14476), eq. 13.
    """
    Range(1, max_tokens).check("buffer", buffer)
    Range(0).check("factor", factor)
    # Unsigned integers would wrap around in the subtraction.
    over = (as_floats(lengths) - (max_tokens - buffer)) / buffer
    return -factor * over.clip(0, 1)
