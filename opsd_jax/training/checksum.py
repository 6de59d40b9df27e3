"""Checksums of arrays. They show whether the values that were restored are those that were saved.

A checksum depends on the values alone, not on how they are sharded or stored. It is computed where
the array is, in one pass, so no file is read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_FACTOR = 2_654_435_769  # 2^32 / golden ratio: spreads the positions over all 32 bits


def checksums(tree: Any) -> dict[str, str]:
    """Returns the checksum of each array in a pytree, as path -> "dtype:hexadecimal digits".

    All processes of a run must call it together.

    Args:
      tree: a pytree of arrays, which may be sharded over several processes.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    with jax.transfer_guard("allow"):
        sums = jax.device_get(_sums([leaf for _, leaf in named]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}:{value:08x}"
        for (path, leaf), value in zip(named, sums, strict=True)
    }


def changed(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the paths of the arrays whose values differ.

    Arrays that only one side has, or that were converted to another dtype, are not compared.
    """
    dtype = lambda text: text.partition(":")[0]
    both = [path for path in now if path in saved and dtype(saved[path]) == dtype(now[path])]
    return [path for path in both if saved[path] != now[path]]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(x: jax.Array) -> jax.Array:
    """Returns the sum, modulo 2^32, of the words of an array, each times an odd number.

    The odd number depends on the word's position. Odd numbers have an inverse modulo 2^32, so a
    change of one word always changes the sum.
    """
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * jnp.uint32(size) + index
    mixed = position * jnp.uint32(_FACTOR)
    return jnp.sum(words * ((mixed ^ (mixed >> 15)) | 1), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """Returns the bits of an array as uint32: one word per element, or two for 64-bit elements."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
