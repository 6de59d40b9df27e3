"""From per-token values to a sum and the weight to divide it by, kept apart.

The caller adds sums and weights over microbatches and devices and divides once at the end. A mean
of means is wrong as soon as parts differ in their number of live tokens, and with a gate they do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_mean(
    values: jax.Array, mask: jax.Array, row_weight: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Every token counts alike.

    Args:
      values: [B, T]; what stands where the mask is false or the weight is 0 is not looked at, NaN
        and infinity included.
      mask: bool [B, T], the tokens that count.
      row_weight: [B], or one number for all; not negative.

    Returns:
      float32 scalars `(sum, weight)`.
    """
    weight = jnp.where(mask, jnp.reshape(row_weight, (-1, 1)), 0.0)
    return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight), jnp.sum(weight)


def sequence_mean(
    values: jax.Array, mask: jax.Array, row_weight: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Every row counts alike, whatever its length: the mean over rows of the mean over tokens.

    The reduction of OPSD (arXiv 2605.06188, eq. 1: the expectation over rollouts). Arguments and
    return are those of `token_mean`; a row without tokens weighs nothing.
    """
    tokens = jnp.sum(mask, axis=1)
    weight = jnp.where(tokens > 0, row_weight, 0.0)
    counted = mask & (weight > 0)[:, None]
    row_mean = jnp.sum(jnp.where(counted, values, 0.0), axis=1) / jnp.maximum(tokens, 1)
    return jnp.sum(row_mean * weight), jnp.sum(weight)
