"""What a plan assumes of a run: the lengths of responses, and how they fill slots and batches."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opsd_jax.stages.batch import Lengths, arranged


class Packed(NamedTuple):
    """The microbatches of a step, a number for each bucket.

    Attributes:
      counts: of microbatches.
      targets: response tokens of one, on average; 0 without any.
      useful: those that are no padding of all tokens that are computed, as a part of them.
    """

    counts: list[int]
    targets: list[float]
    useful: float


def lengths(count: int, budget: int, mean: float) -> np.ndarray:
    """Tokens of responses, int [count], ascending: spread exponentially, and cut off at the budget.

    Args:
      count: how many.
      budget: the most tokens of one.
      mean: of them all, as a part of the budget, in (0, 1].
    """
    below, above = 0.0, 1e6  # the budget in scales of the exponential: its mean falls with that
    for _ in range(100):
        rate = (below + above) / 2
        below, above = (rate, above) if -math.expm1(-rate) > mean * rate else (below, rate)
    quantiles = (np.arange(count) + 0.5) / count
    longest = -np.log1p(-quantiles) / max(above, 1e-9)
    return np.clip(np.ceil(budget * longest), 1, budget).astype(int)


def decode_steps(responses: np.ndarray, slots: int) -> int:
    """Steps of decoding until responses of these lengths, in any order, have all ended: the slot of
    one that ends takes the next.
    """
    ends = [0] * slots
    for tokens in np.random.default_rng(0).permutation(responses):
        heapq.heapreplace(ends, ends[0] + int(tokens))
    return max(ends)


def reads(prompt: float, responses: np.ndarray) -> float:
    """Tokens of the cache that all steps of decoding read, of responses to prompts so long."""
    return float(np.sum(responses * (prompt + responses / 2)))


def packed(
    rows: Sequence[Lengths], targets: Sequence[int], buckets: Sequence[Lengths], microbatch: int
) -> Packed:
    """The microbatches that rows make (`stages.batch.pack`).

    Args:
      rows: tokens that are computed of each one's sequences.
      targets: of its response.
      buckets: the shapes, ascending.
      microbatch: rows of one.
    """
    parts = arranged(rows, buckets, microbatch)
    counts = [len(members) for members in parts]
    of_bucket = [sum(targets[i] for part in members for i in part) for members in parts]
    computed = [n * microbatch * sum(b.values()) for n, b in zip(counts, buckets, strict=True)]
    return Packed(
        counts,
        [total / max(1, n) for total, n in zip(of_bucket, counts, strict=True)],
        sum(sum(row.values()) for row in rows) / sum(computed),
    )
