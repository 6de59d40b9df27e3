"""Log-probabilities of given tokens, and what is made of them without a second model.

Logits are cast to float32 first. -inf (a padded vocabulary, a forbidden token) is a word that
cannot occur: it adds nothing, to values and to gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opsd_jax.losses.checks import check_shape


@jax.custom_vjp
def log_normaliser(logits: jax.Array) -> jax.Array:
    """log sum_v exp(logits_v), float32 [...], of float32 logits [..., V].

    Its backward pass makes the softmax anew rather than keep it: what is kept between the passes of
    a loss is then its logits alone.
    """
    return jax.nn.logsumexp(logits, axis=-1)


def _log_normaliser_fwd(logits):
    total = log_normaliser(logits)
    return total, (logits, total)


def _log_normaliser_bwd(residuals, cotangent):
    logits, total = residuals
    total = jnp.where(total == -jnp.inf, 0.0, total)  # of no word at all
    return (cotangent[..., None] * jnp.exp(logits - total[..., None]),)


log_normaliser.defvjp(_log_normaliser_fwd, _log_normaliser_bwd)


def token_logprobs(logits: jax.Array, tokens: jax.Array, temperature: float = 1.0) -> jax.Array:
    """log p(tokens) under softmax(logits / temperature); its negative is the cross-entropy of SFT.

    Args:
      logits: [..., V].
      tokens: int [...]. One outside of [0, V), such as the -100 that marks padding elsewhere, gives
        NaN: give it no weight.
      temperature: above 0.

    Returns:
      float32 [...].

    Raises:
      ValueError: `tokens` has not the shape of `logits` without its last axis.
    """
    check_shape(logits.shape[:-1], "the shape of the logits without V", tokens=tokens)
    logits, vocab_size = at_temperature(logits, temperature), logits.shape[-1]
    # Not a gather: its gradient would be a scatter into zeros [..., V], and over a vocabulary split
    # among devices it would bring the logits together.
    word = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(word == tokens[..., None], logits, 0.0), axis=-1)
    known = (tokens >= 0) & (tokens < vocab_size)
    return jnp.where(known, chosen - log_normaliser(logits), jnp.nan)


def entropy(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """-sum_v p log p in nats, float32 [...], of logits [..., V]."""
    logits = at_temperature(logits, temperature)
    logprobs = logits - log_normaliser(logits)[..., None]
    possible = logprobs != -jnp.inf
    logprobs = jnp.where(possible, logprobs, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(logprobs) * logprobs, 0.0), axis=-1)


def importance_ratio(log_ratio: jax.Array) -> jax.Array:
    """e^log_ratio, cut to e^+-20 against overflow; NaN if it is infinite, which no sample has."""
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    return jnp.where(jnp.isfinite(log_ratio), ratio, jnp.nan)


def at_temperature(logits: jax.Array, temperature: float) -> jax.Array:
    """logits / temperature, in float32.

    Raises:
      ValueError: the temperature is a number that is not above 0.
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0.")
    logits = jnp.asarray(logits).astype(jnp.float32)
    return (
        logits
        if isinstance(temperature, int | float) and temperature == 1
        else logits / temperature
    )
