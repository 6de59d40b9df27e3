"""Policy gradient with verifiable rewards: one loss of few parts, and the algorithms as presets."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

from opsd_jax.losses.advantage import BASELINES, SCALES, advantages
from opsd_jax.losses.checks import check_mask, check_option, check_range, check_shape
from opsd_jax.losses.fused import Scores, TokenLoss, token_values, weighted_loss
from opsd_jax.losses.likelihood import entropy, importance_ratio, token_logprobs
from opsd_jax.losses.reduction import AGGREGATIONS, token_weights
from opsd_jax.losses.result import Loss


class PolicyGradient(NamedTuple):
    """The parts of a policy-gradient algorithm; `PRESETS` has the published combinations.

    `baseline`, `scale` and `drop_uninformative` say how rewards become advantages and which rows to
    train on, before the loss: see `advantages` below and `informative`. The others are the loss's.

    With r the ratio of the new to the old probability and A the advantage, a token's loss is

    - clip "ppo": -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A);
    - clip "cispo": -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A log p;
    - clip "none": -r A, whose gradient at r = 1 is REINFORCE's.

    Attributes:
      baseline, scale: of `advantages`.
      ratio: "token", or "sequence": the geometric mean over the response's tokens, one for all of
        them, with the gradient of GSPO (arXiv 2507.18071, eq. 7 and 14).
      clip: see above.
      clip_low, clip_high: how far r may fall below and rise above 1 (unequal: DAPO's clip-higher);
        a clip_low of 1 is no lower bound.
      dual_clip: of "ppo": where A < 0 the loss is at most this times |A| (arXiv 1912.09729); above
        1, or 0 for none.
      kl_coefficient: of k3(p || reference) added to each token's loss (GRPO's beta).
      importance_cap: of the factor min(p_old / p_behaviour, cap) on each token's loss, where the
        sampler's probabilities are not quite the trainer's (truncated importance sampling); 0 for
        no such factor.
      aggregation, length: of `token_weights`.
      drop_uninformative: groups whose rewards are all alike are left out (DAPO's dynamic sampling):
        give `informative(...)` as the row weight, as the RLVR stage does.
    """

    baseline: str = "group"
    scale: str = "group"
    ratio: str = "token"
    clip: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coefficient: float = 0.0
    importance_cap: float = 2.0
    aggregation: str = "sequence"
    length: float = 1.0
    drop_uninformative: bool = False

    def advantages(self, rewards, group_size: int):
        """`losses.advantages` with this algorithm's baseline and scale."""
        return advantages(rewards, group_size, baseline=self.baseline, scale=self.scale)

    def check(self) -> None:
        """Raises ValueError that names the part and what was expected."""
        check_option("baseline", self.baseline, BASELINES)
        check_option("scale", self.scale, SCALES)
        check_option("aggregation", self.aggregation, AGGREGATIONS)
        if self.aggregation == "fixed":
            check_range("length", self.length, 1e-6)
        check_option("ratio", self.ratio, ("token", "sequence"))
        check_option("clip", self.clip, ("ppo", "cispo", "none"))
        check_range("clip_low", self.clip_low, 0)
        check_range("clip_high", self.clip_high, 0)
        check_range("dual_clip", self.dual_clip, 1 if self.dual_clip else 0)
        if self.dual_clip and self.clip != "ppo":
            raise ValueError(f"dual_clip is {self.dual_clip} with clip {self.clip!r}; expected 0.")
        check_range("kl_coefficient", self.kl_coefficient, 0)
        check_range("importance_cap", self.importance_cap, 0)


PRESETS = {
    # DeepSeekMath, arXiv 2402.03300, eq. 3, with its beta
    "grpo": PolicyGradient(kl_coefficient=0.04),
    # arXiv 2503.20783: neither 1/std nor 1/|o|; set `length` to the budget of a response
    "dr_grpo": PolicyGradient(scale="none", aggregation="fixed", length=0.0),
    # arXiv 2503.14476; its overlong punishment is `overlong_penalty`, on the rewards
    "dapo": PolicyGradient(clip_high=0.28, aggregation="token", drop_uninformative=True),
    # arXiv 2507.18071, section 5.1
    "gspo": PolicyGradient(ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    # arXiv 2402.14740: plain REINFORCE on the sum over tokens
    "rloo": PolicyGradient(
        baseline="leave_one_out", scale="none", clip="none", aggregation="fixed"
    ),
    # arXiv 2501.03262, without its KL in the reward
    "reinforce++": PolicyGradient(baseline="batch", scale="batch", aggregation="token"),
    # MiniMax-M1, arXiv 2506.13585; for the upper bound, which it does not give, 5 as in TRL
    "cispo": PolicyGradient(clip="cispo", clip_low=1.0, clip_high=4.0, aggregation="token"),
}


def policy_gradient(
    *,
    student: Scores,
    tokens: jax.Array,
    mask: jax.Array,
    advantages: jax.Array,
    behaviour_logprobs: jax.Array,
    old_logprobs: jax.Array | None = None,
    reference_logprobs: jax.Array | None = None,
    row_weight: jax.Array | float = 1.0,
    options: PolicyGradient = PolicyGradient(),
    temperature: float = 1.0,
    chunk: int | None = None,
    partition: P | None = None,
) -> Loss:
    """The loss of `PolicyGradient` on sampled responses.

    With a ratio of "sequence" from a `Head`, the head is multiplied twice forward: each response's
    ratio must be known before the gradient of its first token.

    Args:
      student: logits [B, T, V] or a `Head`; those at t predict `tokens[:, t]`.
      tokens: int [B, T], as sampled.
      mask: bool [B, T], the response's tokens.
      advantages: float [B], or [B, T]; of `options.advantages(rewards, group_size)`.
      behaviour_logprobs: [B, T], of the tokens when they were sampled, at `temperature`.
      old_logprobs: [B, T], the same as the trainer computes them, before the first update; the
        ratio is to these. By default, to `behaviour_logprobs`, and then there is nothing for
        `importance_cap` to correct.
      reference_logprobs: [B, T], under the reference model; for `kl_coefficient`.
      row_weight: see `token_weights`; for instance `informative(...)`.
      options: the algorithm.
      temperature: that of the sampling: ratios compare the distributions sampled from.
      chunk, partition: see `weighted_loss`.

    Returns:
      A `Loss` with, in `tokens`: "loss", "entropy" in nats, "ratio", "clipped" (1 where the ratio
      is outside its bounds), "kl" (k3, if there is a reference) and "importance" (the factor, if
      there are `old_logprobs`).

    Raises:
      ValueError: a shape, an option, or a reference that is missing; names it.
    """
    inputs = policy_inputs(
        student=student,
        tokens=tokens,
        mask=mask,
        advantages=advantages,
        behaviour_logprobs=behaviour_logprobs,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        options=options,
        temperature=temperature,
        chunk=chunk,
        partition=partition,
    )
    weights, total = token_weights(
        mask, row_weight, aggregation=options.aggregation, length=options.length
    )
    token_loss = policy_token_loss(options, temperature)
    value, said = weighted_loss(
        token_loss, weights, inputs, student=student, chunk=chunk, partition=partition
    )
    return Loss(value, total, weights, said)


def response_logprobs(
    *,
    student: Scores,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: float = 1.0,
    chunk: int | None = None,
    partition: P | None = None,
) -> jax.Array:
    """log p(token), float32 [B, T], 0 where the mask is false; differentiable (`token_values`).

    For `old_logprobs` and `reference_logprobs`, and for objectives of one's own. Arguments as in
    `policy_gradient`.
    """
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
    options: PolicyGradient,
    temperature,
    chunk,
    partition,
) -> dict[str, jax.Array]:
    """The arrays [B, T] that `policy_token_loss` reads; arguments as in `policy_gradient`."""
    if not isinstance(options, PolicyGradient):
        raise ValueError(f"options is {options!r}; expected a PolicyGradient, or one of PRESETS.")
    options.check()
    mask = check_mask(mask)
    shape = mask.shape
    check_shape(
        shape,
        "the shape of mask",
        tokens=tokens,
        behaviour_logprobs=behaviour_logprobs,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
    )
    if jnp.ndim(advantages) == 1:
        check_shape(shape[:1], "a number a row of mask", advantages=advantages)
        advantages = jnp.broadcast_to(jnp.asarray(advantages)[:, None], shape)
    check_shape(shape, "the shape of mask, or a number a row", advantages=advantages)
    if options.kl_coefficient and reference_logprobs is None:
        raise ValueError(
            f"kl_coefficient is {options.kl_coefficient} and reference_logprobs is None; expected "
            "the reference's log-probabilities [rows, tokens], or a coefficient of 0."
        )
    checkify.debug_check(
        jnp.all(jnp.where(mask, jnp.isfinite(advantages), True)), "advantages are not finite."
    )
    checkify.debug_check(
        jnp.all(jnp.where(mask, jnp.isfinite(behaviour_logprobs) & (behaviour_logprobs < 1e-4), 1)),
        "behaviour_logprobs are above 0, or not finite.",
    )
    inputs = {
        "tokens": tokens,
        "advantages": advantages,
        "old": behaviour_logprobs if old_logprobs is None else old_logprobs,
    }
    if old_logprobs is not None and options.importance_cap:
        mismatch = importance_ratio(old_logprobs - behaviour_logprobs)
        inputs["importance"] = jnp.minimum(mismatch, options.importance_cap)
    if reference_logprobs is not None:
        inputs["reference"] = reference_logprobs
    if options.ratio == "sequence":
        logprobs = response_logprobs(
            student=jax.lax.stop_gradient(student),
            tokens=tokens,
            mask=mask,
            temperature=temperature,
            chunk=chunk,
            partition=partition,
        )
        gap = jnp.where(mask, logprobs - inputs["old"], 0.0)
        mean = jnp.sum(gap, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
        inputs["sequence_log_ratio"] = jnp.broadcast_to(mean[:, None], shape)
    return inputs


def policy_token_loss(options: PolicyGradient, temperature: float) -> TokenLoss:
    """The loss of a token, for `weighted_loss`."""

    def token_loss(logits, _, inputs):
        logprobs = token_logprobs(logits, inputs["tokens"], temperature)
        log_ratio = logprobs - inputs["old"]
        if "sequence_log_ratio" in inputs:  # the response's value, with this token's gradient
            nothing = logprobs - jax.lax.stop_gradient(logprobs)
            log_ratio = inputs["sequence_log_ratio"] + nothing
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
        if options.dual_clip:
            most = -options.dual_clip * advantages
            loss = jnp.where(advantages < 0, jnp.minimum(loss, most), loss)
        said = {
            "entropy": jax.lax.stop_gradient(entropy(logits, temperature)),
            "ratio": ratio,
            "clipped": ((ratio < low) | (ratio > high)).astype(jnp.float32),
        }
        if "importance" in inputs:
            loss *= inputs["importance"]
            said["importance"] = inputs["importance"]
        if "reference" in inputs:
            gap = inputs["reference"] - logprobs
            said["kl"] = jnp.expm1(gap) - gap
            if options.kl_coefficient:
                loss += options.kl_coefficient * said["kl"]
        return loss, said

    return token_loss
