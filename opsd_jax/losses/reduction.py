"""Computes token weights, and weighted sums of per-token values.

Every aggregation here has the form `sum_t weights_t values_t / total`. Functions return the sum and
the total separately. The caller adds both over microbatches and devices, and divides once at the
end. A mean of the means of the parts would be wrong, because parts have different numbers of active
tokens.

Shape suffixes: B rows, T tokens of a padded row, N the axes of responses: B, or B and K for rows
with up to K responses each.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from opsd_jax.losses.checks import (
    OneOf,
    Range,
    check_mask,
    check_shape,
    debug_check,
)
from opsd_jax.losses.responses import (
    check_row_weight,
    of_tokens,
    positions,
    shape_of_responses,
    sums,
)

AGGREGATIONS = ("sequence", "token", "fixed")


def token_weights(
    mask: jax.Array,
    row_weight: jax.Array | float = 1.0,
    *,
    aggregation: str = "sequence",
    length: float = 1.0,
    position_weights: jax.Array | None = None,
    starts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the weight of each token in a loss, and the number to divide the loss by.

    For a response i with n_i tokens in the mask and the weight w_i:

    | aggregation | weight of a token | total |
    |---|---|---|
    | "sequence" | w_i / n_i: responses count the same (OPSD; GRPO's 1/\\|o_i\\|) | sum_i w_i |
    | "token" | w_i: all tokens count the same (DAPO) | sum_i w_i n_i |
    | "fixed" | w_i / length (Dr.GRPO); a sum over the tokens if length is 1 | sum_i w_i |

    Args:
      mask: bool [B, T], the tokens that count. A response with no such token has no weight.
      row_weight: float [B], or [B, K] with `starts`, or one number for all responses. It must not
        be negative: a negative weight would turn minimising a loss into maximising it, so it makes
        all results NaN.
      aggregation: "sequence", "token" or "fixed".
      length: divisor for "fixed", in tokens. Use the same number for all batches, such as the
        longest allowed response.
      position_weights: float [B, T], extra factors with a mean of 1 over the tokens of each
        response, as the function `position_weights` returns them.

    Returns:
      `(weights, total)`: float32 [B, T] and a float32 scalar, without gradients. Weights are 0
      where the mask is false.

    Raises:
      ValueError: the shape of an argument is wrong, or an option is unknown.
    """
    mask = check_mask(mask)
    check_row_weight(row_weight, mask, starts)
    check_shape(mask.shape, "the shape of mask", position_weights=position_weights)
    OneOf(AGGREGATIONS).check("aggregation", aggregation)
    Range(1e-6).check("length", length)
    shape, _ = shape_of_responses(mask, starts)
    weight_N = jnp.broadcast_to(jnp.asarray(row_weight, jnp.float32), shape)
    debug_check(
        jnp.all(weight_N >= 0),
        "row_weight is negative or NaN somewhere; expected numbers of at least 0.",
    )
    weight_N = jnp.where(weight_N < 0, jnp.nan, weight_N)

    tokens_N = sums(mask, starts)
    weight_N = jnp.where(tokens_N > 0, weight_N, 0.0)
    divisor_N = {"sequence": jnp.maximum(tokens_N, 1), "token": jnp.ones_like(tokens_N)}.get(
        aggregation, jnp.full_like(tokens_N, length)
    )
    weights_BxT = jnp.where(mask, of_tokens(weight_N / divisor_N, starts, mask.shape[1]), 0.0)
    if position_weights is not None:
        weights_BxT = jnp.where(mask, weights_BxT * position_weights, 0.0)
    total = jnp.sum(weight_N * (tokens_N if aggregation == "token" else 1.0))
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
    starts: jax.Array | None = None,
) -> jax.Array:
    """Computes a weight for each token from its position in the response.

    Token t = 0, 1, ... of the n tokens of a response in the mask has a weight proportional to

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
      starts: int [B, K], the columns at which the responses of each row begin; see `token_weights`.

    Returns:
      float32 [B, T], with a mean of 1 over the tokens of each response; 0 where the mask is false.

    Raises:
      ValueError: `kind` is unknown, or a parameter is out of range.
    """
    OneOf(POSITIONS).check("kind", kind)
    Range(0).check("late", late)
    Range(0, 1).check("floor", floor)
    Range(1e-6).check("width", width)
    mask = check_mask(mask)
    each = functools.partial(of_tokens, starts=starts, tokens=mask.shape[1])
    n_N = sums(mask, starts)
    n_BxT, t_BxT = each(n_N), positions(mask, starts).astype(jnp.float32)
    fraction_BxT = t_BxT / jnp.maximum(n_BxT - 1, 1)
    weights_BxT = {
        "uniform": lambda: jnp.ones_like(t_BxT),
        "linear": lambda: 1 + (late - 1) * fraction_BxT,
        "exponential": lambda: jnp.exp(rate * fraction_BxT),
        "sigmoid": lambda: (
            floor + (1 - floor) * jax.nn.sigmoid((t_BxT / jnp.maximum(n_BxT, 1) - centre) / width)
        ),
    }[kind]()
    weights_BxT = jnp.where(mask, weights_BxT, 0.0)
    total_N = sums(weights_BxT, starts)
    return weights_BxT * n_BxT / each(jnp.where(total_N > 0, total_N, 1.0))
