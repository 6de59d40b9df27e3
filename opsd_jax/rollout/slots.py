"""Decode slots on the device: pure functions that fill them, advance them and resize their cache.

A slot holds one rollout in the making. What it draws depends on (key, rollout id, index of the
token) and the model alone: not on the slot, the slots beside it, when it was filled, the size of
the cache, or how many devices there are.

Shapes: S slots, P prompt columns, n prompts of a prefill, m rollouts of an admission, T steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.parallel.program import DECODE_STEPS
from opsd_jax.policy import Cache, Params, Policy
from opsd_jax.rollout import sampling
from opsd_jax.rollout.sampling import Array

# What became of a rollout. LIVE: it goes on.
STOP_EOS = 0
STOP_LENGTH = 1  # it filled its budget: truncated
LIVE = 2


class Rows(NamedTuple):
    """What is known of the rollout in each slot, int32 [S].

    Attributes:
      token: the last of its tokens, whose keys and values are not in the cache yet.
      position: that token's; -1 for an empty slot.
      rollout_id: chooses its random numbers.
      drawn: how many tokens its response has.
      budget: how many it may have.
    """

    token: Array
    position: Array
    rollout_id: Array
    drawn: Array
    budget: Array


class Slots(NamedTuple):
    """The state of decoding: the rows and the policy's cache for them."""

    rows: Rows
    cache: Cache


class Chunk(NamedTuple):
    """What some steps of decoding drew. A slot's tokens are the first `drawn` of its column.

    Attributes:
      tokens: int32 [T, S].
      model_logprobs, sampling_logprobs: float32 [T, S], as `sampling.Drawn` has them.
      drawn: int32 [S].
      stop: int32 [S]: STOP_EOS, STOP_LENGTH or LIVE; of a slot that was empty, LIVE.
    """

    tokens: jax.Array
    model_logprobs: jax.Array
    sampling_logprobs: jax.Array
    drawn: jax.Array
    stop: jax.Array


def empty_rows(slots: int) -> Rows:
    """Rows of empty slots."""
    zeros = jnp.zeros(slots, jnp.int32)
    return Rows(zeros, zeros - 1, zeros, zeros, zeros)


def prefill(policy: Policy, params: Params, tokens_nxP: jax.Array, positions_nxP: jax.Array):
    """A cache with prompts in it, but for their last tokens: decoding begins with those."""
    cache = policy.init_cache(*tokens_nxP.shape)
    return policy.forward(params, tokens_nxP, positions_nxP, cache)[1]


def length_axes(policy: Policy) -> Any:
    """The axis of each leaf of the policy's cache that grows with its length; -1 if none does.

    Raises:
      ValueError: there are several.
    """
    short, long = (jax.eval_shape(lambda n=n: policy.init_cache(1, n)) for n in (1024, 2048))

    def axis(a: jax.ShapeDtypeStruct, b: jax.ShapeDtypeStruct) -> int:
        axes = [
            i for i, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if len({*sizes}) > 1
        ]
        if len(axes) > 1 or 0 in axes:
            raise ValueError(
                f"init_cache(1, 1024) has an array {a.shape} that is {b.shape} for a length of "
                "2048; expected one axis to grow, and not the first."
            )
        return axes[0] if axes else -1

    return jax.tree.map(axis, short, long)


def admit(
    axes: Any, slots: Slots, prefilled: Cache, source_m: jax.Array, slot_m: jax.Array, rows: Rows
) -> Slots:
    """Puts rollouts into slots: row `source` of a prefilled cache, and what is known of each.

    Where devices have rows of their own, each gets all m prompts' part of the cache: keep m small.

    Args:
      axes: `length_axes`.
      slots: the state. Its cache holds the prompts; the prefilled one may be longer than it.
      prefilled: a cache of n rows.
      source_m: int32, rows of it.
      slot_m: int32, where each goes; a number past the last slot for nowhere.
      rows: of the m rollouts.
    """

    def put(axis, there, new):
        new = new[source_m]
        if axis < 0:
            return there.at[slot_m].set(new, mode="drop")
        size = min(new.shape[axis], there.shape[axis])
        new = jax.lax.slice_in_dim(new, 0, size, axis=axis)
        into = (slot_m, *(slice(None),) * (axis - 1), slice(0, size))
        return there.at[into].set(new, mode="drop")

    return Slots(
        jax.tree.map(lambda there, new: there.at[slot_m].set(new, mode="drop"), slots.rows, rows),
        jax.tree.map(put, axes, slots.cache, prefilled),
    )


def resize(leaf: jax.Array, axis: int, size: int) -> jax.Array:
    """A leaf of the cache with another size along its length: cut, or grown by zeros."""
    if size <= leaf.shape[axis]:
        return jax.lax.slice_in_dim(leaf, 0, size, axis=axis)
    widths = [(0, size - leaf.shape[axis] if i == axis else 0) for i in range(leaf.ndim)]
    return jnp.pad(leaf, widths)


def decode(
    policy: Policy,
    params: Params,
    slots: Slots,
    key: jax.Array,
    rule: sampling.Rule,
    enough: jax.Array,
    *,
    steps: int,
) -> tuple[Slots, Chunk]:
    """Decodes up to `steps` tokens in each slot.

    Args:
      policy, params: the model.
      slots: the state.
      key: scalar PRNG key, of this step and purpose.
      rule: the sampling rule.
      enough: int32 scalar; it stops earlier when so many rollouts have ended, or all of them.
      steps: T.
    """
    rows = slots.rows
    S = len(rows.token)
    ids_S = jax.vmap(jax.random.fold_in, (None, 0))(key, rows.rollout_id)
    words, logprobs = jnp.zeros((steps, S), jnp.int32), jnp.zeros((steps, S))
    nothing = jnp.zeros(S, jnp.int32)
    empty = Chunk(words, logprobs, logprobs, nothing, nothing + LIVE)

    def going(carry):
        t, (rows, _), chunk = carry
        ended = jnp.sum(chunk.stop != LIVE)
        return (t < steps) & (ended < enough) & jnp.any(rows.position >= 0)

    def step(carry):
        t, (rows, cache), chunk = carry
        with jax.named_scope("forward"):
            hidden_Sx1xD, cache = policy.forward(
                params, rows.token[:, None], rows.position[:, None], cache
            )
            logits_SxV = policy.unembed(params, hidden_Sx1xD[:, 0])
        with jax.named_scope("draw"):
            keys_S = jax.vmap(jax.random.fold_in)(ids_S, rows.drawn)
            word, model_logprob, sampling_logprob = sampling.draw(logits_SxV, keys_S, rule)
        live = rows.position >= 0
        drawn = rows.drawn + live
        ends, full = live & jnp.asarray(rule.stop)[word], live & (drawn >= rows.budget)
        chunk = Chunk(
            chunk.tokens.at[t].set(word),
            chunk.model_logprobs.at[t].set(model_logprob),
            chunk.sampling_logprobs.at[t].set(sampling_logprob),
            chunk.drawn + live,
            jnp.where(ends, STOP_EOS, jnp.where(full, STOP_LENGTH, chunk.stop)),
        )
        position = jnp.where(live & ~ends & ~full, rows.position + 1, -1)
        rows = rows._replace(token=word, position=position, drawn=drawn)
        return t + 1, Slots(rows, cache), chunk

    with jax.named_scope(DECODE_STEPS):
        _, after, chunk = jax.lax.while_loop(going, step, (jnp.int32(0), slots, empty))
    return after, chunk
