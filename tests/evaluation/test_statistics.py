"""The figures of an evaluation, on recorded responses of a real model and against plain loops."""

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
    """Real responses, 1 to 8 to each of 72 problems, with labels; their words for tokens."""
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
    """A mean of (problem, value)s, or with (problem, weight)s a ratio of sums, and its error by the
    cluster-robust formula, in plain loops: the sandwich with G / (G - 1).
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
    figures = statistics.summarise(recorded)
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
    assert figures["markers_per_1000"] >= markers[0] - 1e-9
    for name, (value, error) in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-12), name
        assert figures[f"{name}_se"] == pytest.approx(error, rel=1e-9), name
    lengths = [r["length"] for r in recorded]
    assert figures["median_length"] == stdlib.median(lengths)
    assert figures["p95_length"] == pytest.approx(np.quantile(lengths, 0.95))
    assert figures["median_length_correct"] == stdlib.median(r["length"] for r in right)
    assert figures["accuracy"] == 278 / 300
    assert (figures["problems"], figures["responses"], figures["samples"]) == (72, 300, 1)


def test_equal_numbers_of_samples_give_the_textbook_s_error():
    rng = np.random.default_rng(0)
    correct = rng.random((50, 4)) < rng.random((50, 1))
    records = [
        record(i, j, correct=bool(correct[i, j]), length=1) for i in range(50) for j in range(4)
    ]
    figures = statistics.figures(records)
    assert figures["accuracy"] == correct.mean()
    error = correct.mean(axis=1).std(ddof=1) / math.sqrt(50)
    assert figures["accuracy_se"] == pytest.approx(error, rel=1e-12)
    assert figures["pass_at"]["1"] == pytest.approx(correct.mean(), rel=1e-12)
    assert figures["pass_at_se"]["1"] == pytest.approx(error, rel=1e-12)
    assert list(figures["pass_at"]) == ["1", "2", "4"]
    assert figures["pass_at"]["4"] == pytest.approx(correct.any(axis=1).mean(), rel=1e-12)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        outcomes = [i < c for i in range(n)]
        subsets = [any(subset) for subset in itertools.combinations(outcomes, k)]
        assert statistics.pass_at(k, samples=n, correct=c) == pytest.approx(np.mean(subsets))


def test_majority_by_brute_force():
    """Every vote of four responses for the right answer, two wrong ones, none, or cut off."""
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


def test_without_answers_there_is_no_majority():
    records = [record(0, 0, correct=True, length=3), record(1, 0, correct=False, length=4)]
    assert statistics.figures(records)["majority"] == 0.5
    del records[1]["extracted"]
    assert "majority" not in statistics.figures(records)


def test_where_nothing_is_correct_there_is_no_length_of_it():
    figures = statistics.figures([record(i, 0, correct=False, length=2) for i in range(3)])
    assert math.isnan(figures["mean_length_correct"])
    assert math.isnan(figures["median_length_correct"])
    assert math.isnan(statistics.figures([record(0, 0, correct=True, length=2)])["accuracy_se"])


def test_sources_have_figures_of_their_own(recorded):
    mixed = [r | {"source": "ab"[i % 2]} for i, r in enumerate(recorded)]
    figures = statistics.summarise(mixed)
    for name in "ab":
        part = [r for r in mixed if r["source"] == name]
        assert figures["sources"][name] == statistics.figures(part)
    assert statistics.summarise(recorded)["sources"] == {}


@pytest.fixture(scope="module")
def pair():
    """Two models on 300 problems, 4 and 2 samples: the second is shorter and no better."""
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
    """The values by hand; the intervals are about those of a normal distribution."""
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


def test_a_comparison_is_of_pairs(pair):
    """Their order changes nothing; a model has not changed from itself; others are refused."""
    before, after = pair
    shuffled = [before[i] for i in np.random.default_rng(0).permutation(len(before))]
    assert comparison.compare(shuffled, after) == comparison.compare(before, after)
    same = comparison.compare(before, before)
    assert all(same[f"{name}{end}"] == 0 for name in comparison.CHANGES for end in ("", "_high"))
    with pytest.raises(ValueError, match=r"300 and 299, of which 299 are in both; 299 is in one"):
        comparison.compare(before, [r for r in after if r["problem"] != 299])


def test_verifiers_tell_the_answer_that_votes():
    problem = Problem("p", "", "", "B", "a")
    text = r"<think>\boxed{9}</think> So \boxed{ 1,000 } or (B). #### $2.50"
    told = lambda verifier, response=text: verifier.extract(problem, response)
    assert told(verifiers.exact()) == "1,000"
    assert told(verifiers.exact(("####",))) == "$2.50"
    assert told(verifiers.numeric()) == "1000.0"
    assert told(verifiers.numeric(("####",)), "#### none") is None
    assert told(verifiers.choice(("text",)), "The answer is (C).") == "C"
    assert told(maths(("boxed", "####"))) == "1,000"
    # What is accepted and cannot be read has no vote: nor then has anything else.
    assert maths(("boxed", "text")).extract is None
    assert verifiers.combine([maths(), maths(("text",))], every=False).extract is None
    both = verifiers.combine([verifiers.numeric(("####",)), verifiers.exact()], every=False)
    assert told(both) == "2.5"
    assert told(both, r"\boxed{x}") == "x"
    assert told(verifiers.by_source({"a": maths()})) == "1,000"
    own = verifiers.as_verifier(lambda problem, response: True)
    assert own.extract is None
    assert verifiers.by_source({"a": maths(), "b": own}).extract is None
    assert verifiers.combine([own, own], every=True).extract is None
    miniature = arithmetic.task(tiny_config.quickstart().data).verify
    assert told(miniature, "<think> a </think> 7 <eos>") == "7"
    assert told(miniature, "<think> a </think> 7") is None
