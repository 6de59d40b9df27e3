"""What is wrong with an argument, said at trace time by name, shape and expectation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def check_shape(shape: Sequence[int], because: str, **arrays: Any) -> None:
    """Raises ValueError for the first of `arrays`, by name, whose shape is not `shape`.

    Args:
      shape: the one expected.
      because: what sets it, for the message, such as "the shape of mask".
      **arrays: name -> array, or None for an argument not given.
    """
    for name, array in arrays.items():
        if array is not None and jnp.shape(array) != tuple(shape):
            raise ValueError(
                f"{name} has shape {list(jnp.shape(array))}; expected {list(shape)}, {because}."
            )


def check_mask(mask: Any) -> jax.Array:
    """`mask` as an array; raises ValueError if it is not boolean and of rank 2."""
    mask = jnp.asarray(mask)
    if mask.ndim != 2 or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask is {mask.dtype} with shape {list(mask.shape)}; expected bool [rows, tokens]."
        )
    return mask


def check_row_weight(row_weight: Any, mask: Any) -> None:
    """Raises ValueError if `row_weight` is neither one number nor one a row."""
    if jnp.ndim(row_weight):
        check_shape(mask.shape[:1], "a number a row of mask", row_weight=row_weight)


def check_option(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}.")


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError if `value` is known and not in [low, high]; NaN is in no range."""
    if not isinstance(value, jax.core.Tracer) and not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected a number in [{low}, {high}].")
