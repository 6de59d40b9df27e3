"""Log-probabilities of given tokens, and what is made of them without a second model."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log p(tokens) under `logits`; its negative is the cross-entropy of SFT.

    Args:
      logits: [..., V].
      tokens: int [...], in [0, V).

    Returns:
      float32 [...].
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


def entropy(logits: jax.Array) -> jax.Array:
    """-sum_v p log p in nats, float32 [...], of logits [..., V]; -inf logits are safe."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    safe = jnp.where(logprobs > -jnp.inf, logprobs, 0.0)
    return -jnp.sum(jnp.exp(logprobs) * safe, axis=-1)
