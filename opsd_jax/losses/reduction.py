"""What each token weighs, and the sum; the weight to divide it by is kept apart.

Every reduction of the field is a weighting of tokens: sum_t weights_t values_t / total. The caller
adds sums and totals over microbatches and devices and divides once at the end. A mean of means is
wrong as soon as parts differ in their number of live tokens, and with a gate they do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from opsd_jax.losses.checks import (
    check_mask,
    check_option,
    check_range,
    check_row_weight,
    check_shape,
)

AGGREGATIONS = ("sequence", "token", "fixed")


def token_weights(
    mask: jax.Array,
    row_weight: jax.Array | float = 1.0,
    *,
    aggregation: str = "sequence",
    length: float = 1.0,
    position_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weights that reduce values of tokens, and their normaliser.

    | aggregation | weight of a token of row i with n_i tokens | normaliser |
    |---|---|---|
    | "sequence" | w_i / n_i: rows count alike (OPSD; GRPO's 1/\\|o_i\\|) | sum_i w_i |
    | "token" | w_i: tokens count alike (DAPO) | sum_i w_i n_i |
    | "fixed" | w_i / length (Dr.GRPO); the sum over tokens if that is 1 | sum_i w_i |

    Args:
      mask: bool [B, T], the tokens that count. A row without any weighs nothing.
      row_weight: [B], or one number for all. A negative one makes everything NaN: no loss here has
        a use for it, and it would turn minimising into maximising.
      aggregation: see above.
      length: of "fixed", in tokens: the same for all batches, such as the budget of a response.
      position_weights: [B, T], with mean 1 over each row's tokens (`position_weights`).

    Returns:
      float32 `(weights [B, T], total [])`, without gradients; weights are 0 where the mask is
      false.

    Raises:
      ValueError: a shape does not fit or an option is none of these.
    """
    mask = check_mask(mask)
    check_row_weight(row_weight, mask)
    check_shape(mask.shape, "the shape of mask", position_weights=position_weights)
    check_option("aggregation", aggregation, AGGREGATIONS)
    check_range("length", length, 1e-6)
    row_weight = jnp.broadcast_to(jnp.asarray(row_weight, jnp.float32), mask.shape[:1])
    checkify.debug_check(jnp.all(row_weight >= 0), "row_weight is negative or NaN somewhere.")
    row_weight = jnp.where(row_weight < 0, jnp.nan, row_weight)

    tokens = jnp.sum(mask, axis=1, dtype=jnp.float32)
    row_weight = jnp.where(tokens > 0, row_weight, 0.0)
    divisor = {"sequence": jnp.maximum(tokens, 1), "token": jnp.ones_like(tokens)}.get(
        aggregation, jnp.full_like(tokens, length)
    )
    weights = jnp.where(mask, (row_weight / divisor)[:, None], 0.0)
    if position_weights is not None:
        weights = jnp.where(mask, weights * position_weights, 0.0)
    total = jnp.sum(row_weight * (tokens if aggregation == "token" else 1.0))
    return jax.lax.stop_gradient((weights, total))


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """sum weights * values in float32; values of weight 0 are not looked at, NaN included.

    Args:
      values: any shape; numbers or booleans.
      weights: of the same shape.
    """
    check_shape(jnp.shape(values), "the shape of values", weights=weights)
    weights = jnp.asarray(weights).astype(jnp.float32)
    return jnp.sum(jnp.where(weights != 0, values, 0.0).astype(jnp.float32) * weights)


POSITIONS = ("uniform", "linear", "exponential", "sigmoid")


def position_weights(
    mask: jax.Array,
    kind: str = "uniform",
    *,
    late: float = 2.0,
    rate: float = 2.0,
    floor: float = 0.25,
    centre: float = 0.3,
    width: float = 0.1,
) -> jax.Array:
    """Weights by position in the response, scaled to a mean of 1 over each row's tokens.

    With t = 0, 1, ... counting the row's tokens, of which there are n:

    - "uniform": 1;
    - "linear": 1 + (late - 1) t / (n - 1), the last token weighing `late` times the first;
    - "exponential": exp(rate t / (n - 1));
    - "sigmoid": floor + (1 - floor) sigmoid((t / n - centre) / width) (PW-OPSD, arXiv 2605.21606).

    Counting follows the mask, so padding on either side changes nothing.

    Args:
      mask: bool [B, T].
      kind: see above.
      late, rate, floor, centre, width: of the one kind that names it. A negative rate, or a `late`
        below 1, favours the beginning.

    Returns:
      float32 [B, T], 0 where the mask is false.

    Raises:
      ValueError: `kind` is none of these, or a parameter makes weights negative.
    """
    check_option("position weights", kind, POSITIONS)
    check_range("late", late, 0)
    check_range("floor", floor, 0, 1)
    check_range("width", width, 1e-6)
    mask = check_mask(mask)
    n = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32)
    t = position_in_row(mask).astype(jnp.float32)
    fraction = t / jnp.maximum(n - 1, 1)
    weights = {
        "uniform": lambda: jnp.ones_like(t),
        "linear": lambda: 1 + (late - 1) * fraction,
        "exponential": lambda: jnp.exp(rate * fraction),
        "sigmoid": lambda: (
            floor + (1 - floor) * jax.nn.sigmoid((t / jnp.maximum(n, 1) - centre) / width)
        ),
    }[kind]()
    weights = jnp.where(mask, weights, 0.0)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return weights * n / jnp.where(total > 0, total, 1.0)


def position_in_row(mask: jax.Array) -> jax.Array:
    """How many of the row's tokens stand before each: int32 [B, T] of a bool [B, T]."""
    mask = mask.astype(jnp.int32)
    return jnp.cumsum(mask, axis=1) - mask
