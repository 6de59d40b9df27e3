"""RLVR and OPSD in one step: policy gradient on all rollouts, distillation on those of the gate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opsd_jax.losses.checks import check_range
from opsd_jax.losses.fused import Scores, weighted_loss, where_live
from opsd_jax.losses.opsd import OPSD, Groups, opsd_inputs, opsd_token_loss, opsd_weights
from opsd_jax.losses.policy_gradient import PolicyGradient, policy_inputs, policy_token_loss
from opsd_jax.losses.reduction import token_weights, weighted_sum
from opsd_jax.losses.result import Loss


def joint(
    *,
    student: Scores,
    teacher: Scores,
    tokens: jax.Array,
    mask: jax.Array,
    advantages: jax.Array,
    groups: Groups,
    behaviour_logprobs: jax.Array,
    old_logprobs: jax.Array | None = None,
    reference_logprobs: jax.Array | None = None,
    row_weight: jax.Array | float = 1.0,
    distillation_row_weight: jax.Array | float = 1.0,
    policy: PolicyGradient = PolicyGradient(),
    distillation: OPSD = OPSD(),
    policy_weight: float = 1.0,
    distillation_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    partition: P | None = None,
) -> tuple[Loss, Loss, Loss]:
    """policy_weight * policy gradient + distillation_weight * OPSD, on the same rollouts.

    Both are divided by the number of *all* rollouts (or of all their tokens): one behind the gate
    counts with a distillation of 0, one with a row weight of 0 with a loss of 0. So a batch in
    which few are correct distils less, and the sum has one normaliser. The student's head is
    multiplied once for both.

    Args:
      student, tokens, mask, advantages, behaviour_logprobs, old_logprobs, reference_logprobs,
        row_weight: as in `policy_gradient`, of which the row weight is alone: an all-correct group
        has no signal for it, and is what OPSD wants.
      teacher, groups, distillation_row_weight: as in `opsd`.
      policy: of the policy gradient.
      distillation: of OPSD, with the same aggregation and length.
      policy_weight, distillation_weight: not negative; may be traced, for a schedule.
      temperature, chunk, partition: of both.

    Returns:
      Three `Loss`es: the objective, and for diagnostics the policy gradient and the OPSD loss, as
      `policy_gradient` and `opsd` return them, but without gradients.

    Raises:
      ValueError: as these two; or their aggregations differ.
    """
    check_range("policy_weight", policy_weight, 0)
    check_range("distillation_weight", distillation_weight, 0)
    ways = [(o.aggregation, o.length) for o in (policy, distillation)]
    if ways[0] != ways[1]:
        raise ValueError(
            f"policy aggregates by {ways[0]} and distillation by {ways[1]} (aggregation, length); "
            "expected the same, since the sum has one normaliser."
        )
    weights, total = token_weights(
        mask, row_weight, aggregation=policy.aggregation, length=policy.length
    )
    _, everything = token_weights(mask, aggregation=policy.aggregation, length=policy.length)
    opsd_weight, opsd_total = opsd_weights(mask, groups, distillation_row_weight, distillation)
    inputs = {
        "policy": policy_inputs(
            student=student,
            tokens=tokens,
            mask=mask,
            advantages=advantages,
            behaviour_logprobs=behaviour_logprobs,
            old_logprobs=old_logprobs,
            reference_logprobs=reference_logprobs,
            options=policy,
            temperature=temperature,
            chunk=chunk,
            partition=partition,
        ),
        "opsd": opsd_inputs(mask, groups, tokens, behaviour_logprobs, distillation),
        "weights": (weights, opsd_weight),
    }
    policy_loss = policy_token_loss(policy, temperature)
    opsd_loss = opsd_token_loss(distillation, temperature)

    def token_loss(student, teacher, inputs):
        of_policy, of_opsd = inputs["weights"]
        gradient, said = where_live(policy_loss, of_policy != 0, student, None, inputs["policy"])
        divergence, more = where_live(opsd_loss, of_opsd != 0, student, teacher, inputs["opsd"])
        value = policy_weight * of_policy * gradient + distillation_weight * of_opsd * divergence
        return value, {"policy": said, "opsd": more}

    live = ((weights != 0) | (opsd_weight != 0)).astype(jnp.float32)
    value, said = weighted_loss(
        token_loss,
        live,
        inputs,
        student=student,
        teacher=teacher,
        chunk=chunk,
        partition=partition,
    )

    def part(name: str, weights, total) -> Loss:
        return Loss(weighted_sum(said[name]["loss"], weights), total, weights, said[name])

    return (
        Loss(value, everything, live, {"loss": said["loss"]}),
        part("policy", weights, total),
        part("opsd", opsd_weight, opsd_total),
    )
