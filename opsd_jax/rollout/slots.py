"""Pure functions that prefill prompts, insert rollouts into slots, decode, and resize the cache.

A slot holds one rollout while its response is being sampled. A sampled token depends only on the
model, the key, the rollout id and the token's index in the response. It does not depend on the
slot, on the other slots, on when the slot was filled, on the cache's length or on the number of
devices.

Shapes: S slots, P prompt columns, n prompts per prefill, m rollouts per insertion, T steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opsd_jax.parallel.mesh import ROWS, constrain
from opsd_jax.parallel.program import DECODE_STEPS
from opsd_jax.policy import Cache, PagedCache, Params, Policy
from opsd_jax.rollout import sampling
from opsd_jax.rollout.sampling import Array

# The reasons for which a rollout stops.
STOP_EOS = 0
STOP_LENGTH = 1  # it reached its token budget and is truncated
RUNNING = 2  # it has not stopped


class Rows(NamedTuple):
    """The state of the rollout in each slot. Every field is an int32 array [S].

    Attributes:
      token: the rollout's last token. Its keys and values are not in the cache yet.
      position: the position of that token; -1 for an empty slot.
      rollout_id: selects the rollout's random numbers.
      drawn: number of tokens in the response so far.
      budget: maximum number of tokens in the response.
    """

    token: Array
    position: Array
    rollout_id: Array
    drawn: Array
    budget: Array


class Slots(NamedTuple):
    """The decoding state: the rollout in each slot, and the model's cache for all slots."""

    rows: Rows
    cache: Cache


class Chunk(NamedTuple):
    """Up to T consecutive tokens sampled in each slot.

    The tokens of slot s are the first `drawn[s]` of column s; the rest of the column is undefined.

    Attributes:
      tokens: int32 [T, S].
      model_logprobs: float32 [T, S], see `sampling.Drawn`.
      sampling_logprobs: float32 [T, S], see `sampling.Drawn`.
      drawn: int32 [S], number of tokens sampled in each slot.
      stop: int32 [S], STOP_EOS, STOP_LENGTH or RUNNING. RUNNING for an empty slot.
      read: int32 [S], number of cached tokens that each slot's rollout attended to, summed over the
        forward passes. Tokens that a pass stores itself do not count.
      steps: int32 scalar, number of forward passes. None if each pass sampled one token for each
        rollout, so that it is the largest of `drawn`.
    """

    tokens: jax.Array
    model_logprobs: jax.Array
    sampling_logprobs: jax.Array
    drawn: jax.Array
    stop: jax.Array
    read: jax.Array
    steps: jax.Array | None = None

    def forward_passes(self) -> int:
        """Returns the number of forward passes of a fetched chunk."""
        return int(self.drawn.max() if self.steps is None else self.steps)


def empty_rows(slots: int) -> Rows:
    """Returns `Rows` for the given number of empty decoding slots."""
    zeros = jnp.zeros(slots, jnp.int32)
    return Rows(zeros, zeros - 1, zeros, zeros, zeros)


def empty_chunk(tokens: int, slots: int) -> Chunk:
    """Returns a `Chunk` without tokens, with room for `tokens` in each slot."""
    tokens_TxS, logprobs_TxS = jnp.zeros((tokens, slots), jnp.int32), jnp.zeros((tokens, slots))
    zeros_S = jnp.zeros(slots, jnp.int32)
    return Chunk(tokens_TxS, logprobs_TxS, logprobs_TxS, zeros_S, zeros_S + RUNNING, zeros_S)


def prefill(
    policy: Policy, params: Params, tokens_nxP: jax.Array, positions_nxP: jax.Array
) -> Cache:
    """Computes the keys and values of prompts and returns them in a new cache.

    The caller leaves out the last token of each prompt, because decoding starts with it.

    Args:
      policy, params: the model.
      tokens_nxP: int32, prompts without their last tokens, padded to P columns.
      positions_nxP: int32, the position of each token; -1 for padding.
    """
    cache = policy.init_cache(*tokens_nxP.shape)
    return policy.forward(params, tokens_nxP, positions_nxP, cache)[1]


