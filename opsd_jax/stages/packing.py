"""Decides which responses share a row, and which rows form a microbatch.

The rows have one of a few lengths. For growing numbers of rows, the responses are placed in them,
the longest first, each in a row that still has room for it, until all have a place. The result
depends only on the lengths of the responses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Lengths = Mapping[str, int]  # tokens of a row's sequences: {"student": 2048, "teacher": 3072}

TOKENS_PER_RESPONSE = 16  # a row of T tokens has at most T / 16 responses
MOST_TRIALS = 64  # numbers of rows in which a batch tries to place its responses
FURTHEST = 0.15  # how many more tokens the last trial has than the first one, as a fraction
MOST_UNITS = 256  # a trial has at most this many units of rows; large batches have larger units

# How to choose the row for a response: `(room left in each row, sizes of the rows) -> rank`, as
# fractions of the longest row, [R, sequences of a row]. The batch takes the first that succeeds.
RANKS = (
    # The fullest row, with about equal room for each of its sequences.
    lambda left_RxS, size_RxS: left_RxS.sum(1) + left_RxS.max(1) - left_RxS.min(1),
    # The first row.
    lambda left_RxS, size_RxS: np.zeros(len(left_RxS)),
    # The emptiest row of the shorter length.
    lambda left_RxS, size_RxS: 10 * size_RxS.sum(1) - left_RxS.min(1),
)


class Packing(NamedTuple):
    """Lets several responses share a row.

    Attributes:
      row_shards: the number of shards over which the rows of a microbatch are split. Rows that do
        not fill a microbatch are computed in microbatches of this many rows.
    """

    row_shards: int = 1


class Shape(NamedTuple):
    """The shape of a bucket's microbatches.

    Attributes:
      lengths: padded lengths of the sequences.
      rows: number of rows.
      responses: the most responses in a row; 0 if each row has a single response, so that its
        arrays have no axis for them.
    """

    lengths: Lengths
    rows: int
    responses: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens that a row computes."""
        return sum(self.lengths.values())


# For each shape its microbatches, each a list of rows, each a list of indices of responses.
Arrangement = list[list[list[list[int]]]]


