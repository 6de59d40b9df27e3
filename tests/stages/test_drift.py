"""The metrics of the sampler's drift equal those of NumPy over all tokens of a step."""

import jax.numpy as jnp
import numpy as np

from opsd_jax.losses import Loss
from opsd_jax.stages import drift
from opsd_jax.training import metrics


def loss(log_ratio, weights):
    zero = jnp.zeros(())
    tokens = {"log_ratio": jnp.asarray(log_ratio, jnp.float32)}
    return Loss(zero, zero, jnp.asarray(weights, jnp.float32), tokens)


def test_metrics_are_those_of_all_active_tokens():
    rng = np.random.default_rng(0)
    log_ratio = rng.normal(0, 0.05, (4, 6, 50)) + 3 * (rng.random((4, 6, 50)) < 0.02)
    weights = (rng.random((4, 6, 50)) < 0.8) * 0.3
    parts = [drift.sums(loss(r, w)) for r, w in zip(log_ratio, weights, strict=True)]
    found = drift.summary(metrics.means(parts) | {"reward": 0.5})
    active = log_ratio[weights > 0]
    np.testing.assert_allclose(found.pop("sampler_drift"), np.abs(active).mean(), rtol=1e-5)
    ratio = np.exp(active)
    expected = ratio.mean() ** 2 / (ratio**2).mean()
    np.testing.assert_allclose(found.pop("sampler_ess"), expected, rtol=1e-5)
    exact = np.quantile(np.abs(active), 0.99)
    assert exact <= found.pop("sampler_drift_p99") <= 1.22 * exact
    assert found == {"reward": 0.5}


def test_equal_models_do_not_drift():
    found = drift.summary(metrics.means([drift.sums(loss(np.zeros((2, 3)), np.ones((2, 3))))]))
    assert found.pop("sampler_drift_p99") <= 1e-6
    assert found == {"sampler_drift": 0.0, "sampler_ess": 1.0}


def test_a_drift_beyond_the_bounds_is_finite():
    found = drift.summary(metrics.means([drift.sums(loss(np.full((2, 3), 1e4), np.ones((2, 3))))]))
    assert found["sampler_drift_p99"] == 10
    assert np.isfinite(found["sampler_ess"])


def test_without_log_ratios_or_active_tokens_there_is_nothing():
    assert drift.sums(loss([[0.0]], [[1.0]])._replace(tokens={})) == {}
    assert drift.summary(metrics.means([drift.sums(loss([[0.5]], [[0.0]]))])) == {}
