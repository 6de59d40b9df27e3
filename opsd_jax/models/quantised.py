"""Weights in 8 bits, for sampling.

A weight is stored as int8 values and float32 scales, one per output: `weight = values * scale`. A
matmul multiplies by the values and then scales its output, so no rounding happens but that of the
weights. A value has an error of at most half its scale, which is 1/127 of the largest value that
contributes to the same output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from opsd_jax.options import option

LARGEST = 127  # -128 is not used, so that the range is symmetric


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisationOptions:
    """The options of rollouts in 8 bits."""

    weights: str = option(
        "none",
        "Weights of the matmuls while rollouts are sampled: 'int8', with a scale for each output, "
        "or 'none': in `model.dtype`.",
        choices=("none", "int8"),
        added=True,
    )
    cache: str = option(
        "none",
        "Keys and values while rollouts are sampled: 'int8' or 'none': in `model.dtype`.",
        choices=("none", "int8"),
        added=True,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """An int8 array with scales. It stands for `values * scale`.

    Attributes:
      values: int8, of any shape.
      scale: float32, of the same rank. The axes that a matmul contracts have size 1.
    """

    values: jax.Array
    scale: jax.Array

    def __getitem__(self, index: Any) -> Quantised:
        """Indexes leading axes of both arrays."""
        return Quantised(self.values[index], self.scale[index])

    def reshape(self, size: int, *sizes: int) -> Quantised:
        """Reshapes an array whose contracted axes come first, and become one of `size`."""
        return Quantised(self.values.reshape(size, *sizes), self.scale.reshape(1, *sizes))

    def scaled(self, product: jax.Array) -> jax.Array:
        """Scales the product of x [..., D] and `values` [D, ...], in float32."""
        scale = self.scale[0]
        return product * scale.reshape((1,) * (product.ndim - scale.ndim) + scale.shape)

    @property
    def T(self) -> Quantised:
        """The transposed matrix."""
        return Quantised(self.values.T, self.scale.T)


def is_quantised(leaf: Any) -> bool:
    """Returns whether a leaf of parameters is quantised, for `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, Quantised)


def to_int8(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divides by a scale and rounds to int8. Clips to LARGEST; 0 where the scale is 0."""
    values = jnp.round(x.astype(jnp.float32) / jnp.where(scale > 0, scale, jnp.inf))
    return jnp.clip(values, -LARGEST, LARGEST).astype(jnp.int8)


def quantise(x: jax.Array, axes: int | tuple[int, ...]) -> Quantised:
    """Rounds an array to int8. The largest absolute value along `axes` becomes LARGEST.

    Args:
      x: any float dtype.
      axes: the axes that a matmul contracts.
    """
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=True) / LARGEST
    return Quantised(to_int8(x, scale), scale)
