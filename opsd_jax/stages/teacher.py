"""The kinds of OPSD teacher: which parameters they use, and when these change.

| kind | the teacher |
|---|---|
| "frozen" | the parameters from the start of the stage |
| "ema" | a moving average: after each update t <- (1 - rate) t + rate p, in float32 |
| "refresh" | a copy, renewed after every `every` updates (CRISP, arXiv 2603.05433) |
| "trust_region" | logits (1 - rate) frozen + rate current (SDPO, arXiv 2601.20802) |
| "live" | the current parameters |

No gradient flows into a teacher. A teacher that is a copy of parameters is stored in the
form for sampling (`Model.decode_params`). A bfloat16 model's teacher then takes half the memory of
its float32 master weights, and its logits are the same, since every matmul casts the weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.losses import Head
from opsd_jax.models.lora import without_dropout
from opsd_jax.options import look_up, option
from opsd_jax.policy import Params, Policy
from opsd_jax.stages.batch import response_head
from opsd_jax.training.stage import Teacher

COLLAPSES_BELOW = 40  # updates between two copies; in CRISP's ablation models collapsed below this


Keep = Callable[[Params], Params]  # parameters -> the form in which a teacher stores them


def frozen(keep: Keep = lambda params: params) -> Teacher:
    """Returns a teacher that keeps the parameters from the start of the stage."""
    return Teacher(lambda params: jax.tree.map(jnp.copy, keep(params)))


def ema(rate: float) -> Teacher:
    """Returns a teacher that is a moving average of the parameters, t <- (1 - rate) t + rate p.

    The average is in float32, whatever the dtype of the parameters.
    """

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
    """Returns a teacher that copies the student's parameters every `every` updates.

    Skipped updates count too.
    """

    def copy(teacher, params, number, applied):
        del applied
        # A branch, not a select: the inputs of a branch are computed once, so the copy equals the
        # parameters to the last bit.
        return jax.lax.cond(number % every == 0, lambda: keep(params), lambda: teacher)

    return Teacher(frozen(keep).init, copy)


# `(policy, options) -> ((params, teacher, sequences) -> Head)`: the teacher's logits from the
# student's parameters, the state's teacher (or None) and a sequence of the microbatch.
MakeHead = Callable[[Policy, Any], Callable[[Params, Params, Any], Head]]


def _stored_head(policy: Policy, options: TeacherOptions) -> Callable[[Params, Params, Any], Head]:
    """Returns a function that computes logits from the teacher's stored parameters."""
    return lambda params, teacher, sequences: response_head(policy, teacher, sequences)


def _average_head(policy: Policy, options: TeacherOptions) -> Callable[[Params, Params, Any], Head]:
    """Returns a function that computes logits from the teacher's moving average of parameters.

    The function casts the average to the dtypes of the student's parameters.
    """

    def head(params: Params, teacher: Params, sequences: Any) -> Head:
        cast = jax.tree.map(lambda t, p: t.astype(p.dtype), teacher, params)
        return response_head(policy, cast, sequences)

    return head


def _current_head(policy: Policy, options: TeacherOptions) -> Callable[[Params, Params, Any], Head]:
    """Returns a function that computes logits from the student's current parameters."""
    return lambda params, teacher, sequences: response_head(policy, params, sequences)


def _mixed_head(policy: Policy, options: TeacherOptions) -> Callable[[Params, Params, Any], Head]:
    """Returns a function that interpolates between the logits of stored and current parameters."""
    unembed = functools.partial(_mix, policy.unembed, options.rate)

    def head(params: Params, teacher: Params, sequences: Any) -> Head:
        stored, current = (response_head(policy, p, sequences) for p in (teacher, params))
        hidden_mxTx2D = jnp.concatenate([stored.hidden, current.hidden], axis=-1)
        return Head(unembed, (teacher, params), hidden_mxTx2D)

    return head


def _mix(unembed: Callable, rate: float, params: tuple[Params, Params], hidden: jax.Array):
    """Returns logits [..., V] interpolated between two models, from hidden states [..., 2 D].

    The first D hidden states are the stored model's, the last D the current model's.
    """
    stored, current = (
        unembed(p, h) for p, h in zip(params, jnp.split(hidden, 2, axis=-1), strict=True)
    )
    # A token that cannot occur has -inf in both, and -inf - -inf would be NaN.
    return jnp.where(stored == current, stored, stored + rate * (current - stored))


class TeacherKind(NamedTuple):
    """A kind of teacher: how to make and update its parameters, and compute its logits.

    Attributes:
      make: `(options, keep) -> Teacher`: the teacher's part of the training state; None for a
        teacher without its own state.
      head: makes the function that returns the teacher's logits.
      lag: `options -> updates`: the most updates that the teacher can be behind the student;
        None if there is no bound.
    """

    make: Callable[[TeacherOptions, Keep], Teacher | None]
    head: MakeHead = _stored_head
    lag: Callable[[TeacherOptions], int] | None = None


TEACHERS: dict[str, TeacherKind] = {
    "frozen": TeacherKind(lambda options, keep: frozen(keep)),
    "ema": TeacherKind(lambda options, keep: ema(options.rate), _average_head),
    "refresh": TeacherKind(
        lambda options, keep: refresh(options.every, keep), lag=lambda options: options.every
    ),
    "trust_region": TeacherKind(lambda options, keep: frozen(keep), _mixed_head),
    "live": TeacherKind(lambda options, keep: None, _current_head, lag=lambda options: 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """The options of a stage's teacher: its kind, and how it follows the student."""

    kind: str = option(
        "frozen",
        "Kind of teacher (opsd_jax/stages/teacher.py).",
        expects=f"one of {', '.join(map(repr, TEACHERS))}, or 'package.module:NAME'",
    )
    rate: float = option(
        0.05,
        "Rate of 'ema'; the current model's fraction in 'trust_region'.",
        above=0,
        at_most=1,
    )
    every: int = option(50, "Updates between two copies of 'refresh'.", at_least=1)

    def check(self, field: str) -> None:
        """Raises ConfigError if `kind` does not name a kind of teacher."""
        _kind_of(self, f"{field}.kind")


def _kind_of(options: TeacherOptions, field: str = "teacher.kind") -> TeacherKind:
    """Returns the `TeacherKind` that `options` select. Raises ConfigError if it does not exist."""
    return look_up(TEACHERS, options.kind, TeacherKind, field)


def make_teacher(options: TeacherOptions, keep: Keep = lambda params: params) -> Teacher | None:
    """Returns the `Teacher` that makes and updates the teacher's state; None if it has no state."""
    return _kind_of(options).make(options, keep)


def make_head(policy: Policy, options: TeacherOptions) -> Callable[[Params, Params, Any], Head]:
    """Returns a function `(params, teacher, sequences) -> Head` for the teacher's logits.

    Its arguments are the student's parameters, the teacher in the training state (or None), and the
    teacher's sequences of a microbatch. No gradient flows through the student's parameters, and the
    teacher has no dropout.
    """
    head = _kind_of(options).head(policy, options)
    return lambda params, teacher, sequences: head(
        jax.lax.stop_gradient(without_dropout(params)), teacher, sequences
    )


def warning(options: TeacherOptions) -> str:
    """Returns a warning if the teacher follows the student too closely; "" otherwise."""
    lag = _kind_of(options).lag
    if lag is None or lag(options) >= COLLAPSES_BELOW:
        return ""
    return (
        f"the teacher is the student from at most {lag(options)} updates ago; models have been "
        f"seen to collapse if it is less than {COLLAPSES_BELOW} updates behind (arXiv 2603.05433)."
    )
