"""Metrics of the difference between the model that is trained and the one that samples rollouts.

The two differ where rollouts are in 8 bits or were carried over from earlier steps, and a little
wherever kernels or the order of sums differ. In an RLVR stage with several updates a step, the
earlier updates add to the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from opsd_jax.losses import Loss
from opsd_jax.training.stage import Metric

# Bounds of |log p - log p_behaviour|, in nats: 12 in each decade.
BOUNDS = np.geomspace(1e-6, 10.0, 85, dtype=np.float32)


def sums(loss: Loss) -> dict[str, Metric]:
    """Returns the sums over active tokens from which `summary` computes the metrics.

    Args:
      loss: a loss with the diagnostic "log_ratio", log p - log p_behaviour. Without it, the result
        is empty.
    """
    if "log_ratio" not in loss.tokens:
        return {}
    active_BxT = loss.weights != 0
    log_ratio_BxT = jnp.where(active_BxT, loss.tokens["log_ratio"], 0.0)
    difference_BxT = jnp.abs(log_ratio_BxT)
    ratio_BxT = jnp.where(active_BxT, jnp.exp(jnp.minimum(log_ratio_BxT, BOUNDS[-1])), 0.0)
    beyond = jnp.sum(difference_BxT[..., None] > BOUNDS[None, None], axis=(0, 1))
    count = jnp.sum(active_BxT, dtype=jnp.float32)
    totals = {
        "drift": jnp.sum(difference_BxT),
        "drift_beyond": beyond.astype(jnp.float32),
        "ratio": jnp.sum(ratio_BxT),
        "ratio_squared": jnp.sum(ratio_BxT**2),
    }
    return {name: (total, count) for name, total in totals.items()}


def summary(means: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the means of `sums` over a step by metrics.

    - `sampler_drift`: mean of |log p - log p_behaviour| over tokens, in nats;
    - `sampler_drift_p99`: its 99th percentile, rounded up to the next of BOUNDS (by up to 21 %);
    - `sampler_ess`: the effective sample size of the importance weights, as a fraction of the
      tokens: E[w]² / E[w²] with w = p / p_behaviour.

    Args:
      means: name -> mean of a step. Other names are returned as they are.
    """
    found = dict(means)
    if "drift" not in found:
        return found
    beyond = found.pop("drift_beyond")
    within = np.flatnonzero(beyond <= 0.01)
    found["sampler_drift"] = found.pop("drift")
    found["sampler_drift_p99"] = float(BOUNDS[within[0] if len(within) else -1])
    found["sampler_ess"] = found.pop("ratio") ** 2 / found.pop("ratio_squared")
    return found
