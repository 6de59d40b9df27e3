"""The loss of supervised fine-tuning (SFT): the cross-entropy of the target tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opsd_jax.losses.checks import check_tokens
from opsd_jax.losses.fused import weighted_loss
from opsd_jax.losses.head import LogitsOrHead
from opsd_jax.losses.likelihood import log_normaliser, token_logprobs
from opsd_jax.losses.reduction import token_weights
from opsd_jax.losses.result import Loss


def sft(
    *,
    student: LogitsOrHead,
    tokens: jax.Array,
    mask: jax.Array,
    row_weight: jax.Array | float = 1.0,
    aggregation: str = "token",
    length: float = 1.0,
    starts: jax.Array | None = None,
    chunk: int | None = None,
    partition: P | None = None,
) -> Loss:
    """Computes the supervised fine-tuning loss: the cross-entropy of the tokens in the mask.

    Args:
      student: logits [B, T, V], or a `Head` that computes them. Logits at column t predict
        `tokens[:, t]`.
      tokens: int [B, T], token ids.
      mask: bool [B, T], the tokens to train on.
      row_weight: float [B], or one number for all rows; not negative.
      aggregation: how tokens are averaged: "token" (all tokens count the same), "sequence" (all
        responses count the same) or "fixed" (each response's sum is divided by `length`). See
        `token_weights`.
      length: divisor for aggregation "fixed", in tokens.
      starts: int [B, K], for rows with up to K responses each: the columns at which they begin; see
        `token_weights`. "[B]" above is then [B, K]. None: each row is one response.
      chunk: tokens that are computed at once with a `Head`. None chooses it; see `weighted_loss`.
      partition: how [B, T] is split over the mesh in context; see `weighted_loss`.

    Returns:
      A `Loss`. Its diagnostics are "loss" and "accuracy": 1 where no vocabulary entry is more
      likely than the token.

    Raises:
      ValueError: the shape of an argument is wrong, or an option is unknown.
    """
    weights, total = token_weights(
        mask, row_weight, aggregation=aggregation, length=length, starts=starts
    )
    check_tokens(tokens, mask)

    def token_loss(logits, _, tokens):
        logprobs = token_logprobs(logits, tokens)
        best = jnp.max(logits, axis=-1) - log_normaliser(logits)
        return -logprobs, {"accuracy": (logprobs >= best).astype(jnp.float32)}

    value, diagnostics = weighted_loss(
        token_loss, weights, tokens, student=student, chunk=chunk, partition=partition
    )
    return Loss(value, total, weights, diagnostics)
