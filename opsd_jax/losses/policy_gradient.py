"""Policy gradient with verifiable rewards: advantages and the clipped surrogate, per token."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def group_advantages(rewards, group_size: int, *, eps: float = 1e-6):
    """(r - mean) / (std + eps) within each group: GRPO (DeepSeekMath, arXiv 2402.03300).

    The standard deviation is the sample's (ddof 1), as in verl and Tunix. A group whose rewards are
    all equal gets zeros.

    Args:
      rewards: float [N], the rollouts of a problem next to each other; NumPy or JAX.
      group_size: rollouts a problem, at least 2; divides N.

    Returns:
      float [N], of the same kind.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"group_size is {group_size} for {len(rewards)} rewards; it must be at least 2 (an "
            "advantage compares rollouts of the same problem) and divide their number."
        )
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / (groups.std(axis=1, ddof=1, keepdims=True) + eps)).reshape(-1)


def clipped_surrogate(
    *,
    logprobs: jax.Array,
    behaviour_logprobs: jax.Array,
    advantages: jax.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> jax.Array:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logp - behaviour logp).

    PPO (arXiv 1707.06347), eq. 7, per token; different bounds are DAPO's clip-higher.

    Args:
      logprobs: float [...], of the sampled tokens under the policy in training.
      behaviour_logprobs: float [...], under the policy that sampled them; no gradient.
      advantages: float, broadcastable to [...].
      clip_low, clip_high: how far the ratio may fall below and rise above 1.

    Returns:
      float32 [...], to minimise.
    """
    ratio = jnp.exp(logprobs - behaviour_logprobs)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)
