"""The response lengths that a plan assumes, and how they fill decoding slots and microbatches."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opsd_jax.rollout.engine import STEPS_PER_CHUNK
from opsd_jax.rollout.pages import PoolSizes
from opsd_jax.stages.packing import Lengths, Packing, arranged, shapes_of


class Packed(NamedTuple):
    """How many microbatches one train step has, and how full they are.

    Attributes:
      counts: the number of microbatches of each shape.
      targets: the mean number of response tokens in a microbatch of each shape; 0 if it has none.
      useful: the fraction of all computed tokens that are not padding.
    """

    counts: list[int]
    targets: list[float]
    useful: float


def response_lengths(count: int, budget: int, mean: float) -> np.ndarray:
    """Returns quantiles of an exponential distribution of response lengths, clipped to the budget.

    Args:
      count: number of responses.
      budget: the largest number of tokens in a response.
      mean: mean length after the cut, as a fraction of the budget, in (0, 1].

    Returns:
      int [count], ascending, in tokens.
    """
    # Bisection on budget / scale of the exponential; the mean falls as this grows.
    below, above = 0.0, 1e6
    for _ in range(100):
        rate = (below + above) / 2
        below, above = (rate, above) if -math.expm1(-rate) > mean * rate else (below, rate)
    quantiles = (np.arange(count) + 0.5) / count
    longest = -np.log1p(-quantiles) / max(above, 1e-9)
    return np.clip(np.ceil(budget * longest), 1, budget).astype(int)


def decode_steps(responses: np.ndarray, slots: int) -> int:
    """Returns the number of decoding steps that it takes to sample all responses.

    A slot takes the next response as soon as its current one ends. The responses start in a fixed
    random order.

    Args:
      responses: int [count], length of each response in tokens.
      slots: number of decoding slots.
    """
    return int(np.max(np.sum(_schedule(responses, slots), axis=0)))


def _schedule(responses: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns when the responses start and how long they are, int [count] each, in steps.

    See `decode_steps`.
    """
    ends, starts = [0] * slots, []
    lengths = np.random.default_rng(0).permutation(responses)
    for tokens in lengths:
        starts.append(ends[0])
        heapq.heapreplace(ends, ends[0] + int(tokens))
    return np.array(starts), lengths


def peak_pages(prompt: float, responses: np.ndarray, group_size: int, slots: int, page: int) -> int:
    """Returns the largest number of pages that the rollouts of one shard use at the same time.

    Rollouts of a prompt follow one another and share the pages that it fills. A rollout has pages
    for the next chunk of decoding steps.

    Args:
      prompt: length of each prompt in tokens.
      responses: int [count], length of each response in tokens.
      group_size: responses per prompt.
      slots: number of decoding slots.
      page: tokens per page.
    """
    start_N, length_N = _schedule(responses, slots)
    group_N, shared, peak = np.arange(len(start_N)) // group_size, int(prompt) // page, 0
    for time in range(0, int(np.max(start_N + length_N)), STEPS_PER_CHUNK):
        active_N = (start_N <= time) & (time < start_N + length_N)
        tokens = prompt + np.minimum(time - start_N + STEPS_PER_CHUNK, length_N)[active_N]
        own = np.sum(np.ceil(tokens / page) - shared)
        peak = max(peak, int(own) + shared * len(np.unique(group_N[active_N])))
    return peak


def slots_that_fit(
    sizes: PoolSizes, prompt: float, responses: np.ndarray, group_size: int
) -> int | None:
    """Returns for how many slots a pool has enough pages, or None if the cache has no pages.

    With more slots, rollouts wait for pages or lose them.

    Args:
      sizes: the sizes of the pool.
      prompt: length of each prompt in tokens.
      responses: int [count], length of each response in tokens, over all shards.
      group_size: responses per prompt.
    """
    if not sizes.pages:
        return None
    of_shard = np.random.default_rng(0).permutation(responses)[:: sizes.shards]
    pages = sizes.pages // sizes.shards
    low, high = pages // sizes.width, max(pages // sizes.width, len(of_shard))
    while low < high:  # `low` slots fit, and more than `high` do not or have no rollout
        middle = -(-(low + high) // 2)
        if peak_pages(prompt, of_shard, group_size, middle, sizes.page) <= pages:
            low = middle
        else:
            high = middle - 1
    return low * sizes.shards


def cache_tokens_read(prompt: float, responses: np.ndarray) -> float:
    """Returns the number of cached tokens that decoding reads, summed over all steps.

    Args:
      prompt: length of each prompt in tokens.
      responses: int [count], length of each response in tokens.
    """
    return float(np.sum(responses * (prompt + responses / 2)))


def packed(
    rows: Sequence[Lengths],
    targets: Sequence[int],
    buckets: Sequence[Lengths],
    microbatch: int,
    packing: Packing | None = None,
) -> Packed:
    """Computes how `stages.batch.pack` packs the responses of one train step into microbatches.

    Args:
      rows: the number of computed tokens in the sequences of each response.
      targets: the number of tokens of each response.
      buckets: the padded lengths of each bucket, ascending.
      microbatch: rows in a microbatch.
      packing: how responses share rows; None if each has a row of its own.
    """
    parts = arranged(rows, buckets, microbatch, packing)
    shapes = shapes_of(buckets, microbatch, packing)
    counts = [len(members) for members in parts]
    totals = [sum(targets[i] for part in members for row in part for i in row) for members in parts]
    computed = [n * shape.rows * shape.tokens for n, shape in zip(counts, shapes, strict=True)]
    return Packed(
        counts,
        [total / max(1, n) for total, n in zip(totals, counts, strict=True)],
        sum(sum(row.values()) for row in rows) / sum(computed),
    )
