"""The policy-gradient loss, and presets of its options for GRPO and other published algorithms.

Shape suffixes: B rows, T tokens of a padded row, N the axes of responses: B, or B and K for rows
with up to K responses each.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opsd_jax.losses.advantage import BASELINES, SCALES, advantages
from opsd_jax.losses.checks import (
    OneOf,
    Range,
    check_class,
    check_mask,
    check_options,
    check_required,
    check_shape,
    check_tokens,
    debug_check,
    is_on,
)
from opsd_jax.losses.fused import TokenLoss, token_values, weighted_loss
from opsd_jax.losses.head import LogitsOrHead, stop_gradient
from opsd_jax.losses.likelihood import entropy, importance_ratio, k3, token_logprobs
from opsd_jax.losses.reduction import AGGREGATIONS, token_weights
from opsd_jax.losses.responses import check_per_response, of_tokens, sums
from opsd_jax.losses.result import Loss


class PolicyGradient(NamedTuple):
    """Options of a policy-gradient algorithm. `losses.PRESETS` holds the published algorithms.

    `baseline`, `scale` and `drop_uninformative` are used before the loss: the first two by
    `advantages`, the third by the caller, who then passes `informative(...)` as the row weight. The
    loss itself uses the other options. With r the probability ratio and A the advantage, the loss
    of a token is

    - clip "ppo": -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A);
    - clip "cispo": -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A log p;
    - clip "none": -r A, whose gradient at r = 1 is that of REINFORCE.

    Attributes:
      baseline: what the reward of a rollout is compared with: the mean of its "group" (the rollouts
        of its prompt), of the rest of the group ("leave_one_out"), or of the "batch".
      scale: standard deviation that advantages are divided by: that of the "group" or of the
        "batch"; "none" for no division.
      ratio: probability ratio of a token: its own ("token"), or the geometric mean over the
        response for all its tokens ("sequence", as in GSPO, arXiv 2507.18071, eq. 7 and 14).
      clip: how the probability ratio is bounded: "ppo" clips the loss, "cispo" clips only the
        weight of the gradient, "none" does not clip.
      clip_low: how far the ratio may fall below 1 before it is clipped; 1 for no lower bound.
      clip_high: how far the ratio may rise above 1 before it is clipped; a value above clip_low is
        DAPO's clip-higher.
      dual_clip: with clip "ppo", a token with a negative advantage A has a loss of at most this
        number times |A| (arXiv 1912.09729); above 1, or 0 for no bound.
      kl_coefficient: weight of the KL estimate k3(p || reference) that is added to each token's
        loss (beta in GRPO); 0 for no reference model.
      importance_cap: each token's loss is multiplied by min(p_old / p_behaviour, cap) if
        old_logprobs are given (truncated importance sampling); 0 for no correction.
      aggregation: how tokens are averaged: "sequence" (all responses count the same), "token" (all
        tokens count the same) or "fixed" (each response's sum is divided by length).
      length: with aggregation "fixed", the number of tokens that each response's sum is divided by.
      drop_uninformative: whether to leave out the rollouts of a prompt if all their rewards are
        equal (the dynamic sampling of DAPO).
    """

    baseline: Annotated[str, OneOf(BASELINES)] = "group"
    scale: Annotated[str, OneOf(SCALES)] = "group"
    ratio: Annotated[str, OneOf(("token", "sequence"))] = "token"
    clip: Annotated[str, OneOf(("ppo", "cispo", "none"))] = "ppo"
    clip_low: Annotated[float, Range(0)] = 0.2
    clip_high: Annotated[float, Range(0)] = 0.2
    dual_clip: Annotated[float, Range(1, or_zero=True)] = 0.0
    kl_coefficient: Annotated[float, Range(0)] = 0.0
    importance_cap: Annotated[float, Range(0)] = 2.0
    aggregation: Annotated[str, OneOf(AGGREGATIONS)] = "sequence"
    length: Annotated[float, Range(1e-6)] = 1.0
    drop_uninformative: bool = False

    def advantages(self, rewards, group_size: int):
        """Computes the advantages of rollouts with this algorithm's baseline and scale.

        Args:
          rewards: float [N]. The rollouts of one prompt are adjacent.
          group_size: rollouts per prompt; divides N.

        Returns:
          float [N], as `losses.advantages` returns them.
        """
        return advantages(rewards, group_size, baseline=self.baseline, scale=self.scale)

    def check(self) -> None:
        """Raises ValueError if an option is invalid. The message names the option."""
        check_options(self)
        if is_on(self.dual_clip) and self.clip != "ppo":
            raise ValueError(
                f"dual_clip is {self.dual_clip} with clip {self.clip!r}; expected dual_clip 0, or "
                "clip 'ppo'."
            )


PRESETS = {
    # DeepSeekMath, arXiv 2402.03300, eq. 3, with the paper's beta.
    "grpo": PolicyGradient(kl_coefficient=0.04),
    # arXiv 2503.20783. It divides neither by the standard deviation nor by the length of a
    # response. The length of 0 is invalid on purpose: set it to the longest allowed response.
    "dr_grpo": PolicyGradient(scale="none", aggregation="fixed", length=0.0),
    # arXiv 2503.14476. Its overlong penalty is `overlong_penalty`, which is added to the rewards.
    "dapo": PolicyGradient(clip_high=0.28, aggregation="token", drop_uninformative=True),
    # arXiv 2507.18071, section 5.1.
    "gspo": PolicyGradient(ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    # arXiv 2402.14740: REINFORCE on the sum over the tokens.
    "rloo": PolicyGradient(
        baseline="leave_one_out", scale="none", clip="none", aggregation="fixed"
    ),
    # arXiv 2501.03262, without the KL penalty in the reward.
    "reinforce++": PolicyGradient(baseline="batch", scale="batch", aggregation="token"),
    # MiniMax-M1, arXiv 2506.13585. The paper does not give the upper bound; TRL uses 5.
    "cispo": PolicyGradient(clip="cispo", clip_low=1.0, clip_high=4.0, aggregation="token"),
}


def policy_gradient(
    *,
    student: LogitsOrHead,
    tokens: jax.Array,
    mask: jax.Array,
    advantages: jax.Array,
    behaviour_logprobs: jax.Array,
    old_logprobs: jax.Array | None = None,
    reference_logprobs: jax.Array | None = None,
    row_weight: jax.Array | float = 1.0,
    starts: jax.Array | None = None,
    options: PolicyGradient = PolicyGradient(),
    temperature: float = 1.0,
    chunk: int | None = None,
    partition: P | None = None,
) -> Loss:
    """Computes the policy-gradient loss of sampled responses.

    With ratio "sequence" and a `Head`, the logits are computed twice in the forward pass, because
    the ratio of a response must be known before the gradient of its first token.

    Args:
      student: logits [B, T, V], or a `Head` that computes them. Logits at column t predict
        `tokens[:, t]`.
      tokens: int [B, T], the sampled token ids.
      mask: bool [B, T], the response tokens.
      advantages: float [B] or [B, T], for example `options.advantages(rewards, group_size)`.
      behaviour_logprobs: float [B, T], log-probabilities of the tokens when they were sampled, at
        `temperature`.
      old_logprobs: float [B, T], the same log-probabilities as the trainer computes them before the
        first update (see `response_logprobs`). The ratio is relative to these. If None, it is
        relative to `behaviour_logprobs`, and `importance_cap` has no effect.
      reference_logprobs: float [B, T], log-probabilities under the reference model; needed if
        `kl_coefficient` is not 0.
      row_weight: float [B], or one number for all rows; not negative. `informative(...)` drops the
        rollouts of prompts whose rewards are all equal.
      starts: int [B, K], for rows with up to K responses each: the columns at which they begin; see
        `token_weights`. "[B]" above is then [B, K]. None: each row is one response.
      options: the algorithm; see `PRESETS`.
      temperature: divides the logits; use the temperature of the sampling.
      chunk: tokens that are computed at once with a `Head`. None chooses it; see `weighted_loss`.
      partition: how [B, T] is split over the mesh in context; see `weighted_loss`.

    Returns:
      A `Loss`. Its diagnostics are "loss", "entropy" in nats, "ratio", "log_ratio" (of the
      token, even if "ratio" is of the response), "clipped" (1 where the ratio is out of bounds),
      "kl" (k3, with a reference) and "importance" (the factor, with `old_logprobs`).

    Raises:
      ValueError: the shape of an argument is wrong, an option is invalid, or `reference_logprobs`
        is missing.
    """
    inputs = policy_inputs(
        student=student,
        tokens=tokens,
        mask=mask,
        advantages=advantages,
        behaviour_logprobs=behaviour_logprobs,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        starts=starts,
        options=options,
        temperature=temperature,
        chunk=chunk,
        partition=partition,
    )
    weights, total = token_weights(
        mask, row_weight, aggregation=options.aggregation, length=options.length, starts=starts
    )
    token_loss = policy_token_loss(options, temperature)
    value, diagnostics = weighted_loss(
        token_loss, weights, inputs, student=student, chunk=chunk, partition=partition
    )
    return Loss(value, total, weights, diagnostics)


def response_logprobs(
    *,
    student: LogitsOrHead,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: float = 1.0,
    chunk: int | None = None,
    partition: P | None = None,
) -> jax.Array:
    """Computes the student's log-probability of each response token.

    Use it for `old_logprobs` and `reference_logprobs` of `policy_gradient`. The result is
    differentiable, so you can also use it in an objective of your own.

    Args:
      student: logits [B, T, V], or a `Head` that computes them. Logits at column t predict
        `tokens[:, t]`.
      tokens: int [B, T], token ids.
      mask: bool [B, T], the response tokens.
      temperature: divides the logits; above 0.
      chunk: tokens that are computed at once with a `Head`. None chooses it; see `weighted_loss`.
      partition: how [B, T] is split over the mesh in context; see `weighted_loss`.

    Returns:
      float32 [B, T], in nats; 0 where the mask is false.

    Raises:
      ValueError: the shape of an argument is wrong.
    """
    mask = check_mask(mask)
    check_tokens(tokens, mask)
    return token_values(
        lambda logits, _, tokens: (token_logprobs(logits, tokens, temperature), {}),
        mask,
        tokens,
        student=student,
        chunk=chunk,
        partition=partition,
    )


def policy_inputs(
    *,
    student,
    tokens,
    mask,
    advantages,
    behaviour_logprobs,
    old_logprobs,
    reference_logprobs,
    starts,
    options: PolicyGradient,
    temperature,
    chunk,
    partition,
) -> dict[str, jax.Array]:
    """Checks arguments of `policy_gradient`, and returns the `inputs` of `policy_token_loss`."""
    check_class("options", options, PolicyGradient)
    options.check()
    mask = check_mask(mask)
    check_tokens(tokens, mask)
    check_required(advantages=advantages, behaviour_logprobs=behaviour_logprobs)
    check_shape(
        mask.shape,
        "the shape of mask",
        behaviour_logprobs=behaviour_logprobs,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
    )
    advantages_BxT = _per_token(advantages, mask, starts)
    if is_on(options.kl_coefficient) and reference_logprobs is None:
        raise ValueError(
            f"reference_logprobs is None with kl_coefficient {options.kl_coefficient}; expected "
            "the reference model's log-probabilities [rows, tokens], or kl_coefficient 0."
        )
    _check_values(mask, advantages_BxT, behaviour_logprobs)
    inputs = {
        "tokens": tokens,
        "advantages": advantages_BxT,
        "old": behaviour_logprobs if old_logprobs is None else old_logprobs,
    }
    if old_logprobs is not None and is_on(options.importance_cap):
        mismatch = importance_ratio(old_logprobs - behaviour_logprobs)
        inputs["importance"] = jnp.minimum(mismatch, options.importance_cap)
    if reference_logprobs is not None:
        inputs["reference"] = reference_logprobs
    if options.ratio == "sequence":
        logprobs_BxT = response_logprobs(
            student=stop_gradient(student),
            tokens=tokens,
            mask=mask,
            temperature=temperature,
            chunk=chunk,
            partition=partition,
        )
        gap_BxT = jnp.where(mask, logprobs_BxT - inputs["old"], 0.0)
        mean_N = sums(gap_BxT, starts) / jnp.maximum(sums(mask, starts), 1)
        inputs["sequence_log_ratio"] = of_tokens(mean_N, starts, mask.shape[1])
    return inputs


def _per_token(advantages, mask: jax.Array, starts) -> jax.Array:
    """Returns the advantages as [B, T]. The number of a response is copied to its tokens.

    With `starts`, an array [B, K] has one number per response, even if K is T.
    """
    if jnp.ndim(advantages) == 1 or (
        starts is not None and jnp.shape(advantages) == jnp.shape(starts)
    ):
        check_per_response(mask, starts, advantages=advantages)
        advantages = of_tokens(jnp.asarray(advantages), starts, mask.shape[1])
    expected = "the shape of mask, or one number for each " + (
        "row" if starts is None else "of its responses, the shape of starts"
    )
    check_shape(mask.shape, expected, advantages=advantages)
    return advantages


def _check_values(mask, advantages_BxT, behaviour_logprobs_BxT) -> None:
    """Checks that the advantages and log-probabilities are valid where `mask` is true.

    The checks have no effect outside `checkify`.
    """
    debug_check(
        jnp.all(jnp.where(mask, jnp.isfinite(advantages_BxT), True)),
        "advantages are not finite somewhere; expected no NaN or infinity.",
    )
    valid = jnp.isfinite(behaviour_logprobs_BxT) & (behaviour_logprobs_BxT < 1e-4)
    debug_check(
        jnp.all(jnp.where(mask, valid, True)),
        "behaviour_logprobs are above 0, or not finite, somewhere; expected log-probabilities.",
    )


def policy_token_loss(options: PolicyGradient, temperature: float) -> TokenLoss:
    """Returns a `TokenLoss`, for `weighted_loss`, that computes the policy-gradient loss."""

    def token_loss(logits, _, inputs):
        logprobs = token_logprobs(logits, inputs["tokens"], temperature)
        log_ratio = token_log_ratio = logprobs - inputs["old"]
        if "sequence_log_ratio" in inputs:
            # The value comes from the whole response, and the gradient from this token.
            zero = logprobs - jax.lax.stop_gradient(logprobs)
            log_ratio = inputs["sequence_log_ratio"] + zero
        ratio = importance_ratio(log_ratio)
        advantages = inputs["advantages"]
        low, high = 1 - options.clip_low, 1 + options.clip_high
        clipped = jnp.clip(ratio, low, high)
        if options.clip == "ppo":
            loss = -jnp.minimum(ratio * advantages, clipped * advantages)
        elif options.clip == "cispo":
            loss = -jax.lax.stop_gradient(clipped) * advantages * logprobs
        else:
            loss = -ratio * advantages
        if is_on(options.dual_clip):
            bound = -options.dual_clip * advantages
            loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
        diagnostics = {
            "entropy": jax.lax.stop_gradient(entropy(logits, temperature)),
            "ratio": ratio,
            "log_ratio": token_log_ratio,
            "clipped": ((ratio < low) | (ratio > high)).astype(jnp.float32),
        }
        if "importance" in inputs:
            loss *= inputs["importance"]
            diagnostics["importance"] = inputs["importance"]
        if "reference" in inputs:
            diagnostics["kl"] = k3(inputs["reference"] - logprobs)
            if is_on(options.kl_coefficient):
                loss += options.kl_coefficient * diagnostics["kl"]
        return loss, diagnostics

    return token_loss
