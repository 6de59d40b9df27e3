"""Metrics of an evaluation: on recorded responses of a real model, and against plain loops."""

import itertools
import json
import math
import statistics as stdlib

import numpy as np
import pytest
import tiny_config
from paths import SHARED

from opsd_jax.data import arithmetic
from opsd_jax.evaluation import comparison, statistics
from opsd_jax.problem import Problem
from opsd_jax.verify import extract, verifiers
from opsd_jax.verify.maths import maths

RECORDED = SHARED / "verifier/rollouts_math_qwen.jsonl"


def record(problem, sample, *, correct, length, response="", **more):
    return {
        "problem": problem,
        "source": "",
        "sample": sample,
        "response": response,
        "correct": correct,
        "truncated": False,
        "length": length,
        "extracted": extract.extract(response),
    } | more


@pytest.fixture(scope="module")
def recorded():
    """300 labelled responses of a real model to 72 problems, with their words counted as tokens."""
    if not RECORDED.exists():
        pytest.skip(f"there is no {RECORDED}")
    rows = map(json.loads, RECORDED.read_text().splitlines())
    return [
        record(
            row["id"].rsplit("-", 1)[0],
            int(row["id"].rsplit("-", 1)[1]),
            correct=row["expect"],
            length=len(row["pred"].split()),
            response=row["pred"],
        )
        for row in rows
    ]


def clustered(values, weights=None):
    """Computes a mean, or a ratio of sums, and its cluster-robust standard error in plain loops.

    Args:
      values: (problem, value) of each response.
      weights: (problem, weight) of each response, the denominators of the ratio; None for a mean.
    """
    problems = sorted({problem for problem, _ in values})
    weights = weights or [(problem, 1) for problem, _ in values]
    total = sum(weight for _, weight in weights)
    mean = sum(value for _, value in values) / total
    meat = 0.0
    for one in problems:
        score = sum(value for problem, value in values if problem == one)
        score -= mean * sum(weight for problem, weight in weights if problem == one)
        meat += score * score
    G = len(problems)
    return mean, math.sqrt(G / (G - 1) * meat) / total


def test_recorded_responses(recorded):
    metrics = statistics.summarise(recorded)
    right = [r for r in recorded if r["correct"]]
    of = lambda key: [(r["problem"], r[key]) for r in recorded]
    words = lambda r: sum(
        word.strip(".,;:!?()*\"'").lower() in {"check", "verify", "however", "wait", "might"}
        for word in r["response"].split()
    )
    expected = {
        "accuracy": clustered(of("correct")),
        "mean_length": clustered(of("length")),
        "mean_length_correct": clustered(
            [(r["problem"], r["length"] * r["correct"]) for r in recorded], of("correct")
        ),
        "boxed_rate": clustered([(r["problem"], "\\boxed" in r["response"]) for r in recorded]),
        "truncation_rate": (0.0, 0.0),
    }
    markers = clustered([(r["problem"], 1000 * words(r)) for r in recorded], of("length"))
    assert markers[0] > 0
    assert metrics["markers_per_1000"] >= markers[0] - 1e-9
    for name, (value, error) in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-12), name
        assert metrics[f"{name}_se"] == pytest.approx(error, rel=1e-9), name
    lengths = [r["length"] for r in recorded]
    assert metrics["median_length"] == stdlib.median(lengths)
    assert metrics["p95_length"] == pytest.approx(np.quantile(lengths, 0.95))
    assert metrics["median_length_correct"] == stdlib.median(r["length"] for r in right)
    assert metrics["accuracy"] == 278 / 300
    assert (metrics["problems"], metrics["responses"], metrics["samples"]) == (72, 300, 1)


def test_equal_numbers_of_samples_give_the_textbook_standard_error():
    rng = np.random.default_rng(0)
    correct = rng.random((50, 4)) < rng.random((50, 1))
    records = [
        record(i, j, correct=bool(correct[i, j]), length=1) for i in range(50) for j in range(4)
    ]
    metrics = statistics.metrics(records)
    assert metrics["accuracy"] == correct.mean()
    error = correct.mean(axis=1).std(ddof=1) / math.sqrt(50)
    assert metrics["accuracy_se"] == pytest.approx(error, rel=1e-12)
    assert metrics["pass_at"]["1"] == pytest.approx(correct.mean(), rel=1e-12)
    assert metrics["pass_at_se"]["1"] == pytest.approx(error, rel=1e-12)
    assert list(metrics["pass_at"]) == ["1", "2", "4"]
    assert metrics["pass_at"]["4"] == pytest.approx(correct.any(axis=1).mean(), rel=1e-12)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        outcomes = [i < c for i in range(n)]
        subsets = [any(subset) for subset in itertools.combinations(outcomes, k)]
        assert statistics.pass_at(k, samples=n, correct=c) == pytest.approx(np.mean(subsets))


def test_majority_by_brute_force():
    """All votes of four responses: correct, incorrect, truncated, or without an answer."""
    kinds = {
        "right": {"correct": True, "extracted": "1/2"},
        "right, written otherwise": {"correct": True, "extracted": "0.5"},
        "3": {"correct": False, "extracted": "3"},
        "3, written otherwise": {"correct": False, "extracted": " $3$ "},
        "4": {"correct": False, "extracted": "4"},
        "none": {"correct": False, "extracted": None},
        "cut": {"correct": False, "extracted": "4", "truncated": True},
    }
    means = {"right": "gold", "3": "three", "4": "four"}
    for votes in itertools.product(kinds, repeat=4):
        records = [
            record("p", i, length=1, **({"correct": False} | kinds[kind]))
            for i, kind in enumerate(votes)
        ]
        counted = [means[vote.split(",")[0]] for vote in votes if vote.split(",")[0] in means]
        tally = {answer: counted.count(answer) for answer in counted}
        first = [answer for answer, count in tally.items() if count == max(tally.values())]
        assert statistics.majority(records) == ("gold" in first) / max(len(first), 1), votes


