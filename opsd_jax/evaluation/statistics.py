"""Figures of an evaluation: pure functions of its records, some responses to each of G problems.

A record is what a line of `responses.jsonl` holds (evaluation/evaluate.py). Responses to one
problem are not independent, so every standard error is clustered by problem. docs/evaluation.md has
the equations.
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

# What is counted of a response.
COUNTED: dict[str, Callable[[Record], float]] = {
    "responses": lambda record: 1,
    "correct": lambda record: record["correct"],
    "truncated": lambda record: record["truncated"],
    "boxed": lambda record: extract.extract(record["response"], ("boxed",)) is not None,
    "tokens": lambda record: record["length"],
    "tokens_correct": lambda record: record["length"] * record["correct"],
    "markers": lambda record: markers.count(record["response"]),
}

# Figure -> (numerator, denominator, scale): sums over all responses, divided.
RATIOS = {
    "accuracy": ("correct", "responses", 1),
    "truncation_rate": ("truncated", "responses", 1),
    "boxed_rate": ("boxed", "responses", 1),
    "mean_length": ("tokens", "responses", 1),
    "mean_length_correct": ("tokens_correct", "correct", 1),
    "markers_per_1000": ("markers", "tokens", 1000),
}


def by_problem(records: Iterable[Record]) -> dict[Any, list[Record]]:
    """The records of each problem, in the order in which the problems come."""
    grouped: dict[Any, list[Record]] = {}
    for record in records:
        grouped.setdefault(record["problem"], []).append(record)
    return grouped


def by_source(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each source: benchmark."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record.get("source", ""), []).append(record)
    return grouped


def sums(grouped: Sequence[Records]) -> dict[str, np.ndarray]:
    """Of each problem the sum of each of COUNTED over its responses, float64 [G]."""
    return {
        name: np.array([sum(of(record) for record in group) for group in grouped], np.float64)
        for name, of in COUNTED.items()
    }


def ratio(numerator_G: np.ndarray, denominator_G: np.ndarray) -> tuple[float, float]:
    """sum(numerator) / sum(denominator) over problems, and its clustered standard error.

    By linearisation: sqrt(G / (G - 1) sum_g (n_g - r d_g)^2) / sum_g d_g. With as many responses to
    each problem that is, for a mean, the standard deviation of the problems' means over sqrt(G).
    nan where nothing is counted, and the error of a single problem.
    """
    total, G = denominator_G.sum(), len(denominator_G)
    if not total:
        return math.nan, math.nan
    value = numerator_G.sum() / total
    error = deviation(numerator_G - value * denominator_G) / total if G > 1 else math.nan
    return float(value), float(error)


def deviation(residual_G: np.ndarray) -> float:
    """sqrt(G / (G - 1) sum_g residual_g^2): of a sum over G independent problems."""
    G = len(residual_G)
    return float(np.sqrt(np.square(residual_G).sum() * G / (G - 1)))


def pass_at(k: int, *, samples: int, correct: int) -> float:
    """The chance that k of a problem's samples, drawn without replacement, have a correct one:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374). Unbiased for pass@k.
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(records: Records) -> float:
    """Whether the answer that most of a problem's responses give is correct, in [0, 1].

    Correct responses vote for one answer, the others for what they give, in one spelling; those
    that are truncated or give none do not vote. Of n answers with the most votes each counts 1/n.
    """
    votes: Counter[str | None] = Counter()
    for record in records:
        if record["correct"]:
            votes[None] += 1
        elif not record["truncated"] and record["extracted"] is not None:
            votes[normalise(record["extracted"][: extract.LONGEST])] += 1
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return (None in winners) / len(winners) if winners else 0.0


def _lengths(records: Records, suffix: str) -> dict[str, float]:
    lengths = [record["length"] for record in records]
    middle, high = np.percentile(lengths, (50, 95)) if lengths else (math.nan, math.nan)
    return {f"median_length{suffix}": float(middle), f"p95_length{suffix}": float(high)}


def figures(records: Records) -> dict[str, Any]:
    """The figures of one set of records; one at least.

    Returns:
      Each of RATIOS and its error, `..._se`; `median_length`, `p95_length` and the same over the
      correct responses alone, `..._correct`; `pass_at`, a dictionary from k = 1, 2, 4, ..., n to
      the value, and `pass_at_se`; `majority` and `majority_se`, if the verifier tells the answer;
      the numbers of `problems`, of `responses`, and of `samples`, responses a problem (the fewest).
      Lengths are in tokens, EOS included. nan where there is nothing to tell.
    """
    grouped = list(by_problem(records).values())
    counted = sums(grouped)
    found: dict[str, Any] = {}
    for name, (numerator, denominator, scale) in RATIOS.items():
        value, error = ratio(counted[numerator], counted[denominator])
        found |= {name: scale * value, f"{name}_se": scale * error}
    found |= _lengths(records, "")
    found |= _lengths([record for record in records if record["correct"]], "_correct")

    each = np.ones(len(grouped))
    samples = min(map(len, grouped))
    tried = sorted({*(2**i for i in range(samples.bit_length())), samples})
    passed = {
        str(k): ratio(
            np.array(
                [
                    pass_at(k, samples=len(group), correct=sum(r["correct"] for r in group))
                    for group in grouped
                ]
            ),
            each,
        )
        for k in tried
    }
    found["pass_at"] = {k: value for k, (value, _) in passed.items()}
    found["pass_at_se"] = {k: error for k, (_, error) in passed.items()}
    if all("extracted" in record for record in records):
        voted = ratio(np.array([majority(group) for group in grouped]), each)
        found["majority"], found["majority_se"] = voted
    return found | {
        "problems": len(grouped),
        "samples": samples,
        "responses": len(records),
    }


def summarise(records: Records) -> dict[str, Any]:
    """`figures` of all records, and in `sources` those of each source, where there are several."""
    sources = by_source(records)
    several = {name: figures(part) for name, part in sources.items()} if len(sources) > 1 else {}
    return figures(records) | {"sources": several}
