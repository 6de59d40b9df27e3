"""The generated word problems: right answers, disjoint splits, and demonstrations of two styles."""

import re

import pytest
import tiny_tokenizer

from opsd_jax import config as config_lib
from opsd_jax.config.run_options import parse_run
from opsd_jax.data import word_problems
from opsd_jax.data.word_problems import CHANGES, HELD_OUT, PRIVILEGED_FRACTION, SPACE
from opsd_jax.verify.pool import check_golds

GAINS = ("buys", "finds", "gets")
LOSSES = ("gives", "loses", "sells")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.write(directory, "qwen2")
    config = config_lib.default()
    config.task = "opsd_jax.data.word_problems:task"
    config.data.tokenizer = str(directory)
    return word_problems.task(parse_run(config).data)


def test_the_answer_follows_from_the_question():
    questions = set()
    for number in range(0, SPACE, 401):
        problem = word_problems.problem(number)
        start, *events, _ = problem.question.split(". ")
        value = int(re.search(r"has (\d+)", start)[1])
        for event in events:
            _, verb, change = re.fullmatch(r"(?:Then )?(\w+) (\w+) (\d+) .*", event).groups()
            assert 2 <= int(change) < 2 + CHANGES
            value += int(change) if verb in GAINS else -int(change)
            assert verb in GAINS + LOSSES
            assert value > 0
        assert problem.answer == str(value)
        assert problem.solution.endswith(rf"The answer is \boxed{{{value}}}.")
        questions.add(problem.question)
    assert len(questions) == len(range(0, SPACE, 401))


def test_train_and_held_out_problems_are_disjoint(task):
    heldout = {task.heldout[i].id for i in range(HELD_OUT)}
    assert (len(task.heldout), len(task.train)) == (HELD_OUT, SPACE - HELD_OUT)
    assert len(heldout) == HELD_OUT
    assert heldout.isdisjoint(task.train[i].id for i in range(2000))


def test_every_demonstration_is_correct_and_a_third_of_them_see_the_solution(task):
    demonstrations = task.demonstrations(0)
    privileged = 0
    lengths = {True: [], False: []}
    for i in range(400):
        prompt, response = (task.tokenizer.decode(ids) for ids in demonstrations[i])
        (number,) = re.findall(r"boxed\{(\d+)\}", response)
        equations = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", response)
        assert all(eval(f"{a}{sign}{b}") == int(c) for a, sign, b, c in equations)
        assert number in {c for *_, c in equations}
        shown = rf"\boxed{{{number}}}" in prompt
        lengths[shown].append(len(response))
        privileged += shown
    # Binomial, with a standard deviation of 9.2; five of them.
    assert abs(privileged - 400 * PRIVILEGED_FRACTION) < 46
    mean = {shown: sum(values) / len(values) for shown, values in lengths.items()}
    assert mean[False] > 3 * mean[True]
    again = task.demonstrations(0)
    assert all(again[i] == demonstrations[i] for i in range(0, 400, 40))
    assert task.demonstrations(1)[0] != demonstrations[0]


def test_the_answers_are_read_by_the_verifier(task):
    assert not any(check_golds(task.verify, [task.train[i] for i in range(50)]))


def test_sources_are_refused(tmp_path):
    config = config_lib.default()
    config.data.train.problems = config_lib.source(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"generated, but config\.data has sources"):
        word_problems.task(parse_run(config).data)