def length_axes(policy: Policy) -> Any:
    """Returns, for each cache array, the axis that grows with the cache length; -1 if none does.

    For a `PagedCache`, which is never resized, the result is None.

    Raises:
      ValueError: an array has several such axes, or its first axis is one of them.
    """
    short, long = (jax.eval_shape(lambda n=n: policy.init_cache(1, n)) for n in (1024, 2048))
    if isinstance(short, PagedCache):
        return None

    def axis(a: jax.ShapeDtypeStruct, b: jax.ShapeDtypeStruct) -> int:
        axes = [
            i for i, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if len({*sizes}) > 1
        ]
        if len(axes) > 1 or 0 in axes:
            raise ValueError(
                f"init_cache(1, 1024) returns an array of shape {a.shape}, and init_cache(1, 2048) "
                f"an array of shape {b.shape}; expected at most one axis to grow with the length, "
                "and the first axis to stay the batch axis."
            )
        return axes[0] if axes else -1

    return jax.tree.map(axis, short, long)


def pooled(cache: PagedCache, pages: int) -> PagedCache:
    """Returns an empty cache like `cache`, with a pool of `pages` pages of which none is in use."""
    empty = lambda leaf: jnp.zeros((pages, *leaf.shape[1:]), leaf.dtype)
    return cache._replace(
        pages=jax.tree.map(empty, cache.pages), table=jnp.full_like(cache.table, pages)
    )


def insert(
    axes: Any, slots: Slots, prefilled: Cache, source_m: jax.Array, slot_m: jax.Array, rows: Rows
) -> Slots:
    """Inserts m rollouts into decoding slots by copying the keys and values of their prompts.

    If the rows are sharded, every device receives the prompt caches of all m rollouts, so keep m
    small.

    Args:
      axes: the result of `length_axes`.
      slots: the state. Its cache may be shorter than the prefilled one, but has to hold the
        prompts. If it is paged, its table has the pages of the m rollouts already.
      prefilled: a cache of n prompts, from `prefill`.
      source_m: int32, the row of each rollout's prompt in `prefilled`.
      slot_m: int32, the slot of each rollout. A number past the last slot skips the rollout.
      rows: the new rows, int32 [m] each.

    Returns:
      The new state.
    """

    def copy(axis, leaf, new):
        new = new[source_m]
        if axis < 0:
            return leaf.at[slot_m].set(new, mode="drop")
        size = min(new.shape[axis], leaf.shape[axis])
        new = jax.lax.slice_in_dim(new, 0, size, axis=axis)
        target = (slot_m, *(slice(None),) * (axis - 1), slice(0, size))
        return leaf.at[target].set(new, mode="drop")

    set_rows = lambda leaf, new: leaf.at[slot_m].set(new, mode="drop")
    if isinstance(slots.cache, PagedCache):
        cache = _insert_pages(slots.cache, prefilled, source_m, slot_m)
    else:
        cache = jax.tree.map(copy, axes, slots.cache, prefilled)
    return Slots(jax.tree.map(set_rows, slots.rows, rows), cache)


def _insert_pages(
    cache: PagedCache, prefilled: PagedCache, source_m: jax.Array, slot_m: jax.Array
) -> PagedCache:
    """Copies the pages of m prompts to the pages in the table of `cache`. See `insert`.

    A page that several rollouts share is written by each of them, with the same values.
    """
    source_mxN = prefilled.table[source_m]
    no_page = jax.tree.leaves(cache.pages)[0].shape[0]
    target_mxN = cache.table.at[slot_m, : source_mxN.shape[1]].get(mode="fill", fill_value=no_page)
    copy_pages = lambda leaf, new: leaf.at[target_mxN].set(new[source_mxN], mode="drop")
    copy_rows = lambda leaf, new: leaf.at[slot_m].set(new[source_m], mode="drop")
    return cache._replace(
        pages=jax.tree.map(copy_pages, cache.pages, prefilled.pages),
        rows=jax.tree.map(copy_rows, cache.rows, prefilled.rows),
    )


def prefill_in_place(
    policy: Policy,
    params: Params,
    slots: Slots,
    tokens_mxC: jax.Array,
    positions_mxC: jax.Array,
    slot_m: jax.Array,
    rows: Rows,
) -> Slots:
    """Prefills m rollouts that have tokens already, and inserts them into slots.

    The cache is a `PagedCache` whose table has the pages of these rollouts. Their keys and values
    are written to the pages at once, so no device holds another cache or receives one.

    Args:
      policy, params: the model.
      slots: the state.
      tokens_mxC: int32, prompts and responses without their last tokens, padded to C columns. If
        rows are sharded, each rollout is in the shard of its slot.
      positions_mxC: int32, the position of each token; -1 for padding.
      slot_m: int32, the slot of each rollout. A number past the last slot skips the rollout.
      rows: the new rows, int32 [m] each.

    Returns:
      The new state.
    """
    cache = slots.cache
    no_page = jax.tree.leaves(cache.pages)[0].shape[0]
    table_mxN = constrain(cache.table.at[slot_m].get(mode="fill", fill_value=no_page), P(ROWS))
    fresh = jax.tree.map(lambda x: jnp.zeros((len(slot_m), *x.shape[1:]), x.dtype), cache.rows)
    _, filled = policy.forward(
        params, tokens_mxC, positions_mxC, PagedCache(cache.pages, fresh, table_mxN)
    )
    set_rows = lambda leaf, new: leaf.at[slot_m].set(new, mode="drop")
    return Slots(
        jax.tree.map(set_rows, slots.rows, rows),
        cache._replace(pages=filled.pages, rows=jax.tree.map(set_rows, cache.rows, filled.rows)),
    )


