"""Computes token weights, and weighted sums of per-token values.

Every aggregation here has the form `sum_t weights_t values_t / total`. Functions return the sum and
the total separately. The caller adds both over microbatches and devices, and divides once at the
end. A mean of the means of the parts would be wrong, because parts have different numbers of active
tokens.

Shape suffixes: B rows (responses), T tokens of a padded row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opsd_jax.losses.checks import (
    OneOf,
    Range,
    check_mask,
    check_row_weight,
    check_shape,
    debug_check,
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
    """Computes the weight of each token in a loss, and the number to divide the loss by.

    For a row i with n_i tokens in the mask and the row weight w_i:

    | aggregation | weight of a token | total |
    |---|---|---|
    | "sequence" | w_i / n_i: all rows count the same (OPSD; GRPO's 1/\\|o_i\\|) | sum_i w_i |
    | "token" | w_i: all tokens count the same (DAPO) | sum_i w_i n_i |
    | "fixed" | w_i / length (Dr.GRPO); a sum over the tokens if length is 1 | sum_i w_i |

    Args:
      mask: bool [B, T], the tokens that count. A row with no such token has no weight.
      row_weight: float [B], or one number for all rows. It must not be negative: a negative weight
        would turn minimising a loss into maximising it, so it makes all results NaN.
      aggregation: "sequence", "token" or "fixed".
      length: divisor for "fixed", in tokens. Use the same number for all batches, such as the
        longest allowed response.
      position_weights: float [B, T], extra factors with a mean of 1 over the tokens of each row, as
        the function `position_weights` returns them.

    Returns:
      `(weights, total)`: float32 [B, T] and a float32 scalar, without gradients. Weights are 0
      where the mask is false.

    Raises:
      ValueError: the shape of an argument is wrong, or an option is unknown.
    """
    mask = check_mask(mask)
    check_row_weight(row_weight, mask)
    check_shape(mask.shape, "the shape of mask", position_weights=position_weights)
    OneOf(AGGREGATIONS).check("aggregation", aggregation)
    Range(1e-6).check("length", length)
    weight_B = jnp.broadcast_to(jnp.asarray(row_weight, jnp.float32), mask.shape[:1])
    debug_check(
        jnp.all(weight_B >= 0),
        "row_weight is negative or NaN somewhere; expected numbers of at least 0.",
    )
    weight_B = jnp.where(weight_B < 0, jnp.nan, weight_B)

    tokens_B = jnp.sum(mask, axis=1, dtype=jnp.float32)
    weight_B = jnp.where(tokens_B > 0, weight_B, 0.0)
    divisor_B = {"sequence": jnp.maximum(tokens_B, 1), "token": jnp.ones_like(tokens_B)}.get(
        aggregation, jnp.full_like(tokens_B, length)
    )
    weights_BxT = jnp.where(mask, (weight_B / divisor_B)[:, None], 0.0)
    if position_weights is not None:
        weights_BxT = jnp.where(mask, weights_BxT * position_weights, 0.0)
    total = jnp.sum(weight_B * (tokens_B if aggregation == "token" else 1.0))
    return jax.lax.stop_gradient((weights_BxT, total))


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Computes sum(weights * values) in float32, ignoring values that have a weight of 0.

    A NaN or an infinity with a weight of 0 changes neither the sum nor its gradient.

    Args:
      values: numbers or booleans, of any shape.
      weights: an array of the same shape.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: the shapes differ.
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
    """Computes a weight for each token from its position in the response.

    With t = 0, 1, ... for the tokens of a row in the mask, and n their number, the weight is
    proportional to

    - "uniform": 1;
    - "linear": 1 + (late - 1) t / (n - 1);
    - "exponential": exp(rate t / (n - 1));
    - "sigmoid": floor + (1 - floor) sigmoid((t / n - centre) / width) (PW-OPSD, arXiv 2605.21606).

    Positions count only tokens in the mask, so padding on either side has no effect.

    Args:
      mask: bool [B, T], the tokens that count.
      kind: "uniform", "linear", "exponential" or "sigmoid".
      late: for "linear", the weight of the last token relative to the first. A value below 1 gives
        early tokens more weight.
      rate: for "exponential", the logarithm of the same ratio. A negative value gives early tokens
        more weight.
      floor: for "sigmoid", the lowest weight before normalisation, in [0, 1].
      centre: for "sigmoid", where the weight is halfway, as a fraction of the response.
      width: for "sigmoid", width of the transition, as a fraction of the response.

    Returns:
      float32 [B, T], scaled to a mean of 1 over the tokens of each row; 0 where the mask is false.

    Raises:
      ValueError: `kind` is unknown, or a parameter is out of range.
    """
    OneOf(POSITIONS).check("kind", kind)
    Range(0).check("late", late)
    Range(0, 1).check("floor", floor)
    Range(1e-6).check("width", width)
    mask = check_mask(mask)
    n_Bx1 = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32)
    t_BxT = position_in_row(mask).astype(jnp.float32)
    fraction_BxT = t_BxT / jnp.maximum(n_Bx1 - 1, 1)
    weights_BxT = {
        "uniform": lambda: jnp.ones_like(t_BxT),
        "linear": lambda: 1 + (late - 1) * fraction_BxT,
        "exponential": lambda: jnp.exp(rate * fraction_BxT),
        "sigmoid": lambda: (
            floor + (1 - floor) * jax.nn.sigmoid((t_BxT / jnp.maximum(n_Bx1, 1) - centre) / width)
        ),
    }[kind]()
    weights_BxT = jnp.where(mask, weights_BxT, 0.0)
    total_Bx1 = jnp.sum(weights_BxT, axis=1, keepdims=True)
    return weights_BxT * n_Bx1 / jnp.where(total_Bx1 > 0, total_Bx1, 1.0)


def position_in_row(mask: jax.Array) -> jax.Array:
    """Returns each token's position in its row, counting only the tokens in the mask.

    Args:
      mask: bool [B, T].

    Returns:
      int32 [B, T]; for a token in the mask, its position among these tokens, from 0.
    """
    mask = mask.astype(jnp.int32)
    return jnp.cumsum(mask, axis=1) - mask
