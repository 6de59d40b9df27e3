"""The OPSD loss: a gated divergence of the student from the teacher on the student's own tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

from opsd_jax.losses import divergence as div
from opsd_jax.losses.checks import (
    check_mask,
    check_option,
    check_range,
    check_row_weight,
    check_shape,
)
from opsd_jax.losses.fused import Scores, TokenLoss, weighted_loss, where_live
from opsd_jax.losses.gate import gate_weights
from opsd_jax.losses.likelihood import at_temperature, importance_ratio, token_logprobs
from opsd_jax.losses.reduction import (
    AGGREGATIONS,
    POSITIONS,
    position_in_row,
    position_weights,
    token_weights,
)
from opsd_jax.losses.result import Loss

DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    compare.__name__: compare
    for compare in (div.reverse_kl, div.forward_kl, div.jsd, div.skewed_kl, div.sampled_kl)
}
Groups = tuple[jax.Array, jax.Array, jax.Array]  # correct, incorrect, truncated: bool [B] each


class OPSD(NamedTuple):
    """The options of `opsd`. The defaults are the paper's Correct-only (arXiv 2605.06188).

    Attributes:
      gate: weights of correct, incorrect and truncated rollouts; see `GATES`.
      divergence: one of DIVERGENCES for all, or three, with commas: for each of these groups.
      beta: of "jsd"; 0 is the forward and 1 the reverse KL.
      alpha: of "skewed_kl", the teacher's share of the target.
      control_variate: of "sampled_kl".
      top_k: compare the k likeliest words alone; 0 for the whole vocabulary. See `top_k`.
      support, rest: of `top_k`.
      clip: if above 0, a token's divergence above this counts as this, its gradient scaled down in
        proportion; one below -clip, which "sampled_kl" can have, as -clip. It is the sum over words
        that is clipped: clipping the terms can turn its sign.
      importance_cap: if above 0, each token is weighted by min(p / p_behaviour, cap), held fixed,
        for rollouts that are not quite the student's own (SDPO takes 2).
      skip_first: the first so many tokens of a response do not count.
      first_only: if above 0, only the first so many do (ESR, arXiv 2605.27028).
      position: kind of `position_weights`; its parameters are the next five.
      late, rate, floor, centre, width: see there.
      aggregation, length: of `token_weights`.
    """

    gate: tuple[float, float, float] = (1.0, 0.0, 0.0)
    divergence: str = "reverse_kl"
    beta: float = 0.5
    alpha: float = 0.2
    control_variate: bool = False
    top_k: int = 0
    support: str = "teacher"
    rest: str = "bucket"
    clip: float = 0.0
    importance_cap: float = 0.0
    skip_first: int = 0
    first_only: int = 0
    position: str = "uniform"
    late: float = 2.0
    rate: float = 2.0
    floor: float = 0.25
    centre: float = 0.3
    width: float = 0.1
    aggregation: str = "sequence"
    length: float = 1.0

    @property
    def divergences(self) -> tuple[str, ...]:
        """One for each group."""
        names = tuple(name.strip() for name in self.divergence.split(","))
        return names * 3 if len(names) == 1 else names

    def check(self) -> None:
        """Raises ValueError that names the option and what was expected."""
        if isinstance(self.gate, str) or len(self.gate) != 3:
            raise ValueError(
                f"gate is {self.gate!r}; expected weights (correct, incorrect, truncated), such as "
                "GATES['correct'] or parse_gate('1,0.5,0')."
            )
        for weight in self.gate:
            check_range("gate", weight, 0)
        if len(self.divergences) != 3:
            raise ValueError(
                f"divergence is {self.divergence!r}; expected one, or one for each of three groups."
            )
        for name in self.divergences:
            check_option("divergence", name, DIVERGENCES)
        if self.top_k and "sampled_kl" in self.divergences:
            raise ValueError(f"top_k is {self.top_k}; 'sampled_kl' looks at one word, expected 0.")
        check_option("support", self.support, div.SUPPORTS)
        check_option("rest", self.rest, div.RESTS)
        check_option("position", self.position, POSITIONS)
        check_option("aggregation", self.aggregation, AGGREGATIONS)
        check_range("beta", self.beta, 0, 1)
        check_range("alpha", self.alpha, 1e-6, 1)
        check_range("length", self.length, 1e-6)
        if 0 < self.first_only <= self.skip_first:
            raise ValueError(
                f"first_only is {self.first_only} and skip_first {self.skip_first}; expected "
                "tokens between the two."
            )
        for name in ("top_k", "clip", "importance_cap", "skip_first", "first_only"):
            check_range(name, getattr(self, name), 0)


def opsd(
    *,
    student: Scores,
    teacher: Scores,
    mask: jax.Array,
    groups: Groups,
    tokens: jax.Array | None = None,
    behaviour_logprobs: jax.Array | None = None,
    row_weight: jax.Array | float = 1.0,
    options: OPSD = OPSD(),
    temperature: float = 1.0,
    chunk: int | None = None,
    partition: P | None = None,
) -> Loss:
    """On-policy self-distillation (arXiv 2605.06188, eq. 1), gated by correctness.

    Each of B responses of the student is scored twice, by the student from its own prompt and by
    the teacher from one with privileged context. Align the two by response: column t of `student`,
    `teacher`, `mask` and `tokens` is the same response token, whatever the prompts' lengths.

    Args:
      student: logits [B, T, V] or a `Head`; those at t predict the token at t.
      teacher: the same; no gradients. Equal to the student's, it gives exactly 0.
      mask: bool [B, T], the response's tokens (an end-of-sequence token that was sampled is one).
      groups: bool [B] each: correct, incorrect, truncated; disjoint. A row in none weighs nothing.
      tokens: int [B, T], for the "sampled_kl" divergence and `importance_cap`.
      behaviour_logprobs: [B, T], of these when they were sampled, at `temperature`; for
        `importance_cap`.
      row_weight: [B], or one number for all, times the gate's; not negative. 0 for a row without a
        usable context, say.
      options: see `OPSD`.
      temperature: of both sides; that of the sampling.
      chunk, partition: see `weighted_loss`.

    Returns:
      A `Loss`, with `tokens` "loss", "divergence" (before clip and importance) and "importance"
      (with a cap).

    Raises:
      ValueError: a shape, an option, or an argument that the options need; names it.
    """
    if teacher is None:
        raise ValueError("teacher is None; expected logits or a Head.")
    weights, total = opsd_weights(mask, groups, row_weight, options)
    inputs = opsd_inputs(mask, groups, tokens, behaviour_logprobs, options)
    value, said = weighted_loss(
        opsd_token_loss(options, temperature),
        weights,
        inputs,
        student=student,
        teacher=teacher,
        chunk=chunk,
        partition=partition,
    )
    checkify.debug_check(
        jnp.all(jnp.isfinite(said["divergence"])),
        "the divergence is not finite somewhere: look at the teacher's logits.",
    )
    return Loss(value, total, weights, said)


def opsd_weights(mask, groups: Groups, row_weight, options: OPSD) -> tuple[jax.Array, jax.Array]:
    """Weights [B, T] and their normaliser: the gate, the positions and the aggregation."""
    options.check()
    mask = check_mask(mask)
    if len(groups) != 3:
        raise ValueError(f"groups are {len(groups)}; expected (correct, incorrect, truncated).")
    check_row_weight(row_weight, mask)
    check_shape(
        mask.shape[:1],
        "a row of mask each",
        **dict(zip(("correct", "incorrect", "truncated"), groups, strict=True)),
    )
    checkify.debug_check(
        jnp.all(sum(jnp.asarray(group, jnp.int32) for group in groups) <= 1),
        "groups are not disjoint: a rollout is correct, incorrect or truncated.",
    )
    counted = position_in_row(mask)
    window = mask & (counted >= options.skip_first)
    if options.first_only:
        window &= counted < options.first_only
    by_position = position_weights(
        window,
        options.position,
        late=options.late,
        rate=options.rate,
        floor=options.floor,
        centre=options.centre,
        width=options.width,
    )
    return token_weights(
        window,
        gate_weights(*groups, options.gate) * row_weight,
        aggregation=options.aggregation,
        length=options.length,
        position_weights=by_position,
    )


def opsd_inputs(mask, groups: Groups, tokens, behaviour_logprobs, options: OPSD) -> dict[str, Any]:
    """The arrays [B, T] that `opsd_token_loss` reads; arguments as in `opsd`."""
    check_shape(
        mask.shape, "the shape of mask", tokens=tokens, behaviour_logprobs=behaviour_logprobs
    )
    inputs = {}
    if len(set(options.divergences)) > 1:
        of_row = jnp.argmax(jnp.stack(groups), axis=0)
        inputs["group"] = jnp.broadcast_to(of_row[:, None], mask.shape)
    if options.importance_cap or "sampled_kl" in options.divergences:
        inputs["tokens"] = _given("tokens", tokens, options)
    if options.importance_cap:
        inputs["behaviour"] = _given("behaviour_logprobs", behaviour_logprobs, options)
    return inputs


def _given(name: str, array, options: OPSD):
    if array is None:
        raise ValueError(
            f"{name} is None; expected [rows, tokens], for divergence {options.divergence!r} and "
            f"importance_cap {options.importance_cap}."
        )
    return array


def opsd_token_loss(options: OPSD, temperature: float) -> TokenLoss:
    """The loss of a token, for `weighted_loss`."""

    def divergence(name: str) -> TokenLoss:
        def values(student, teacher, inputs):
            if options.top_k:
                student, teacher = div.top_k(
                    student_logits=student,
                    teacher_logits=teacher,
                    k=options.top_k,
                    support=options.support,
                    rest=options.rest,
                )
            arguments = {
                "jsd": {"beta": options.beta},
                "skewed_kl": {"alpha": options.alpha},
                "sampled_kl": {
                    "tokens": inputs.get("tokens"),
                    "control_variate": options.control_variate,
                },
            }.get(name, {})
            compare = DIVERGENCES[name]
            return compare(student_logits=student, teacher_logits=teacher, **arguments), {}

        return values

    def token_loss(student, teacher, inputs):
        student, teacher = (at_temperature(logits, temperature) for logits in (student, teacher))
        if "group" not in inputs:
            values, _ = divergence(options.divergences[0])(student, teacher, inputs)
        else:
            values = jnp.zeros(student.shape[:-1], jnp.float32)
            for name in sorted(set(options.divergences)):
                groups = [i for i, of_group in enumerate(options.divergences) if of_group == name]
                chosen = jnp.isin(inputs["group"], jnp.array(groups))
                values += where_live(divergence(name), chosen, student, teacher, inputs)[0]
        said = {"divergence": values}
        if options.clip:
            size = jax.lax.stop_gradient(jnp.abs(values))
            values *= options.clip / jnp.maximum(size, options.clip)
        if "behaviour" in inputs:
            logprobs = jax.lax.stop_gradient(token_logprobs(student, inputs["tokens"]))
            ratio = importance_ratio(logprobs - inputs["behaviour"])
            said["importance"] = jnp.minimum(ratio, options.importance_cap)
            values *= said["importance"]
        return values, said

    return token_loss
