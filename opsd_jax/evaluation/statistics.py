"""Metrics of an evaluation, as pure functions of its records.

A record is a line of `responses.jsonl` (evaluation/records.py): one response to one problem.
Responses to the same problem are not independent, so every standard error is clustered by problem.
docs/evaluation.md has the equations. In the shapes, G is the number of problems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from opsd_jax.evaluation import markers
from opsd_jax.verify import extract
from opsd_jax.verify.normalise import normalise

Record = dict[str, Any]
Records = Sequence[Record]

# Count -> its value for one response.
COUNTS: dict[str, Callable[[Record], float]] = {
    "responses": lambda record: 1,
    "correct": lambda record: record["correct"],
    "truncated": lambda record: record["truncated"],
    "boxed": lambda record: extract.extract(record["response"], ("boxed",)) is not None,
    "tokens": lambda record: record["length"],
    "tokens_correct": lambda record: record["length"] * record["correct"],
    "markers": lambda record: markers.count(record["response"]),
}

# Metric -> (numerator, denominator, scale). Both are counts, summed over all responses.
RATIOS = {
    "accuracy": ("correct", "responses", 1),
    "truncation_rate": ("truncated", "responses", 1),
    "boxed_rate": ("boxed", "responses", 1),
    "mean_length": ("tokens", "responses", 1),
    "mean_length_correct": ("tokens_correct", "correct", 1),
    "markers_per_1000": ("markers", "tokens", 1000),
}


def by_problem(records: Iterable[Record]) -> dict[Any, list[Record]]:
    """Groups records by problem, in the order in which the problems first occur."""
    grouped: dict[Any, list[Record]] = {}
    for record in records:
        grouped.setdefault(record["problem"], []).append(record)
    return grouped


def by_source(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Groups records by the source of their problem, such as a benchmark."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record.get("source", ""), []).append(record)
    return grouped


def sums(grouped: Sequence[Records]) -> dict[str, np.ndarray]:
    """Sums each count in COUNTS over the responses to each problem.

    Args:
      grouped: the records of each of G problems.

    Returns:
      For each of COUNTS its sums, float64 [G].
    """
    return {
        name: np.array([sum(of(record) for record in group) for group in grouped], np.float64)
        for name, of in COUNTS.items()
    }


def ratio(numerator_G: np.ndarray, *, denominator_G: np.ndarray) -> tuple[float, float]:
    """Computes the ratio of two sums over problems, and its standard error.

    The standard error is clustered by problem and comes from linearisation. With n_g and d_g the
    numerator and denominator of problem g, and r the ratio, it is
    sqrt(G / (G - 1) sum_g (n_g - r d_g)^2) / sum_g d_g.

    Args:
      numerator_G: numerators, [G].
      denominator_G: denominators, [G].

    Returns:
      (sum(numerator) / sum(denominator), standard error). Both are nan if the denominators sum to
      0. The standard error is nan for a single problem.
    """
    total, G = denominator_G.sum(), len(denominator_G)
    if not total:
        return math.nan, math.nan
    value = numerator_G.sum() / total
    error = deviation(numerator_G - value * denominator_G) / total if G > 1 else math.nan
    return float(value), float(error)


def deviation(residual_G: np.ndarray) -> float:
    """Returns the standard error of a sum over G independent problems.

    Args:
      residual_G: the difference of each problem's term from its expected value, [G].
    """
    G = len(residual_G)
    return float(np.sqrt(np.square(residual_G).sum() * G / (G - 1)))


def pass_at(k: int, *, samples: int, correct: int) -> float:
    """Returns the unbiased estimate of pass@k for one problem: 1 - C(n - c, k) / C(n, k).

    This is the probability that k of the n samples, drawn without replacement, include a correct
    one.

    Args:
      k: number of samples that are drawn, at most `samples`.
      samples: number n of responses to the problem.
      correct: number c of correct responses.

    Reference: Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(records: Records) -> float:
    """Scores a problem's majority vote: 1 if correct, 0 if incorrect, or a fraction for a tie.

    All correct responses vote for the same answer. An incorrect response votes for the answer that
    was extracted from it, after normalisation. Truncated responses and responses without an answer
    do not vote. If several answers tie for the most votes, the score is the fraction of them that
    is correct.

    Args:
      records: the responses to the problem, with their extracted answers.
    """
    votes: Counter[str | None] = Counter()  # None stands for the correct answer
    for record in records:
        if record["correct"]:
            votes[None] += 1
        elif not record["truncated"] and record["extracted"] is not None:
            votes[normalise(record["extracted"][: extract.LONGEST])] += 1
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return (None in winners) / len(winners) if winners else 0.0


