"""Who teaches: what of a stage's parameters the teacher is, and when it changes.

| kind | the teacher |
|---|---|
| "frozen" | the parameters that the stage began with |
| "ema" | their moving average: after each update t <- (1 - rate) t + rate p, in float32 |
| "refresh" | a copy, made anew after every `every` updates (CRISP, arXiv 2603.05433) |
| "trust_region" | logits (1 - rate) frozen + rate current (SDPO, arXiv 2601.20802) |
| "live" | the current parameters |

Gradients flow into none of them. What does not change by little steps is kept as sampling has the
parameters (`Model.decode_params`): a bfloat16 model's teacher takes half the memory of its master
weights and gives the same logits, since the weights are cast for every product anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from opsd_jax.losses import Head
from opsd_jax.policy import Params, Policy
from opsd_jax.stages.batch import response_head
from opsd_jax.training.stage import Teacher

KINDS = ("frozen", "ema", "refresh", "trust_region", "live")
COLLAPSES_BELOW = 40  # updates between two copies: CRISP's ablation


Keep = Callable[[Params], Params]  # how parameters that do not train are kept


def frozen(keep: Keep = lambda params: params) -> Teacher:
    """The first parameters."""
    return Teacher(lambda params: jax.tree.map(jnp.copy, keep(params)))


def ema(rate: float) -> Teacher:
    """t <- (1 - rate) t + rate p, in float32 whatever the parameters are."""

    def follow(teacher, params, number, applied):
        del number
        average = lambda t, p: t + rate * (p.astype(jnp.float32) - t)
        return jax.lax.cond(
            applied, lambda: jax.tree.map(average, teacher, params), lambda: teacher
        )

    return Teacher(
        lambda params: jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params), follow
    )


def refresh(every: int, keep: Keep = lambda params: params) -> Teacher:
    """A copy of the parameters after every `every` updates, skipped ones counted."""

    def copy(teacher, params, number, applied):
        del applied
        # A branch, not a select: what goes into it is computed once, so that a copy of the
        # parameters is one to the last bit.
        return jax.lax.cond(number % every == 0, lambda: keep(params), lambda: teacher)

    return Teacher(frozen(keep).init, copy)


def from_config(
    config: ml_collections.ConfigDict, keep: Keep = lambda params: params
) -> Teacher | None:
    """The teacher of a stage's `teacher` section; None for one that is no state of its own."""
    return {
        "frozen": frozen(keep),
        "trust_region": frozen(keep),
        "ema": ema(config.rate),
        "refresh": refresh(config.every, keep),
        "live": None,
    }[config.kind]


def warning(config: ml_collections.ConfigDict) -> str:
    """What to say of a `teacher` section before it is used; "" for nothing."""
    every = {"refresh": config.every, "live": 1}.get(config.kind, COLLAPSES_BELOW)
    if every >= COLLAPSES_BELOW:
        return ""
    return (
        f"the teacher is the student of at most {every} updates ago; below {COLLAPSES_BELOW} "
        "models have been seen to collapse (arXiv 2603.05433)."
    )


def make_head(policy: Policy, config: ml_collections.ConfigDict) -> Callable[..., Head]:
    """`(params, teacher, sequences) -> Head`: the teacher's logits, as `response_head`; `params`
    are the student's, `teacher` is what `Teacher` keeps, or None.
    """
    mixed = functools.partial(_mix, policy.unembed, config.rate)

    def head(params: Params, teacher: Params, sequences: Any) -> Head:
        of = functools.partial(response_head, policy, sequences=sequences)
        params = jax.lax.stop_gradient(params)
        if config.kind == "live":
            return of(params)
        if config.kind == "ema":  # an average in float32 is read as the model would be
            teacher = jax.tree.map(lambda t, p: t.astype(p.dtype), teacher, params)
        if config.kind != "trust_region":
            return of(teacher)
        frozen, current = of(teacher), of(params)
        hidden = jnp.concatenate([frozen.hidden, current.hidden], axis=-1)
        return Head(mixed, (teacher, params), hidden)

    return head


def _mix(unembed: Callable, rate: float, params: tuple[Params, Params], hidden: jax.Array):
    """The mixed logits of hidden states [..., 2 D], the frozen model's before the current one's."""
    frozen, current = (
        unembed(p, h) for p, h in zip(params, jnp.split(hidden, 2, axis=-1), strict=True)
    )
    # Not a weighted sum: -inf - -inf of a word that cannot occur would be no number.
    return jnp.where(frozen == current, frozen, frozen + rate * (current - frozen))
