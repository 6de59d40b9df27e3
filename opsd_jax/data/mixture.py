"""Mixes several datasets into one endless dataset."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain


def mixture(
    sources: Mapping[str, Sequence[Any]], weights: Mapping[str, float], seed: int
) -> grain.MapDataset:
    """Returns an endless dataset that interleaves sources in proportion to their weights.

    Each source is shuffled on its own, and again for each epoch. Element i is a pure function of
    (seed, i) and the sources, so there is no iterator state to save, and any host can read any
    element.

    Args:
      sources: name -> elements. At least one source.
      weights: name -> weight above 0, in any unit. It may have further names.
      seed: seed of the shuffles.

    Returns:
      A dataset that is long enough to contain every element once. Larger indices continue with
      further epochs.
    """
    names = sorted(sources)
    shuffled = [
        # grain adds the epoch to the seed, so consecutive seeds would repeat each other's orders.
        grain.MapDataset.source(sources[name]).shuffle(seed=zlib.crc32(f"{seed}/{name}".encode()))
        for name in names
    ]
    fractions = [weights[name] / sum(weights[name] for name in names) for name in names]
    mixed = grain.MapDataset.mix(shuffled, fractions)
    longest = max(len(part) / fraction for part, fraction in zip(shuffled, fractions, strict=True))
    # `repeat` changes only the length, because the shuffled parts are endless by themselves. grain
    # keeps the fractions to within 1 %.
    return mixed.repeat(math.ceil(1.01 * longest / len(mixed)))
