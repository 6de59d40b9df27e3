"""The joint loss: a policy-gradient loss (RLVR) plus a distillation loss on the same rollouts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opsd_jax.losses.checks import Range, check_class, is_known, number
from opsd_jax.losses.fused import TokenLoss, masked_values, weighted_loss
from opsd_jax.losses.head import LogitsOrHead
from opsd_jax.losses.opsd import OPSD, Outcomes, opsd_inputs, opsd_token_loss, opsd_weights
from opsd_jax.losses.policy_gradient import PolicyGradient, policy_inputs, policy_token_loss
from opsd_jax.losses.reduction import token_weights, weighted_sum
from opsd_jax.losses.result import Loss


def joint(
    *,
    student: LogitsOrHead,
    teacher: LogitsOrHead,
    tokens: jax.Array,
    mask: jax.Array,
    advantages: jax.Array,
    outcomes: Outcomes,
    behaviour_logprobs: jax.Array,
    old_logprobs: jax.Array | None = None,
    reference_logprobs: jax.Array | None = None,
    row_weight: jax.Array | float = 1.0,
    distillation_row_weight: jax.Array | float = 1.0,
    starts: jax.Array | None = None,
    policy: PolicyGradient = PolicyGradient(),
    distillation: OPSD = OPSD(),
    policy_weight: float = 1.0,
    distillation_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    partition: P | None = None,
) -> tuple[Loss, Loss, Loss]:
    """Computes the weighted sum of the policy-gradient loss and the OPSD loss on the same rollouts.

    The weights are `policy_weight` and `distillation_weight`. Both parts are divided by the number
    of all rollouts (or of all their tokens, with aggregation "token"). A rollout that the gate
    drops counts with a divergence of 0, and a rollout with a row weight of 0 counts with a policy
    loss of 0. A batch with few correct rollouts therefore distils less. The student's logits are
    computed once for both parts.

    Args:
      student: logits [B, T, V], or a `Head` that computes them. Logits at column t predict
        `tokens[:, t]`.
      teacher: the same for the teacher, whose prompt has privileged context. It gets no gradients.
      tokens: int [B, T], the sampled token ids.
      mask: bool [B, T], the response tokens.
      advantages: float [B] or [B, T], for example `policy.advantages(rewards, group_size)`.
      outcomes: masks (correct, incorrect, truncated), bool [B] each. At most one is true for a row.
      behaviour_logprobs: float [B, T], log-probabilities of the tokens when they were sampled, at
        `temperature`.
      old_logprobs: float [B, T], the same as the trainer computes them before the first update; the
        policy ratio is relative to these, or to `behaviour_logprobs` if None.
      reference_logprobs: float [B, T], log-probabilities under the reference model; needed if
        `kl_coefficient` is not 0.
      row_weight: float [B], or one number for all rows; the row weight of the policy gradient only.
        A group of correct rollouts has no signal for the policy gradient, but OPSD can use it.
      distillation_row_weight: float [B], or one number for all rows; the row weight of OPSD only.
      starts: int [B, K], for several responses in a row; see `opsd`. "[B]" is then [B, K].
      policy: options of the policy gradient.
      distillation: options of OPSD, with the same aggregation and length.
      policy_weight, distillation_weight: weights of the two parts; not negative. They may be
        traced, for a schedule.
      temperature: divides the logits of both sides; use the temperature of the sampling.
      chunk: tokens that are computed at once with a `Head`. None chooses it; see `weighted_loss`.
      partition: how [B, T] is split over the mesh in context; see `weighted_loss`.

    Returns:
      Three `Loss`es: the objective, and for diagnostics its policy-gradient part and its OPSD part,
      as `policy_gradient` and `opsd` return them. Only the objective has gradients.

    Raises:
      ValueError: the shape of an argument is wrong, an option is invalid, an argument that the
        options need is missing, or the two aggregations differ.
    """
    _check_options(policy, distillation, policy_weight, distillation_weight)
    aggregation: Any = {"aggregation": policy.aggregation, "length": policy.length}
    of_policy = token_weights(mask, row_weight, **aggregation, starts=starts)
    _, total = token_weights(mask, **aggregation, starts=starts)
    of_opsd = opsd_weights(mask, outcomes, distillation_row_weight, distillation, starts)
    rollouts = {"tokens": tokens, "mask": mask, "starts": starts}
    rollouts["behaviour_logprobs"] = behaviour_logprobs
    computed: Any = {"chunk": chunk, "partition": partition}
    inputs = {
        "policy": policy_inputs(
            **rollouts,
            student=student,
            advantages=advantages,
            old_logprobs=old_logprobs,
            reference_logprobs=reference_logprobs,
            options=policy,
            temperature=temperature,
            **computed,
        ),
        "opsd": opsd_inputs(**rollouts, outcomes=outcomes, options=distillation),
        "weights": (of_policy[0], of_opsd[0]),
    }
    active = ((of_policy[0] != 0) | (of_opsd[0] != 0)).astype(jnp.float32)
    value, diagnostics = weighted_loss(
        _joint_token_loss(policy, distillation, policy_weight, distillation_weight, temperature),
        active,
        inputs,
        student=student,
        teacher=teacher,
        **computed,
    )
    return (
        Loss(value, total, active, {"loss": diagnostics["loss"]}),
        _part(diagnostics["policy"], *of_policy),
        _part(diagnostics["opsd"], *of_opsd),
    )


def _part(diagnostics: dict[str, jax.Array], weights, total) -> Loss:
    """Returns the policy-gradient part or the OPSD part of the joint loss, without gradients."""
    return Loss(weighted_sum(diagnostics["loss"], weights), total, weights, diagnostics)


def _check_options(
    policy: PolicyGradient, distillation: OPSD, policy_weight, distillation_weight
) -> None:
    """Raises ValueError if a weight is negative or the two losses use different aggregations."""
    check_class("policy", policy, PolicyGradient)
    check_class("distillation", distillation, OPSD)
    Range(0).check("policy_weight", policy_weight)
    Range(0).check("distillation_weight", distillation_weight)
    lengths = policy.length, distillation.length
    differ = all(map(is_known, lengths)) and number(lengths[0]) != number(lengths[1])
    if policy.aggregation != distillation.aggregation or differ:
        raise ValueError(
            f"policy has aggregation {policy.aggregation!r} and length {policy.length}, and "
            f"distillation has {distillation.aggregation!r} and {distillation.length}; expected "
            "the same values, because both parts are divided by the same number."
        )


def _joint_token_loss(
    policy: PolicyGradient,
    distillation: OPSD,
    policy_weight,
    distillation_weight,
    temperature: float,
) -> TokenLoss:
    """Returns a `TokenLoss` that computes the weighted sum of the policy-gradient and OPSD losses.

    It is for `weighted_loss`. The weights of the tokens are among its inputs, because
    the two losses weight tokens differently.
    """
    policy_loss = policy_token_loss(policy, temperature)
    opsd_loss = opsd_token_loss(distillation, temperature)

    def token_loss(student, teacher, inputs):
        of_policy, of_opsd = inputs["weights"]
        gradient, policy_diagnostics = masked_values(
            policy_loss,
            of_policy != 0,
            student_logits=student,
            teacher_logits=None,
            inputs=inputs["policy"],
        )
        divergence, opsd_diagnostics = masked_values(
            opsd_loss,
            of_opsd != 0,
            student_logits=student,
            teacher_logits=teacher,
            inputs=inputs["opsd"],
        )
        value = policy_weight * of_policy * gradient + distillation_weight * of_opsd * divergence
        return value, {"policy": policy_diagnostics, "opsd": opsd_diagnostics}

    return token_loss
