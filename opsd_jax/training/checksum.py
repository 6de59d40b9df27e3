"""Checksums of arrays. They show whether the values that were restored are those that were saved.

A checksum depends on the values alone, not on how they are sharded or stored. It is computed where
the array is, in one pass, so no file is read again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_FACTOR = 2_654_435_769  # 2^32 / golden ratio: spreads an index over all 32 bits
_PARTS = 8  # XLA:CPU adds as many arrays, but not twice as many, in one pass


def checksums(tree: Any) -> dict[str, str]:
    """Returns the checksum of each array in a pytree, as path -> "dtype:hexadecimal digits".

    All processes of a run must call it together.

    Args:
      tree: a pytree of arrays, which may be sharded over several processes.
    """
    arrays = jax.tree.leaves(tree)
    # On a CPU, XLA adds arrays several times as fast as it sums the words of one array. Where
    # memory is scarce or arrays are split over devices, they are summed where they are.
    folded = tuple(
        jax.default_backend() == "cpu"
        and leaf.sharding.is_fully_replicated
        and _rows(leaf.shape, leaf.dtype) % _PARTS**2 == 0
        for leaf in arrays
    )
    with jax.transfer_guard("allow"):
        words = _folded(arrays, folded)
        leaves = [x if word is None else word for x, word in zip(arrays, words, strict=True)]
        sums = jax.device_get(_sums(leaves, folded))
    return {
        path: f"{array.dtype}:{value:08x}"
        for path, array, value in zip(paths(tree), arrays, sums, strict=True)
    }


def paths(tree: Any) -> list[str]:
    """Returns the path of each array in a pytree, such as "params/layers/0/w"."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]


def changed(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the paths of the arrays whose values differ.

    Arrays that only one side has, or that were converted to another dtype, are not compared.
    """
    dtype = lambda text: text.partition(":")[0]
    both = [path for path in now if path in saved and dtype(saved[path]) == dtype(now[path])]
    return [path for path in both if saved[path] != now[path]]


@functools.cache
def _rows(shape: tuple[int, ...], dtype: Any) -> int:
    """Returns the number of rows of an array's words: the last axis has the columns."""
    words = jax.eval_shape(_words, jax.ShapeDtypeStruct(shape, dtype))
    return math.prod(words.shape[:-1])


@functools.partial(jax.jit, static_argnums=1)
def _folded(leaves: list[jax.Array], folded: tuple[bool, ...]) -> list[jax.Array | None]:
    """Returns the sum of 8 parts of each array's rows, each times an odd number, or None."""
    return [
        _fold(_words(x), level=0) if fold else None for x, fold in zip(leaves, folded, strict=True)
    ]


def _fold(words: jax.Array, level: int) -> jax.Array:
    parts = words.reshape(_PARTS, -1, words.shape[-1])
    factors = _odd(jnp.arange(_PARTS), level)
    return functools.reduce(jnp.add, (parts[i] * factors[i] for i in range(_PARTS)))


@functools.partial(jax.jit, static_argnums=1)
def _sums(leaves: list[jax.Array], folded: tuple[bool, ...]) -> list[jax.Array]:
    return [_sum(leaf, is_folded) for leaf, is_folded in zip(leaves, folded, strict=True)]


def _sum(x: jax.Array, folded: bool) -> jax.Array:
    """Returns the sum, modulo 2^32, of the words of an array, each times an odd number.

    Odd numbers have an inverse modulo 2^32, so a change of one word always changes the sum. The
    odd number is a product of numbers for the word's row and column. The number of the row is
    itself a product if the rows can be divided into 8 parts of 8 parts: of numbers for the part,
    for the part in it, and for the row there.

    Args:
      x: the array, or the result of `_folded` for it.
      folded: whether `x` is that result.
    """
    words = _fold(x, level=1) if folded else _words(x)
    rows = _rows(x.shape, x.dtype)
    row = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape[:-1]):
        row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    if not folded and rows % _PARTS**2 == 0:
        for level in range(2):
            rows //= _PARTS
            words *= _odd(row // jnp.uint32(rows), level)
            row %= jnp.uint32(rows)
    column = jax.lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    return jnp.sum(words * _odd(row, 2) * _odd(column, 3), dtype=jnp.uint32)


def _odd(index: jax.Array, level: int) -> jax.Array:
    """Returns an odd number for each index. The numbers of two levels are unrelated."""
    mixed = (index.astype(jnp.uint32) + jnp.uint32(level << 28)) * jnp.uint32(_FACTOR)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(_FACTOR)
    return (mixed ^ (mixed >> 15)) | 1


def _words(x: jax.Array) -> jax.Array:
    """Returns the bits of an array as uint32: one word per element, or two for 64-bit elements.

    The words have at least one axis.
    """
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        words = x.astype(jnp.uint32)
    elif x.dtype.itemsize == 8:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    words = jnp.atleast_1d(words)
    return words ^ (words >> 16)  # otherwise, the changes of two signs of float32 would cancel out
