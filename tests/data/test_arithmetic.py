"""The built-in task: its problems, demonstrations and verdicts."""

import numpy as np
import pytest

from opsd_jax.data import arithmetic
from opsd_jax.verify.outcomes import outcomes_of
from opsd_jax.verify.verdict import Verdict

CALCULATE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def test_solutions_follow_from_the_true_operands(task):
    """Each step's result follows from the step, and its carried value from the step before."""
    misprints = operands = 0
    for i in range(500):
        problem = task.train[i]
        printed = problem.question.split()
        *tokens, answer = problem.solution.split()
        assert len(tokens) == 20
        carried_on = tokens[1]
        misprints += carried_on != printed[1]
        for j in range(0, 20, 5):
            label, carried, operation, operand, result = tokens[j : j + 5]
            assert carried == carried_on
            assert int(result) == CALCULATE[operation](int(carried), int(operand)) % 10
            at = printed.index(label)
            assert printed[at + 1] == operation
            misprints += printed[at + 2] != operand
            carried_on = result
        operands += 5
        assert answer == problem.answer == carried_on
    # 5 % of 2,500, with a standard error of 0.4 points.
    assert 0.035 < misprints / operands < 0.065


def test_train_and_held_out_problems_are_disjoint(task):
    heldout = {task.heldout[i].id for i in range(len(task.heldout))}
    assert len(heldout) == arithmetic.HELD_OUT == len(task.heldout)
    assert len(task.train) == arithmetic.SPACE - arithmetic.HELD_OUT
    assert not heldout & {task.train[i].id for i in range(20_000)}
    shuffled = task.train.shuffle(seed=5).repeat()
    for first in (0, len(task.train), 3 * len(task.train)):  # in later epochs too
        assert not heldout & {shuffled[first + i].id for i in range(5_000)}
        assert not heldout & {task.train[first + i].id for i in range(5_000)}
    assert task.heldout[len(task.heldout) + 5] == task.heldout[5]


def test_every_number_has_its_own_question():
    questions = {arithmetic.problem(n).question for n in range(0, arithmetic.SPACE, 1013)}
    assert len(questions) == len(range(0, arithmetic.SPACE, 1013))


def test_data_is_a_function_of_index_and_seed(task):
    first, again, other = (task.demonstrations(seed) for seed in (3, 3, 4))
    assert [first[i] for i in range(40)] == [again[i] for i in range(40)]
    assert [first[i] for i in range(40)] != [other[i] for i in range(40)]


def test_demonstrations_have_the_documented_rates(task):
    data = task.demonstrations(0)
    decode = task.tokenizer.decode
    verbose, concise = [], []
    for i in range(3000):
        prompt, response = data[i]
        assert response[-1] == task.tokenizer.eos_ids[0]
        assert len(response) <= arithmetic.MAX_RESPONSE
        (concise if "<ref>" in decode(prompt) else verbose).append(
            (decode(prompt), decode(response))
        )
    # Binomial standard errors here are at most one point.
    assert abs(len(concise) / 3000 - arithmetic.PRIVILEGED_FRACTION) < 0.03
    mean = lambda pairs: np.mean([len(response.split()) for _, response in pairs])
    assert mean(concise) < 30 < 45 < mean(verbose)
    for prompt, response in concise:
        assert response.split()[-2] == prompt.split()[-2]  # the answer of the solution
    assert min(len(response.split()) for _, response in concise) == 24
    fractions = [
        np.mean([token in response for _, response in verbose]) for token in ("problem", " so ")
    ]
    np.testing.assert_allclose(
        fractions, [arithmetic.RESTATE_RATE, arithmetic.SUMMARY_RATE], atol=0.04
    )


def test_rechecks_end_when_two_results_agree(task):
    data = task.demonstrations(0)
    for i in range(500):
        tokens = task.tokenizer.decode(data[i].response).split()
        results = [token for token in tokens if token in ("ok", "hmm")]
        assert tokens.count("wait") + tokens.count("check") == len(results)
        for j, token in enumerate(tokens):
            if token in ("ok", "hmm"):
                # The result before it is seven tokens back, or eight after an earlier recheck.
                before = tokens[j - 7] if tokens[j - 7].isdigit() else tokens[j - 8]
                assert (tokens[j - 1] == before) == (token == "ok")


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("<think> B 1 + 1 2 </think> 7 <eos>", Verdict(True, "match")),
        ("<think> </think> 3 </think> 7 <eos>", Verdict(True, "match")),
        ("<think> </think> 8 <eos>", Verdict(False, "mismatch")),
        ("<think> </think> 7 7 <eos>", Verdict(False, "mismatch")),
        ("<think> </think> 7", Verdict(False, "mismatch")),
        ("<think> </think> <eos>", Verdict(False, "mismatch")),
        ("7 <eos>", Verdict(False, "no answer")),
        ("", Verdict(False, "no answer")),
    ],
)
def test_verify_needs_the_answer_and_eos_after_the_thinking(response, verdict):
    problem = arithmetic.problem(0)._replace(answer="7")
    assert arithmetic.verify(problem, response) == verdict


def test_outcomes_are_disjoint_and_complete():
    verdicts = [Verdict(True, ""), Verdict(False, ""), Verdict(True, ""), Verdict(False, "")]
    masks = outcomes_of(verdicts, np.array([False, False, True, True]))
    np.testing.assert_array_equal(masks.correct, [1, 0, 0, 0])
    np.testing.assert_array_equal(masks.incorrect, [0, 1, 0, 0])
    np.testing.assert_array_equal(masks.truncated, [0, 0, 1, 1])
    with pytest.raises(ValueError, match="`verdicts` has length 4"):
        outcomes_of(verdicts, np.zeros(3, bool))


def test_a_token_outside_the_vocabulary_is_named(task):
    with pytest.raises(ValueError, match=r"'1 \+ apple' contains 'apple', which"):
        task.tokenizer.encode("1 + apple")
