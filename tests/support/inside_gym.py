"""Tests of opsd_jax.data.gym, in an environment that has reasoning-gym (tests/data/test_gym.py)."""

import json
import sys

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from opsd_jax.data import gym
from opsd_jax.problem import Problem
from opsd_jax.verify.verdict import MATCH, MISMATCH, NO_ANSWER

# Their problems have many right answers, and the rows have none.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
TWO_VALUED = {"game_of_life_halting"}  # its scorer takes every text without "True" for "False"


def problems(name, number=3, **options):
    """Returns problems as a source with `extra=("gym",)` reads them from a file of JSON lines."""
    made = gym.rows(name, first=5, problems=number, seed=0, options=options)
    rows = json.loads(json.dumps([*made]))
    return [
        Problem(row["id"], row["problem"], "", row.get("answer", ""), extra={"gym": row["gym"]})
        for row in rows
    ]


@pytest.mark.parametrize("name", sorted({*DATASETS} - {"composite"}))
def test_the_right_answer_is_right_and_no_answer_is_not(name):
    for problem in problems(name):
        assert bool(problem.answer) == (name not in WITHOUT_ANSWER)
        assert gym.judge(gym.verifier.prepare_gold(problem)) == MATCH
        assert gym.verifier(problem, "I do not know.") == NO_ANSWER
        if problem.answer.count("{") == problem.answer.count("}"):  # otherwise no box can hold it
            if problem.answer:
                assert gym.verifier(problem, f"So \\boxed{{{problem.answer}}}.") == MATCH
            wrong = gym.verifier(problem, r"So \boxed{\nothing}.")
            assert wrong == MISMATCH or name in TWO_VALUED


def test_part_of_a_score_is_not_correct():
    problem, *_ = problems("leg_counting")
    longer = f"1{problem.answer}"
    entry = {"answer": problem.answer, "metadata": {}}
    assert 0 < reasoning_gym.get_score_answer_fn("leg_counting")(longer, entry) < 1
    assert gym.verifier(problem, rf"\boxed{{{longer}}}") == MISMATCH


def test_a_problem_of_another_version_is_an_error():
    problem, *_ = problems("leg_counting")
    with pytest.raises(ValueError, match="problem 5 of leg_counting is not the one in the file"):
        gym.verifier(problem._replace(question="How many?"), r"\boxed{1}")
    without_answer = problem._replace(question="How many?", answer="")
    with pytest.raises(ValueError, match="Write the file again"):
        gym.judge(gym.verifier.prepare_gold(without_answer))


def test_a_source_must_name_the_column():
    problem, *_ = problems("leg_counting")
    with pytest.raises(ValueError, match=r"expected extra=\('gym',\) in its source"):
        gym.verifier(problem._replace(extra={}), r"\boxed{1}")


def test_later_problems_are_other_problems():
    first, second = problems("chain_sum", 1), problems("chain_sum", 2)
    assert first[0].question == second[0].question != second[1].question


def run(monkeypatch, tmp_path, *arguments):
    """Runs the command. Returns the rows that it wrote."""
    file = tmp_path / "problems.jsonl"
    monkeypatch.setattr(sys, "argv", ["gym", arguments[0], str(file), *arguments[1:]])
    gym.main()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_missing_directory_is_named(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "absent", "leg_counting")
    assert "there is no directory" in capsys.readouterr().err


def test_the_command_writes_rows(monkeypatch, tmp_path):
    options = ["--problems", "4", "--options", "max_animals=1", "min_animals=1"]
    rows = run(monkeypatch, tmp_path, "leg_counting", *options)
    assert [row["id"] for row in rows] == [f"leg_counting/0/{i}" for i in range(4)]
    assert rows[3]["gym"]["options"] == {"max_animals": 1, "min_animals": 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["leg_countin"], "there is no dataset 'leg_countin'; the nearest: leg_counting"),
        (["leg_counting", "--options", "max_animal=1"], "unexpected keyword argument 'max_animal'"),
        (
            ["leg_counting", "--options", "max_animals=0"],
            "cannot make leg_counting with these options",
        ),
        (["leg_counting", "--options", "max_animals"], "expected NAME=VALUE"),
        (["leg_counting", "--problems", "0"], "expected --problems of at least 1"),
    ],
)
def test_the_command_refuses_what_it_cannot_use_in_one_line(
    monkeypatch, tmp_path, capsys, arguments, said
):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, *arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
