"""Supervised fine-tuning: the cross-entropy of given tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opsd_jax.losses.checks import check_shape
from opsd_jax.losses.fused import Scores, weighted_loss
from opsd_jax.losses.likelihood import log_normaliser, token_logprobs
from opsd_jax.losses.reduction import token_weights
from opsd_jax.losses.result import Loss


def sft(
    *,
    student: Scores,
    tokens: jax.Array,
    mask: jax.Array,
    row_weight: jax.Array | float = 1.0,
    aggregation: str = "token",
    length: float = 1.0,
    chunk: int | None = None,
    partition: P | None = None,
) -> Loss:
    """-log p(token), over the tokens of the mask.

    Args:
      student: logits [B, T, V] or a `Head`; those at t predict `tokens[:, t]`.
      tokens: int [B, T].
      mask: bool [B, T], the tokens to learn.
      row_weight, aggregation, length: see `token_weights`.
      chunk, partition: see `weighted_loss`.

    Returns:
      A `Loss`, with `tokens` "loss" and "accuracy": 1 where no word is likelier than the token.

    Raises:
      ValueError: a shape or an option; names it.
    """
    weights, total = token_weights(mask, row_weight, aggregation=aggregation, length=length)
    check_shape(mask.shape, "the shape of mask", tokens=tokens)

    def token_loss(logits, _, tokens):
        logprobs = token_logprobs(logits, tokens)
        best = jnp.max(logits, axis=-1) - log_normaliser(logits)
        return -logprobs, {"accuracy": (logprobs >= best).astype(jnp.float32)}

    value, said = weighted_loss(
        token_loss, weights, tokens, student=student, chunk=chunk, partition=partition
    )
    return Loss(value, total, weights, said)
