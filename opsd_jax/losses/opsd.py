"""The OPSD loss: a gated divergence between student and teacher on the student's own responses.

Shape suffixes: B rows, T tokens of a padded row, V vocabulary size, N the axes of responses: B, or
B and K for rows with up to K responses each.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

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
from opsd_jax.losses.divergence import DIVERGENCES, RESTS, SUPPORTS, top_k
from opsd_jax.losses.fused import TokenLoss, masked_values, weighted_loss
from opsd_jax.losses.gate import gate_weights
from opsd_jax.losses.head import LogitsOrHead
from opsd_jax.losses.likelihood import at_temperature, importance_ratio, token_logprobs
from opsd_jax.losses.reduction import (
    AGGREGATIONS,
    POSITIONS,
    position_weights,
    token_weights,
)
from opsd_jax.losses.responses import check_per_response, check_row_weight, of_tokens, positions
from opsd_jax.losses.result import Loss

# Masks correct, incorrect and truncated: bool [B] each, or [B, K] with `starts`.
Outcomes = tuple[jax.Array, jax.Array, jax.Array]


class OPSD(NamedTuple):
    """Options of the OPSD loss. The defaults are the Correct-only setting of arXiv 2605.06188.

    Attributes:
      gate: weights of correct, incorrect and truncated rollouts in the loss, in this order;
        `losses.GATES` has the choices of the paper.
      divergence: divergence of the student from the teacher: "reverse_kl", "forward_kl", "jsd",
        "skewed_kl", "sampled_kl" or another name in `losses.DIVERGENCES` (in a config also
        "package.module:function"); or three names separated by commas, for correct, incorrect and
        truncated rollouts.
      beta: weight of the teacher in the mixture of divergence "jsd", from 0 (defined as the forward
        KL) to 1 (defined as the reverse KL).
      alpha: weight of the teacher in the target of divergence "skewed_kl", above 0 and at most 1.
      control_variate: whether divergence "sampled_kl" adds the full reverse KL to its advantage,
        which reduces the variance of the gradient.
      top_k: number of most likely vocabulary entries that the divergence compares; 0 for the whole
        vocabulary.
      support: with top_k, the model whose most likely entries are compared: "teacher", "student",
        or "union" for the entries of both.
      rest: with top_k, what happens to the probability of the other entries: "bucket" makes it one
        more entry, "renormalise" scales the kept probabilities to a sum of 1.
      clip: bound on the absolute value of each token's divergence, whose gradient is scaled down by
        the same factor; 0 for no bound.
      importance_cap: if above 0, each token's loss is multiplied by min(p / p_behaviour, cap),
        which corrects for rollouts from older parameters (SDPO uses 2); 0 for no correction.
      skip_first: number of tokens at the start of each response that are left out of the loss.
      first_only: if above 0, only this many tokens at the start of each response are in the loss
        (ESR, arXiv 2605.27028); 0 for all tokens.
      position: how the weight of a token depends on its place in the response: "uniform", "linear",
        "exponential" or "sigmoid".
      late: with position "linear", weight of the last token relative to the first.
      rate: with position "exponential", logarithm of the weight of the last token relative to the
        first; negative values favour early tokens.
      floor: with position "sigmoid", lowest weight relative to the highest, in [0, 1].
      centre: with position "sigmoid", place of the middle of the transition, as a fraction of the
        response.
      width: with position "sigmoid", width of the transition, as a fraction of the response.
      aggregation: how tokens are averaged: "sequence" (all responses count the same), "token" (all
        tokens count the same) or "fixed" (each response's sum is divided by length).
      length: with aggregation "fixed", the number of tokens that each response's sum is divided by.
    """

    gate: tuple[float, float, float] = (1.0, 0.0, 0.0)
    divergence: Annotated[str, OneOf(DIVERGENCES, several=3)] = "reverse_kl"
    beta: Annotated[float, Range(0, 1)] = 0.5
    alpha: Annotated[float, Range(1e-6, 1)] = 0.2
    control_variate: bool = False
    top_k: Annotated[int, Range(0)] = 0
    support: Annotated[str, OneOf(SUPPORTS)] = "teacher"
    rest: Annotated[str, OneOf(RESTS)] = "bucket"
    clip: Annotated[float, Range(0)] = 0.0
    importance_cap: Annotated[float, Range(0)] = 0.0
    skip_first: Annotated[int, Range(0)] = 0
    first_only: Annotated[int, Range(0)] = 0
    position: Annotated[str, OneOf(POSITIONS)] = "uniform"
    late: Annotated[float, Range(0)] = 2.0
    rate: float = 2.0
    floor: Annotated[float, Range(0, 1)] = 0.25
    centre: float = 0.3
    width: Annotated[float, Range(1e-6)] = 0.1
    aggregation: Annotated[str, OneOf(AGGREGATIONS)] = "sequence"
    length: Annotated[float, Range(1e-6)] = 1.0

    @property
    def divergences(self) -> tuple[str, ...]:
        """The names of the divergences for correct, incorrect and truncated rollouts, in order."""
        names = tuple(name.strip() for name in self.divergence.split(","))
        return names * 3 if len(names) == 1 else names

    @property
    def needs_tokens(self) -> bool:
        """Whether any of the divergences takes the sampled tokens as an argument."""
        return any("tokens" in _parameters(name) for name in self.divergences)

    def check(self) -> None:
        """Raises ValueError if an option is invalid. The message names the option."""
        if isinstance(self.gate, str) or len(self.gate) != 3:
            raise ValueError(
                f"gate is {self.gate!r}; expected weights (correct, incorrect, truncated), such as "
                "GATES['correct'] or parse_gate('1,0.5,0')."
            )
        for weight in self.gate:
            Range(0).check("gate", weight)
        check_options(self)
        if self.top_k and self.needs_tokens:
            raise ValueError(
                f"top_k is {self.top_k} with divergence {self.divergence!r}, which uses only the "
                "sampled tokens; expected top_k = 0."
            )
        if 0 < self.first_only <= self.skip_first:
            raise ValueError(
                f"first_only is {self.first_only} and skip_first is {self.skip_first}, which "
                "leaves no tokens; expected first_only = 0, or a value greater than skip_first."
            )


def opsd(
    *,
    student: LogitsOrHead,
    teacher: LogitsOrHead,
    mask: jax.Array,
    outcomes: Outcomes,
    tokens: jax.Array | None = None,
    behaviour_logprobs: jax.Array | None = None,
    row_weight: jax.Array | float = 1.0,
    starts: jax.Array | None = None,
    options: OPSD = OPSD(),
    temperature: float = 1.0,
    chunk: int | None = None,
    partition: P | None = None,
) -> Loss:
    """Computes the on-policy self-distillation (OPSD) loss, weighted by each rollout's outcome.

    The student and the teacher both score the B responses that the student sampled. The student
    sees its own prompt. The teacher sees a prompt with privileged context. Column t of `student`,
    `teacher`, `mask` and `tokens` belongs to the same response token, even though the two prompts
    have different lengths.

    Args:
      student: logits [B, T, V], or a `Head` that computes them. Logits at column t predict the
        response token t.
      teacher: the same for the teacher. It gets no gradients. If it equals the student, the loss is
        exactly 0.
      mask: bool [B, T], the response tokens. A sampled end-of-sequence token is one of them.
      outcomes: masks (correct, incorrect, truncated), bool [B] each. At most one is true for a row.
        A row with no outcome has weight 0.
      tokens: int [B, T], response token ids; needed for divergence "sampled_kl" and for
        `importance_cap`.
      behaviour_logprobs: float [B, T], log-probabilities of the tokens when they were sampled, at
        `temperature`; needed for `importance_cap`.
      row_weight: float [B], or one number for all rows; not negative. It multiplies the weight of
        the gate. Use 0 for rows without a usable context, for example.
      starts: int [B, K], for rows with up to K responses each: the columns at which they begin; see
        `token_weights`. "[B]" above is then [B, K]. None: each row is one response.
      options: the divergence, the gate and the weights of tokens.
      temperature: divides the logits of both sides; use the temperature of the sampling.
      chunk: tokens that are computed at once with a `Head`. None chooses it; see `weighted_loss`.
      partition: how [B, T] is split over the mesh in context; see `weighted_loss`.

    Returns:
      A `Loss`. Its diagnostics are "loss", "divergence" (before the clip and the importance weight)
      and, with an `importance_cap`, "importance" and "log_ratio" (log p - log p_behaviour).

    Raises:
      ValueError: the shape of an argument is wrong, an option is invalid, or an argument that the
        options need is missing.

    Reference: OPSD (arXiv 2605.06188), eq. 1.
    """
    check_class("options", options, OPSD)
    if teacher is None:
        raise ValueError("teacher is None; expected logits or a Head.")
    weights, total = opsd_weights(mask, outcomes, row_weight, options, starts)
    inputs = opsd_inputs(
        mask=mask,
        outcomes=outcomes,
        tokens=tokens,
        behaviour_logprobs=behaviour_logprobs,
        starts=starts,
        options=options,
    )
    value, diagnostics = weighted_loss(
        opsd_token_loss(options, temperature),
        weights,
        inputs,
        student=student,
        teacher=teacher,
        chunk=chunk,
        partition=partition,
    )
    debug_check(
        jnp.all(jnp.isfinite(diagnostics["divergence"])),
        "the divergence is not finite somewhere; check the teacher's logits for NaN and infinity.",
    )
    return Loss(value, total, weights, diagnostics)


def opsd_weights(
    mask, outcomes: Outcomes, row_weight, options: OPSD, starts=None
) -> tuple[jax.Array, jax.Array]:
    """Computes the weight of each token in the OPSD loss, and the number to divide the loss by.

    The weights combine the gate, the row weights, the weights by position and the aggregation.

    Args:
      mask, outcomes, row_weight, options, starts: the arguments of `opsd`.

    Returns:
      `(weights, total)`: float32 [B, T] and a float32 scalar.
    """
    options.check()
    mask = check_mask(mask)
    check_required("(correct, incorrect, truncated)", outcomes=outcomes)
    if len(outcomes) != 3:
        raise ValueError(
            f"outcomes has {len(outcomes)} masks; expected 3 (correct, incorrect, truncated)."
        )
    check_row_weight(row_weight, mask, starts)
    named = dict(zip(("correct", "incorrect", "truncated"), outcomes, strict=True))
    check_required("[rows]", **named)
    check_per_response(mask, starts, **named)
    debug_check(
        jnp.all(sum(jnp.asarray(outcome, jnp.int32) for outcome in outcomes) <= 1),
        "outcomes are not disjoint; expected each rollout to be at most one of correct, incorrect "
        "and truncated.",
    )
    position_BxT = positions(mask, starts)
    window_BxT = mask & (position_BxT >= options.skip_first)
    if options.first_only:
        window_BxT &= position_BxT < options.first_only
    by_position_BxT = position_weights(
        window_BxT,
        options.position,
        late=options.late,
        rate=options.rate,
        floor=options.floor,
        centre=options.centre,
        width=options.width,
        starts=starts,
    )
    return token_weights(
        window_BxT,
        gate_weights(*outcomes, options.gate) * jnp.asarray(row_weight, jnp.float32),
        aggregation=options.aggregation,
        length=options.length,
        position_weights=by_position_BxT,
        starts=starts,
    )


def opsd_inputs(
    *, mask, outcomes: Outcomes, tokens, behaviour_logprobs, starts, options: OPSD
) -> dict[str, Any]:
    """Checks the per-token arrays of the OPSD loss, and returns the arrays that `options` needs.

    The arguments are described in `opsd`. The result is the argument `inputs` of `opsd_token_loss`.
    """
    if tokens is not None:
        check_tokens(tokens, mask)
    check_shape(mask.shape, "the shape of mask", behaviour_logprobs=behaviour_logprobs)
    inputs = {}
    if len(set(options.divergences)) > 1:
        outcome_N = jnp.argmax(jnp.stack(outcomes), axis=0)
        inputs["outcome"] = of_tokens(outcome_N, starts, mask.shape[1])
    if is_on(options.importance_cap) or options.needs_tokens:
        inputs["tokens"] = _required("tokens", tokens, options)
    if is_on(options.importance_cap):
        inputs["behaviour"] = _required("behaviour_logprobs", behaviour_logprobs, options)
    return inputs


def _required(name: str, array, options: OPSD):
    """Returns `array`, or raises a ValueError that names the argument if `array` is None."""
    if array is None:
        raise ValueError(
            f"{name} is None; expected an array [rows, tokens], because divergence is "
            f"{options.divergence!r} and importance_cap is {options.importance_cap}."
        )
    return array


def opsd_token_loss(options: OPSD, temperature: float) -> TokenLoss:
    """Returns a `TokenLoss`, for `weighted_loss`, that computes the OPSD loss."""

    def token_loss(student, teacher, inputs):
        student, teacher = (at_temperature(logits, temperature) for logits in (student, teacher))
        if "outcome" not in inputs:
            values, _ = _divergence_loss(options.divergences[0], options)(student, teacher, inputs)
        else:
            values = _divergence_by_outcome(options, student, teacher, inputs)
        diagnostics = {"divergence": values}
        if is_on(options.clip):
            # This bounds the sum over the vocabulary. A bound on the term of each entry could make
            # a divergence negative.
            size = jax.lax.stop_gradient(jnp.abs(values))
            values *= options.clip / jnp.maximum(size, options.clip)
        if "behaviour" in inputs:
            logprobs = jax.lax.stop_gradient(token_logprobs(student, inputs["tokens"]))
            diagnostics["log_ratio"] = logprobs - inputs["behaviour"]
            ratio = importance_ratio(diagnostics["log_ratio"])
            diagnostics["importance"] = jnp.minimum(ratio, options.importance_cap)
            values *= diagnostics["importance"]
        return values, diagnostics

    return token_loss


def _divergence_by_outcome(options: OPSD, student_logits, teacher_logits, inputs) -> jax.Array:
    """Computes each token's divergence with the function chosen for the outcome of its rollout."""
    values = jnp.zeros(student_logits.shape[:-1], jnp.float32)
    for name in sorted(set(options.divergences)):
        outcomes = [i for i, chosen in enumerate(options.divergences) if chosen == name]
        values += masked_values(
            _divergence_loss(name, options),
            jnp.isin(inputs["outcome"], jnp.array(outcomes)),
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            inputs=inputs,
        )[0]
    return values


def _divergence_loss(name: str, options: OPSD) -> TokenLoss:
    """Returns a `TokenLoss` that computes the divergence `name` with the given options."""

    def loss(student, teacher, inputs):
        if options.top_k:
            student, teacher = top_k(
                student_logits=student,
                teacher_logits=teacher,
                k=options.top_k,
                support=options.support,
                rest=options.rest,
            )
        known = options._asdict() | {"tokens": inputs.get("tokens")}
        arguments = {key: known[key] for key in _parameters(name) if key in known}
        values = DIVERGENCES[name](student_logits=student, teacher_logits=teacher, **arguments)
        return values, {}

    return loss


def _parameters(divergence: str) -> list[str]:
    """Returns a divergence function's parameter names, without those set by functools.partial."""
    function = DIVERGENCES[divergence]
    bound = getattr(function, "keywords", {})
    return [name for name in inspect.signature(function).parameters if name not in bound]
