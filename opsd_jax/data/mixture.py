"""Several data sets as one endless one, each with its share."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain


def mixture(
    sources: Mapping[str, Sequence[Any]], weights: Mapping[str, float], seed: int
) -> grain.MapDataset:
    """The elements of several sources, interleaved in proportion to their weights.

    Each source is gone through in an order of its own, a new one each time round. Element i is a
    function of (seed, i) and the sources: there is no state to keep, and any host can take any.

    Args:
      sources: name -> elements, at least one.
      weights: name -> its share, above 0, in any unit; of other names too.
      seed: of the orders.

    Returns:
      A data set as long as it takes to go through each source once at least; indices beyond that go
      on with further rounds.
    """
    names = sorted(sources)
    shuffled = [
        # grain adds the number of the round to a seed: neighbouring ones would not do.
        grain.MapDataset.source(sources[name]).shuffle(seed=zlib.crc32(f"{seed}/{name}".encode()))
        for name in names
    ]
    shares = [weights[name] / sum(weights[name] for name in names) for name in names]
    mixed = grain.MapDataset.mix(shuffled, shares)
    longest = max(len(part) / share for part, share in zip(shuffled, shares, strict=True))
    # To repeat changes the length alone: the parts go on by themselves. grain keeps shares to 1 %.
    return mixed.repeat(math.ceil(1.01 * longest / len(mixed)))
