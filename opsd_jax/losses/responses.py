"""Sums over the tokens of each response, for rows with one or several responses.

`starts`, int32 [B, K], describes rows with up to K responses each: response k of row b begins at
column starts[b, k], and ends where the next one begins. The starts of a row ascend. The starts of
absent responses come last, at columns behind the last token, such as T. Without `starts` (None),
each row is one response.

Numbers of responses have the shape [B], or [B, K] with `starts`.

Shape suffixes: B rows, T tokens of a padded row, K responses of a row, N the axes of responses: B,
or B and K.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from opsd_jax.losses.checks import check_shape, debug_check


def shape_of_responses(mask: jax.Array, starts: Any) -> tuple[tuple[int, ...], str]:
    """Returns the shape of an array with one number per response, and a phrase for errors.

    Args:
      mask: [B, T].
      starts: int [B, K], or None.

    Raises:
      ValueError: `starts` has a wrong shape or dtype.
    """
    if starts is None:
        return mask.shape[:1], "one number for each row of mask"
    dtype, shape = jnp.result_type(starts), jnp.shape(starts)
    if not jnp.issubdtype(dtype, jnp.integer) or len(shape) != 2 or shape[0] != len(mask):
        raise ValueError(
            f"starts has dtype {dtype} and shape {list(shape)}; expected integers "
            f"[{len(mask)}, responses of a row], the column at which each response begins."
        )
    debug_check(
        jnp.all(jnp.diff(starts, prepend=0, append=mask.shape[1], axis=1) >= 0),
        "the starts of a row do not ascend; expected columns from 0 to the length of the row.",
    )
    return shape, "the shape of starts"


def check_per_response(mask: jax.Array, starts: Any, **arrays: Any) -> None:
    """Raises ValueError if one of `arrays` does not have one number for each response.

    Args:
      mask: [B, T].
      starts: int [B, K], or None.
      **arrays: argument name -> array. None stands for an argument that was not given and passes.
    """
    check_shape(*shape_of_responses(mask, starts), **arrays)


def check_row_weight(row_weight: Any, mask: jax.Array, starts: Any = None) -> None:
    """Raises ValueError unless `row_weight` is a scalar or has one number for each response."""
    if jnp.ndim(row_weight):
        check_per_response(mask, starts, row_weight=row_weight)


def of_tokens(values_N: jax.Array, starts: jax.Array | None, tokens: int) -> jax.Array:
    """Copies the number of each response to its tokens.

    Args:
      values_N: [B], or [B, K] with `starts`.
      starts: int [B, K], or None.
      tokens: T.

    Returns:
      An array [B, T] of the same dtype.
    """
    if starts is None:
        return jnp.broadcast_to(values_N[:, None], (*values_N.shape, tokens))
    member_BxTxK = _members(starts, tokens)
    copied = jnp.where(member_BxTxK, values_N[:, None, :], jnp.zeros((), values_N.dtype))
    return jnp.sum(copied, axis=-1, dtype=values_N.dtype)


def sums(values_BxT: jax.Array, starts: jax.Array | None) -> jax.Array:
    """Returns the float32 sum over the tokens of each response: [B], or [B, K] with `starts`.

    Raises:
      ValueError: `starts` has a wrong shape or dtype.
    """
    shape_of_responses(values_BxT, starts)
    if starts is None:
        return jnp.sum(values_BxT, axis=1, dtype=jnp.float32)
    member_BxTxK = _members(starts, values_BxT.shape[1])
    values_BxTx1 = values_BxT.astype(jnp.float32)[..., None]
    return jnp.sum(jnp.where(member_BxTxK, values_BxTx1, 0.0), axis=1)


def positions(mask_BxT: jax.Array, starts: jax.Array | None = None) -> jax.Array:
    """Returns each token's position in its response, counting only the tokens in the mask.

    Args:
      mask_BxT: bool.
      starts: int [B, K], or None.

    Returns:
      int32 [B, T]; for a token in the mask, its position among these tokens, from 0.
    """
    mask = mask_BxT.astype(jnp.int32)
    position_BxT = jnp.cumsum(mask, axis=1) - mask
    if starts is None:
        return position_BxT
    counts_BxK = jnp.sum(jnp.where(_members(starts, mask.shape[1]), mask[..., None], 0), axis=1)
    before_BxK = jnp.cumsum(counts_BxK, axis=1) - counts_BxK
    return position_BxT - of_tokens(before_BxK, starts, mask.shape[1])


def _members(starts: jax.Array, tokens: int) -> jax.Array:
    """Returns which tokens belong to which responses, bool [B, T, K].

    The first response of a row also has the tokens before its start.
    """
    column_1xTx1 = jnp.arange(tokens)[None, :, None]
    # Where each response ends: the start of the next one. The row ends the last one.
    starts = jnp.asarray(starts)
    edge_Bx1 = jnp.full_like(starts[:, :1], tokens)
    first = jnp.concatenate([jnp.zeros_like(edge_Bx1), starts[:, 1:]], axis=1)
    end = jnp.concatenate([starts[:, 1:], edge_Bx1], axis=1)
    return (first[:, None, :] <= column_1xTx1) & (column_1xTx1 < end[:, None, :])
