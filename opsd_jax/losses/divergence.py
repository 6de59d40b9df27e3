"""Divergences between two distributions over the vocabulary, per token and unreduced.

Logits and all that follows are float32. Where a word is impossible for the student (logit -inf: a
padded vocabulary, a forbidden token) its term is 0 and its gradients are 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reverse_kl(*, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """KL(S || T) = sum_v S(v) (log S(v) - log T(v)), the divergence of arXiv 2605.06188, eq. 1.

    Gradients flow into both arguments: stop them on the teacher's side.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].

    Returns:
      float32 [...]; +inf where the teacher rules out a word that the student does not.

    Raises:
      ValueError: the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits{list(student_logits.shape)} and teacher_logits"
            f"{list(teacher_logits.shape)} differ: they score the same tokens over one vocabulary."
        )
    log_s = jax.nn.log_softmax(student_logits.astype(jnp.float32))
    log_t = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
    possible = log_s > -jnp.inf
    # `where` on the inputs too: 0 * inf in the branch not taken would still make NaN gradients.
    log_s, log_t = jnp.where(possible, log_s, 0.0), jnp.where(possible, log_t, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(log_s) * (log_s - log_t), 0.0), axis=-1)
