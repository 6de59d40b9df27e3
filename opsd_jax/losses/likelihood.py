"""Functions of one model's logits, such as token log-probabilities and entropy.

All functions cast logits to float32 first. A logit of -inf marks a vocabulary entry that cannot
occur (padding of the vocabulary, a forbidden token). It adds 0 to values and gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opsd_jax.losses.checks import check_shape


@jax.custom_vjp
def log_normaliser(logits: jax.Array) -> jax.Array:
    """Computes the log-normaliser, log sum_v exp(logits_v), over the last axis of the logits.

    Logits are float32 [..., V], and the result is float32 [...]. The backward pass recomputes the
    softmax, so that autodiff stores only the logits and not a second [..., V] array.
    """
    return jax.nn.logsumexp(logits, axis=-1)


def _log_normaliser_fwd(logits):
    total = log_normaliser(logits)
    return total, (logits, total)


def _log_normaliser_bwd(residuals, cotangent):
    logits, total = residuals
    total = jnp.where(total == -jnp.inf, 0.0, total)  # every logit is -inf: gradients of 0, not NaN
    return (cotangent[..., None] * jnp.exp(logits - total[..., None]),)


log_normaliser.defvjp(_log_normaliser_fwd, _log_normaliser_bwd)


def token_logprobs(logits: jax.Array, tokens: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Computes the log-probability of each token under softmax(logits / temperature).

    The negative of the result is the cross-entropy loss.

    Args:
      logits: [..., V].
      tokens: int [...], token ids. An id outside [0, V), such as the -100 that some libraries use
        for padding, gives NaN. Mask these tokens in the loss.
      temperature: divides the logits; above 0.

    Returns:
      float32 [...], in nats.

    Raises:
      ValueError: the shape of `tokens` is not the shape of `logits` without its last axis, or
        `temperature` is not above 0.
    """
    check_shape(logits.shape[:-1], "the shape of the logits without V", tokens=tokens)
    tokens = jnp.asarray(tokens).astype(jnp.int32)
    logits, vocab_size = at_temperature(logits, temperature), logits.shape[-1]
    # This is not a gather: the gradient of a gather is a scatter into zeros [..., V], and where the
    # vocabulary is split over devices, a gather would collect the logits on every device.
    entry = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(entry == tokens[..., None], logits, 0.0), axis=-1)
    known = (tokens >= 0) & (tokens < vocab_size)
    return jnp.where(known, chosen - log_normaliser(logits), jnp.nan)


def entropy(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Computes the entropy of softmax(logits / temperature), -sum_v p log p.

    Args:
      logits: [..., V].
      temperature: divides the logits; above 0.

    Returns:
      float32 [...], in nats.

    Raises:
      ValueError: `temperature` is not above 0.
    """
    logits = at_temperature(logits, temperature)
    logprobs = logits - log_normaliser(logits)[..., None]
    possible = logprobs != -jnp.inf
    logprobs = jnp.where(possible, logprobs, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(logprobs) * logprobs, 0.0), axis=-1)


def importance_ratio(log_ratio: jax.Array) -> jax.Array:
    """Computes exp(log_ratio), with log_ratio clipped to [-20, 20] to prevent overflow.

    An infinite or NaN log-ratio gives NaN: a sampled token cannot have a probability of 0, so such
    an input is an error that the clip must not hide.
    """
    return jnp.exp(_clipped(log_ratio))


def k3(log_ratio: jax.Array) -> jax.Array:
    """Computes exp(log_ratio) - 1 - log_ratio, with log_ratio clipped to [-20, 20].

    With log_ratio = log T(y) - log S(y) it is the estimate k3 of KL(S || T). Without the clip it
    overflows at 89. An infinite or NaN log-ratio gives NaN, as in `importance_ratio`.
    """
    clipped = _clipped(log_ratio)
    return jnp.expm1(clipped) - clipped


def _clipped(log_ratio: jax.Array) -> jax.Array:
    clipped = jnp.clip(log_ratio, -20.0, 20.0)
    return jnp.where(jnp.isfinite(log_ratio), clipped, jnp.nan)


def at_temperature(logits: jax.Array, temperature: float) -> jax.Array:
    """Returns logits / temperature in float32.

    Raises:
      ValueError: `temperature` is a Python number that is not above 0.
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0.")
    logits = jnp.asarray(logits).astype(jnp.float32)
    return (
        logits
        if isinstance(temperature, int | float) and temperature == 1
        else logits / temperature
    )
