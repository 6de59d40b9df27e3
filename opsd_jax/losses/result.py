"""What a loss returns."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.losses.reduction import weighted_sum


class Loss(NamedTuple):
    """A loss of a batch, or of a part of one.

    Add `sum` and `weight` over microbatches, then divide; `mean` is for a batch that is whole.

    Attributes:
      sum: float32, the tokens' losses times their weights. The only part with gradients.
      weight: float32, what to divide by.
      weights: [B, T], of the tokens.
      tokens: name -> [B, T], unreduced values for diagnostics, 0 where the weight is.
    """

    sum: jax.Array
    weight: jax.Array
    weights: jax.Array
    tokens: dict[str, jax.Array]

    @property
    def mean(self) -> jax.Array:
        """sum / weight, or 0 if there is no weight."""
        return self.sum / jnp.where(self.weight == 0, 1.0, self.weight)

    def metric(self, name: str) -> tuple[jax.Array, jax.Array]:
        """`(sum, number)` of a diagnostic over the tokens that weigh something, all alike."""
        live = (self.weights != 0).astype(jnp.float32)
        return weighted_sum(self.tokens[name], live), jnp.sum(live)
