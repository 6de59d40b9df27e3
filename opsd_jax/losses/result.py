"""`Loss`, the result of every loss function."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.losses.reduction import weighted_sum


class Loss(NamedTuple):
    """The loss of a batch or microbatch, as a weighted sum and the weight to divide it by.

    For a batch in several parts, add `sum` and `weight` over the parts, then divide. For a batch in
    one part, use `mean`.

    Attributes:
      sum: float32 scalar, the weighted sum of the token losses. Only this field has gradients.
      weight: float32 scalar, the number to divide `sum` by.
      weights: float32 [B, T], the weight of each token in `sum`.
      tokens: diagnostic name -> [B, T], values of each token; 0 where the token's weight is 0.
    """

    sum: jax.Array
    weight: jax.Array
    weights: jax.Array
    tokens: dict[str, jax.Array]

    @property
    def mean(self) -> jax.Array:
        """The mean loss: sum / weight, or 0 if the weight is 0."""
        return self.sum / jnp.where(self.weight == 0, 1.0, self.weight)

    def metric(self, name: str) -> tuple[jax.Array, jax.Array]:
        """Returns the unweighted sum of a diagnostic over the active tokens, and the token count.

        A token is active if its weight in the loss is not 0.

        Args:
          name: a key of `tokens`.

        Returns:
          `(sum, number of tokens)`, float32 scalars. Add both over parts of a batch, then divide.
        """
        active = (self.weights != 0).astype(jnp.float32)
        return weighted_sum(self.tokens[name], active), jnp.sum(active)