def _lengths(records: Records, suffix: str) -> dict[str, float]:
    """Returns the median and 95th percentile of response lengths; nan if there are no records."""
    lengths = [record["length"] for record in records]
    median, p95 = np.percentile(lengths, (50, 95)) if lengths else (math.nan, math.nan)
    return {f"median_length{suffix}": float(median), f"p95_length{suffix}": float(p95)}


def _passes(grouped: Sequence[Records]) -> dict[str, dict[str, float]]:
    """Returns the mean pass@k over problems and its standard error, for k = 1, 2, 4, ..."""
    ones_G = np.ones(len(grouped))
    samples = min(map(len, grouped))
    tried = sorted({*(2**i for i in range(samples.bit_length())), samples})
    correct = [sum(record["correct"] for record in group) for group in grouped]
    found = {}
    for k in tried:
        each = [
            pass_at(k, samples=len(group), correct=c)
            for group, c in zip(grouped, correct, strict=True)
        ]
        found[str(k)] = ratio(np.array(each), denominator_G=ones_G)
    return {
        "pass_at": {k: value for k, (value, _) in found.items()},
        "pass_at_se": {k: error for k, (_, error) in found.items()},
    }


def metrics(records: Records) -> dict[str, Any]:
    """Computes accuracy, response length, pass@k and other metrics from records.

    Args:
      records: at least one.

    Returns:
      A dictionary of these metrics. Lengths are in tokens and include EOS. A metric that cannot be
      computed, such as the length of correct responses if there are none, is nan.
      - each of RATIOS, and its standard error `..._se`;
      - `median_length` and `p95_length` of all responses, and `median_length_correct` and
        `p95_length_correct` of the correct ones;
      - `pass_at` and `pass_at_se`, dictionaries from k = "1", "2", "4", ..., n to pass@k;
      - `majority` and `majority_se`, if every record has an `extracted` answer;
      - `problems`, `responses` and `samples`: the number of problems, of responses, and of
        responses to each problem (the minimum if it varies).
    """
    grouped = list(by_problem(records).values())
    counts = sums(grouped)
    found: dict[str, Any] = {}
    for name, (numerator, denominator, scale) in RATIOS.items():
        value, error = ratio(counts[numerator], denominator_G=counts[denominator])
        found |= {name: scale * value, f"{name}_se": scale * error}
    found |= _lengths(records, "")
    found |= _lengths([record for record in records if record["correct"]], "_correct")
    found |= _passes(grouped)
    if all("extracted" in record for record in records):
        votes_G = np.array([majority(group) for group in grouped])
        ones_G = np.ones(len(grouped))
        found["majority"], found["majority_se"] = ratio(votes_G, denominator_G=ones_G)
    return found | {
        "problems": len(grouped),
        "samples": min(map(len, grouped)),
        "responses": len(records),
    }


def summarise(records: Records) -> dict[str, Any]:
    """Computes the metrics of all records, and of each source separately.

    Args:
      records: at least one.

    Returns:
      `metrics(records)`, and in `sources` a dictionary from source to the metrics of its records.
      It is empty if there is only one source.
    """
    sources = by_source(records)
    several = {name: metrics(part) for name, part in sources.items()} if len(sources) > 1 else {}
    return metrics(records) | {"sources": several}
