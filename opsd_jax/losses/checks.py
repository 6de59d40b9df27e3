"""Checks of the arguments of losses, which run while a loss is traced.

Every error message names the argument, the value or shape found, and what was expected.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def check_shape(shape: Sequence[int], reason: str, **arrays: Any) -> None:
    """Raises ValueError if one of `arrays` does not have the given shape.

    Args:
      shape: the expected shape.
      reason: where the expected shape comes from, for the message, such as "the shape of mask".
      **arrays: argument name -> array. None stands for an argument that was not given and passes.
    """
    for name, array in arrays.items():
        if array is not None and jnp.shape(array) != tuple(shape):
            raise ValueError(
                f"{name} has shape {list(jnp.shape(array))}; expected {list(shape)}, {reason}."
            )


def check_mask(mask: Any) -> jax.Array:
    """Returns `mask` as an array. Raises ValueError unless it is boolean and has rank 2."""
    mask = jnp.asarray(mask)
    if mask.ndim != 2 or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask is {mask.dtype} with shape {list(mask.shape)}; expected bool [rows, tokens]."
        )
    return mask


def check_row_weight(row_weight: Any, mask: Any) -> None:
    """Raises ValueError unless `row_weight` is one number, or one number per row of `mask`."""
    if jnp.ndim(row_weight):
        check_shape(mask.shape[:1], "one number for each row of mask", row_weight=row_weight)


def check_option(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError, with the option's name, if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}.")


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError if `value` is outside [low, high] or NaN. Traced values are not checked."""
    if not isinstance(value, jax.core.Tracer) and not low <= value <= high:
        bounds = f"in [{low}, {high}]" if high < float("inf") else f"that is at least {low}"
        raise ValueError(f"{name} is {value}; expected a number {bounds}.")