def test_majority_needs_an_extracted_answer_in_every_record():
    records = [record(0, 0, correct=True, length=3), record(1, 0, correct=False, length=4)]
    assert statistics.metrics(records)["majority"] == 0.5
    del records[1]["extracted"]
    assert "majority" not in statistics.metrics(records)


def test_metrics_that_cannot_be_computed_are_nan():
    metrics = statistics.metrics([record(i, 0, correct=False, length=2) for i in range(3)])
    assert math.isnan(metrics["mean_length_correct"])
    assert math.isnan(metrics["median_length_correct"])
    assert math.isnan(statistics.metrics([record(0, 0, correct=True, length=2)])["accuracy_se"])


def test_each_source_has_its_own_metrics(recorded):
    mixed = [r | {"source": "ab"[i % 2]} for i, r in enumerate(recorded)]
    metrics = statistics.summarise(mixed)
    for name in "ab":
        part = [r for r in mixed if r["source"] == name]
        assert metrics["sources"][name] == statistics.metrics(part)
    assert statistics.summarise(recorded)["sources"] == {}


@pytest.fixture(scope="module")
def pair():
    """Records of two models on 300 problems; the second is 30 % shorter and no more accurate."""
    rng = np.random.default_rng(3)
    hard = rng.random(300)
    sides = []
    for samples, shorter in ((4, 1.0), (2, 0.7)):
        sides.append(
            [
                record(
                    i,
                    j,
                    correct=bool(rng.random() > hard[i]),
                    length=int(shorter * rng.gamma(5, 20 * (0.5 + hard[i])) + 1),
                    response="wait " * int(rng.poisson(3 * shorter)),
                )
                for i in range(300)
                for j in range(samples)
            ]
        )
    return sides


def test_changes_and_their_errors(pair):
    """The intervals are close to those of a normal distribution."""
    before, after = pair
    change = comparison.compare(before, after)
    mean = lambda side, key: np.mean([r[key] for r in side])
    points = 100 * (mean(after, "correct") - mean(before, "correct"))
    assert change["d_accuracy_points"] == pytest.approx(points)
    percent = 100 * (mean(after, "length") / mean(before, "length") - 1)
    assert change["d_length_percent"] == pytest.approx(percent)
    by_problem = [
        np.array([r["correct"] for r in side], float).reshape(300, -1).mean(axis=1) for side in pair
    ]
    error = 100 * (by_problem[1] - by_problem[0]).std(ddof=1) / math.sqrt(300)
    assert change["d_accuracy_points_se"] == pytest.approx(error, rel=1e-9)
    for name in comparison.CHANGES:
        value, se, low, high = (change[f"{name}{end}"] for end in ("", "_se", "_low", "_high"))
        assert low < value < high
        assert low == pytest.approx(value - 1.96 * se, abs=0.15 * se), name
        assert high == pytest.approx(value + 1.96 * se, abs=0.15 * se), name
    assert change["d_length_percent_high"] < -20
    assert change["problems"] == 300


def test_a_comparison_pairs_records_by_problem(pair):
    before, after = pair
    shuffled = [before[i] for i in np.random.default_rng(0).permutation(len(before))]
    assert comparison.compare(shuffled, after) == comparison.compare(before, after)
    same = comparison.compare(before, before)
    assert all(same[f"{name}{end}"] == 0 for name in comparison.CHANGES for end in ("", "_high"))
    with pytest.raises(
        ValueError,
        match=r"has 300 problems, the second has 299, and 299 are in both; .* has problem 299",
    ):
        comparison.compare(before, [r for r in after if r["problem"] != 299])


def test_verifiers_extract_the_answer_that_votes():
    problem = Problem("p", "", "", "B", "a")
    text = r"<think>\boxed{9}</think> So \boxed{ 1,000 } or (B). #### $2.50"
    extracted = lambda verifier, response=text: verifier.extract(problem, response)
    assert extracted(verifiers.exact()) == "1,000"
    assert extracted(verifiers.exact(("####",))) == "$2.50"
    assert extracted(verifiers.numeric()) == "1000.0"
    assert extracted(verifiers.numeric(("####",)), "#### none") is None
    assert extracted(verifiers.choice(("text",)), "The answer is (C).") == "C"
    assert extracted(maths(("boxed", "####"))) == "1,000"
    # A verifier that accepts responses it cannot read an answer from has no `extract` at all.
    assert maths(("boxed", "text")).extract is None
    assert verifiers.combine([maths(), maths(("text",))], every=False).extract is None
    both = verifiers.combine([verifiers.numeric(("####",)), verifiers.exact()], every=False)
    assert extracted(both) == "2.5"
    assert extracted(both, r"\boxed{x}") == "x"
    assert extracted(verifiers.by_source({"a": maths()})) == "1,000"
    own = verifiers.as_verifier(lambda problem, response: True)
    assert own.extract is None
    assert verifiers.by_source({"a": maths(), "b": own}).extract is None
    assert verifiers.combine([own, own], every=True).extract is None
    miniature = arithmetic.task(tiny_config.quickstart().data).verify
    assert extracted(miniature, "<think> a </think> 7 <eos>") == "7"
    assert extracted(miniature, "<think> a </think> 7") is None
