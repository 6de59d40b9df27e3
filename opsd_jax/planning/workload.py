"""The response lengths that a plan assumes, and how they fill decoding slots and microbatches."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opsd_jax.stages.batch import Lengths, arranged


class Packed(NamedTuple):
    """How many microbatches one train step has, and how full they are.

    Attributes:
      counts: the number of microbatches in each bucket.
      targets: the mean number of response tokens in a microbatch of each bucket; 0 if it has none.
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
    ends = [0] * slots
    for tokens in np.random.default_rng(0).permutation(responses):
        heapq.heapreplace(ends, ends[0] + int(tokens))
    return max(ends)


def cache_tokens_read(prompt: float, responses: np.ndarray) -> float:
    """Returns the number of cached tokens that decoding reads, summed over all steps.

    Args:
      prompt: length of each prompt in tokens.
      responses: int [count], length of each response in tokens.
    """
    return float(np.sum(responses * (prompt + responses / 2)))


def packed(
    rows: Sequence[Lengths], targets: Sequence[int], buckets: Sequence[Lengths], microbatch: int
) -> Packed:
    """Computes how `stages.batch.pack` packs the rows of one train step into microbatches.

    Args:
      rows: the number of computed tokens in each row's sequences.
      targets: the number of response tokens in each row.
      buckets: the padded lengths of each bucket, ascending.
      microbatch: rows in a microbatch.
    """
    parts = arranged(rows, buckets, microbatch)
    counts = [len(members) for members in parts]
    totals = [sum(targets[i] for part in members for i in part) for members in parts]
    computed = [n * microbatch * sum(b.values()) for n, b in zip(counts, buckets, strict=True)]
    return Packed(
        counts,
        [total / max(1, n) for total, n in zip(totals, counts, strict=True)],
        sum(sum(row.values()) for row in rows) / sum(computed),
    )
