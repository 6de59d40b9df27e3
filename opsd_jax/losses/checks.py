"""Functions that check the arguments of a loss: shapes, dtypes and option values.

Every error message names the argument, the value or shape found, and what was expected. The bounds
of an option are part of its annotation, as in `beta: Annotated[float, Range(0, 1)]`, and
`check_options` checks them. Values that are known only on the device have a `debug_check`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

_checks_values = contextvars.ContextVar("checks_values", default=True)


class Range(NamedTuple):
    """Bounds on a number. `str` returns them as a phrase, such as "a number in [0, 1]".

    Attributes:
      low: the smallest valid number.
      high: the largest valid number.
      or_zero: whether 0 is valid too.
    """

    low: float
    high: float = float("inf")
    or_zero: bool = False

    def __str__(self) -> str:
        bounded = self.high < float("inf")
        bounds = f"in [{self.low}, {self.high}]" if bounded else f"that is at least {self.low}"
        return f"{'0, or ' if self.or_zero else ''}a number {bounds}"

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError if `value` is out of bounds or NaN. Traced values are not checked."""
        known = number(value)
        if not is_known(known) or (self.or_zero and known == 0):
            return
        if not self.low <= known <= self.high:
            raise ValueError(f"{name} is {value}; expected {self}.")


class OneOf(NamedTuple):
    """The valid values of an option. `str` returns them as a phrase, such as "one of a, b".

    Attributes:
      names: the names. They may be the keys of a table that grows.
      several: if above 0, this many names separated by commas are valid too.
    """

    names: Collection[Any]
    several: int = 0

    def __str__(self) -> str:
        text = f"one of {', '.join(map(str, self.names))}"
        return f"{text}, or {self.several} of them separated by commas" if self.several else text

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError if `value` is neither a valid name nor a valid comma-separated list."""
        parts = [part.strip() for part in value.split(",")] if self.several else [value]
        if len(parts) not in (1, self.several) or any(part not in self.names for part in parts):
            raise ValueError(f"{name} is {value!r}; expected {self}.")


def check_options(options: Any) -> None:
    """Raises ValueError if a field of `options` violates the bounds in its type annotation.

    Only numbers of type float may be traced.

    Args:
      options: a NamedTuple. Fields without bounds pass.
    """
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value, kind = getattr(options, name), getattr(hint, "__origin__", hint)
        if kind in (int, bool, str) and not is_known(value):
            raise ValueError(
                f"{name} is traced ({value}); expected a Python {kind.__name__}. Only options of "
                "type float may be traced."
            )
        for bounds in getattr(hint, "__metadata__", ()):
            bounds.check(name, value)


def check_class(name: str, options: Any, cls: type) -> None:
    """Raises ValueError unless the argument `name`, with the value `options`, is of class `cls`."""
    if not isinstance(options, cls):
        kind = cls.__name__
        article = "an" if kind[0] in "AEIOU" else "a"
        raise ValueError(
            f"{name} is {options!r}; expected {article} {kind}, such as losses.{kind}()."
        )


def is_known(value: Any) -> bool:
    """Returns whether a value is known while a program is traced."""
    return not isinstance(value, jax.core.Tracer)


def number(value: Any) -> Any:
    """Returns a known number as a Python float. A traced number is returned unchanged.

    While a program is traced, operations on a concrete array have traced results.
    """
    return float(np.asarray(value)) if is_known(value) else value


def is_on(value: Any) -> bool:
    """Returns whether an option, which 0 turns off, is on. A traced option is."""
    return not is_known(value) or number(value) != 0


def as_floats(array: Any) -> Any:
    """Returns an array of numbers or booleans as floats: a JAX array, or else a NumPy array."""
    return (array if isinstance(array, jax.Array) else np.asarray(array)).astype(float)


def check_required(shape: str = "[rows, tokens]", /, **arrays: Any) -> None:
    """Raises ValueError if one of `arrays` (argument name -> array) is None.

    Args:
      shape: the expected shape, for the message.
      **arrays: argument name -> array.
    """
    for name, array in arrays.items():
        if array is None:
            raise ValueError(f"{name} is None; expected an array {shape}.")


def check_tokens(tokens: Any, mask: Any) -> None:
    """Raises ValueError unless `tokens` are integers and have the shape of `mask`."""
    check_required(tokens=tokens)
    dtype = jnp.asarray(tokens).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens has dtype {dtype}; expected integers, the token ids.")
    check_shape(mask.shape, "the shape of mask", tokens=tokens)


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
    check_required(mask=mask)
    mask = jnp.asarray(mask)
    if mask.ndim != 2 or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask has dtype {mask.dtype} and shape {list(mask.shape)}; expected dtype bool and "
            "shape [rows, tokens]."
        )
    return mask


def debug_check(condition: jax.Array, message: str) -> None:
    """Like `checkify.debug_check`, but without effect within `without_debug_checks`.

    Args:
      condition: bool scalar, which must be true. Checked only in programs wrapped in `checkify`.
      message: the error otherwise.
    """
    if _checks_values.get():
        checkify.debug_check(condition, message)


@contextlib.contextmanager
def without_debug_checks() -> Iterator[None]:
    """Context manager in which programs are traced without the checks of `debug_check`.

    `checkify` numbers the checks of a process in the order of tracing and writes the numbers into
    the program, even where a check has no effect. A resumed run, which traces fewer programs, would
    then find none of its train steps in JAX's persistent compilation cache.
    """
    token = _checks_values.set(False)
    try:
        yield
    finally:
        _checks_values.reset(token)