def shapes_of(
    buckets: Sequence[Lengths], microbatch: int, packing: Packing | None = None
) -> list[Shape]:
    """Returns the shapes of a batch's microbatches: one or two for each bucket.

    Args:
      buckets: padded lengths of the sequences, ascending.
      microbatch: number of rows in a microbatch.
      packing: how responses share rows. With it, a second shape has fewer rows, unless every shard
        has only one row. None gives each response a row of its own.
    """
    if packing is None:
        return [Shape(lengths, microbatch) for lengths in buckets]
    rows = sorted({microbatch, packing.row_shards}, reverse=True)
    return [
        Shape(lengths, n, max(1, lengths["student"] // TOKENS_PER_RESPONSE))
        for lengths in buckets
        for n in rows
    ]


def arranged(
    lengths: Sequence[Lengths],
    buckets: Sequence[Lengths],
    microbatch: int,
    packing: Packing | None = None,
) -> Arrangement:
    """Groups responses into rows, and rows into microbatches, with as little padding as possible.

    Args:
      lengths: tokens of each response's sequences.
      buckets, microbatch, packing: as in `shapes_of`.

    Returns:
      The microbatches of each shape of `shapes_of`.

    Raises:
      ValueError: a response fits no bucket.
    """
    shapes = shapes_of(buckets, microbatch, packing)
    apart = _apart(lengths, buckets, microbatch)
    if packing is None:
        return apart
    per_bucket = len(shapes) // len(buckets)
    found: Arrangement = [[] for _ in shapes]
    found[::per_bucket] = apart
    cost = _cost(found, shapes)
    rows = _shared_rows(lengths, shapes[::per_bucket], packing.row_shards, below=cost)
    for b, of_bucket in enumerate(rows or ()):
        whole = len(of_bucket) // microbatch * microbatch
        last = b * per_bucket + per_bucket - 1
        found[b * per_bucket] = _split(of_bucket[:whole], microbatch)
        found[last] = found[last] * (per_bucket == 1) + _split(of_bucket[whole:], shapes[last].rows)
    return found


def first_that_holds(buckets: Sequence[Lengths], needed: Lengths) -> int:
    """Returns the index of the first bucket that a response fits into, or raises ValueError."""
    for b, bucket in enumerate(buckets):
        if all(needed[name] <= size for name, size in bucket.items()):
            return b
    raise ValueError(
        f"a row has the lengths {dict(needed)}, in tokens; expected at most {dict(buckets[-1])}, "
        "the stage's largest bucket. Increase the last value of the stage's `buckets`."
    )


def _apart(lengths: Sequence[Lengths], buckets: Sequence[Lengths], microbatch: int) -> Arrangement:
    """Gives every response a row. Rows of similar length share a microbatch."""
    chosen = [first_that_holds(buckets, needed) for needed in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (chosen[i], lengths[i]["student"]))
    # From the longest row down, which gives the least padding.
    parts = [order[max(0, end - microbatch) : end] for end in range(len(order), 0, -microbatch)]
    return [
        [[[i] for i in part] for part in parts if chosen[part[-1]] == b]
        for b in range(len(buckets))
    ]


def _cost(arrangement: Arrangement, shapes: Sequence[Shape]) -> int:
    """Returns the number of tokens that an arrangement computes."""
    return sum(
        len(parts) * shape.rows * shape.tokens
        for parts, shape in zip(arrangement, shapes, strict=True)
    )


def _split(rows: list, size: int) -> list[list]:
    """Splits rows into microbatches of `size` rows; the last one may have fewer."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _shared_rows(
    lengths: Sequence[Lengths], shapes: Sequence[Shape], multiple: int, *, below: int
) -> list[list[list[int]]] | None:
    """Places responses in rows of one or two lengths, as few tokens in total as it finds.

    Args:
      lengths: tokens of each response's sequences.
      shapes: one shape for each bucket, ascending.
      multiple: the number of rows of each length is a multiple of it.
      below: the tokens of the rows must be fewer.

    Returns:
      The rows of each bucket, as lists of indices of responses; None if it finds no such rows.
    """
    if not lengths:
        return None
    names = list(shapes[0].lengths)
    needed_NxS = np.array([[needed[name] for name in names] for needed in lengths])
    size_BxS = np.array([[shape.lengths[name] for name in names] for shape in shapes])
    for (small, of_small), (large, of_large) in _trials(needed_NxS, size_BxS, multiple, below):
        chosen = [*[small] * of_small, *[large] * of_large]
        most = [shapes[b].responses for b in chosen]
        for rank in RANKS:
            rows = _placed(needed_NxS, size_BxS[chosen], most, rank)
            if rows is not None:
                return [
                    [row for row, bucket in zip(rows, chosen, strict=True) if bucket == b]
                    for b in range(len(shapes))
                ]
    return None


def _trials(
    needed_NxS: np.ndarray, size_BxS: np.ndarray, multiple: int, below: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yields numbers of rows of two buckets that may hold all responses, fewest tokens first.

    The later trials are further apart. Large batches have fewer of them, because each takes longer.

    Yields:
      `(smaller bucket, its rows), (larger bucket, its rows)`.
    """
    count, total_S, tokens_B = len(needed_NxS), needed_NxS.sum(0), size_BxS.sum(1)
    unit = multiple * -(-count // (MOST_UNITS * multiple))
    found = []  # arrays of (tokens, rows of the larger bucket, those of the smaller, the buckets)
    for small, large in itertools.combinations_with_replacement(range(len(size_BxS)), 2):
        if np.any(size_BxS[large] < needed_NxS.max(0)):
            continue
        only_large_S = needed_NxS[np.any(needed_NxS > size_BxS[small], axis=1)].sum(0)
        most = (below - 1) // (tokens_B[[small, large]] * unit)
        most = np.minimum(most, -(-count // multiple) * multiple // unit)
        most[0] *= small != large
        of_small_C, of_large_C = np.indices(most + 1).reshape(2, -1) * unit
        room_CxS = of_large_C[:, None] * size_BxS[large]
        enough_C = np.all(room_CxS >= only_large_S, axis=1) & (of_large_C > 0)
        enough_C &= np.all(room_CxS + of_small_C[:, None] * size_BxS[small] >= total_S, axis=1)
        cost_C = of_small_C * tokens_B[small] + of_large_C * tokens_B[large]
        columns = (cost_C, of_large_C, of_small_C, 0 * cost_C + small, 0 * cost_C + large)
        found.append(np.stack(columns, axis=1)[enough_C & (cost_C < below)])
    if not found:
        return
    candidates = np.concatenate(found)
    # Of the same number of tokens, longer rows are easier to fill.
    candidates = candidates[np.lexsort((-candidates[:, 1], candidates[:, 0]))]
    trials, at = min(MOST_TRIALS, max(8, 128 * MOST_TRIALS // count)), 0
    for trial in range(1, trials + 1):
        if at >= len(candidates):
            return
        _, of_large, of_small, small, large = candidates[at].tolist()
        yield (small, of_small), (large, of_large)
        least = candidates[0, 0] * (1 + FURTHEST * (trial / trials) ** 2)
        at = max(at + 1, int(np.searchsorted(candidates[:, 0], least)))


def _placed(
    needed_NxS: np.ndarray,
    size_RxS: np.ndarray,
    most: Sequence[int],
    rank: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> list[list[int]] | None:
    """Places responses in rows, the longest first, each in a row with room for it.

    Args:
      needed_NxS: tokens of each response's sequences.
      size_RxS: length of each row's sequences.
      most: the most responses in each row.
      rank: one of RANKS. A response goes to the row with the lowest rank.

    Returns:
      The responses of each row; None if not all of them have room.
    """
    scale_S = size_RxS.max(0)
    part_RxS, part_NxS = size_RxS / scale_S, needed_NxS / scale_S
    free_RxS, places_R = part_RxS.copy(), np.array(most)
    rows: list[list[int]] = [[] for _ in size_RxS]
    for i in np.argsort(-part_NxS.max(1), kind="stable").tolist():
        left_RxS = free_RxS - part_NxS[i]
        fits_R = (left_RxS.min(1) > -1e-9) & (places_R > 0)
        if not fits_R.any():
            return None
        row = int(np.argmin(np.where(fits_R, rank(left_RxS, part_RxS), np.inf)))
        free_RxS[row], places_R[row] = left_RxS[row], places_R[row] - 1
        rows[row].append(i)
    return rows