def resize(leaf: jax.Array, axis: int, size: int) -> jax.Array:
    """Truncates a cache array along `axis`, or pads it with zeros, to the given size."""
    if size <= leaf.shape[axis]:
        return jax.lax.slice_in_dim(leaf, 0, size, axis=axis)
    widths = [(0, size - leaf.shape[axis] if i == axis else 0) for i in range(leaf.ndim)]
    return jnp.pad(leaf, widths)


def decode(
    policy: Policy,
    params: Params,
    slots: Slots,
    key: jax.Array,
    sampling_params: sampling.SamplingParams,
    stop_after: jax.Array,
    *,
    steps: int,
) -> tuple[Slots, Chunk]:
    """Samples up to `steps` tokens for the rollout in each nonempty slot.

    Args:
      policy, params: the model.
      slots: the state.
      key: scalar PRNG key for this training step and purpose.
      sampling_params: the distribution that tokens are sampled from.
      stop_after: int32 scalar. Decoding returns early once this many rollouts have stopped, or
        all of them.
      steps: T, maximum number of steps.

    Returns:
      `(slots, chunk)`: the new state, in which slots whose rollout stopped are empty, and the
      sampled tokens.
    """
    keys_S = jax.vmap(jax.random.fold_in, (None, 0))(key, slots.rows.rollout_id)
    empty = empty_chunk(steps, len(slots.rows.token))

    def is_unfinished(carry):
        t, (rows, _), chunk = carry
        stopped = jnp.sum(chunk.stop != RUNNING)
        return (t < steps) & (stopped < stop_after) & jnp.any(rows.position >= 0)

    def step(carry):
        t, (rows, cache), chunk = carry
        with jax.named_scope("forward"):
            hidden_Sx1xD, cache = policy.forward(
                params, rows.token[:, None], rows.position[:, None], cache
            )
            logits_SxV = policy.unembed(params, hidden_Sx1xD[:, 0])
        with jax.named_scope("draw"):
            token_keys_S = jax.vmap(jax.random.fold_in)(keys_S, rows.drawn)
            sampled = sampling.draw(logits_SxV, token_keys_S, sampling_params)
        rows, chunk = _record(t, rows, chunk, sampled, sampling_params)
        return t + 1, Slots(rows, cache), chunk

    with jax.named_scope(DECODE_STEPS):
        _, after, chunk = jax.lax.while_loop(is_unfinished, step, (jnp.int32(0), slots, empty))
    return after, chunk


def _record(
    t: jax.Array,
    rows: Rows,
    chunk: Chunk,
    sampled: sampling.Drawn,
    sampling_params: sampling.SamplingParams,
) -> tuple[Rows, Chunk]:
    """Adds the tokens of step t to the chunk, advances the rows, and frees stopped slots."""
    active_S = rows.position >= 0
    drawn_S = rows.drawn + active_S
    eos_S = active_S & jnp.asarray(sampling_params.stop)[sampled.token]
    full_S = active_S & (drawn_S >= rows.budget)
    chunk = Chunk(
        chunk.tokens.at[t].set(sampled.token),
        chunk.model_logprobs.at[t].set(sampled.model_logprob),
        chunk.sampling_logprobs.at[t].set(sampled.sampling_logprob),
        chunk.drawn + active_S,
        jnp.where(eos_S, STOP_EOS, jnp.where(full_S, STOP_LENGTH, chunk.stop)),
        chunk.read + jnp.maximum(rows.position, 0),
    )
    position_S = jnp.where(active_S & ~eos_S & ~full_S, rows.position + 1, -1)
    return rows._replace(token=sampled.token, position=position_S, drawn=drawn_S), chunk
