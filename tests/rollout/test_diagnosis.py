"""What a user reads about responses that have no answer."""

import pytest

from opsd_jax.data.text import UNANSWERED
from opsd_jax.rollout.diagnosis import END, diagnose

TEXTS = ["It is \\boxed{4}.", "x" * 1000 + "so the total is 42.", "And\nthen", "It is \\boxed{5}."]


def diagnosed(reasons, correct=0):
    return diagnose(
        reasons,
        correct,
        TEXTS.__getitem__,
        section="rlvr",
        response_tokens=128,
        unanswered=UNANSWERED,
    )


def test_responses_without_answers_are_counted_and_shown():
    counts, details = diagnosed(["match", "no answer", "truncated", "mismatch"], correct=1)
    assert counts == (
        "1 of 4 responses are correct, 1 have no readable answer, and 1 are truncated at 128 "
        "tokens."
    )
    first, second, *advice = details.splitlines()
    assert first == "One ends '..." + "x" * (END - 19) + "so the total is 42.'"
    assert second == r"One ends 'And\nthen'"
    assert [line.partition(":")[0] for line in advice] == [
        "Truncated responses",
        "No readable answer",
    ]
    assert "config.rlvr.response_tokens" in advice[0]
    assert "config.data.prompt" in advice[1]
    assert "verifier.answer" in advice[1]
    assert advice[1] == f"No readable answer: {UNANSWERED}."


@pytest.mark.parametrize(
    ("reasons", "correct", "advice"),
    [
        (["match", "match", "match", "no answer"], 3, []),
        (["match", "mismatch", "mismatch", "mismatch"], 1, []),
        (["mismatch"] * 4, 0, ["Wrong answers only"]),
        (["truncated"] * 4, 0, ["One ends", "One ends", "Truncated responses"]),
        (["no answer"] * 4, 0, ["One ends", "One ends", "No readable answer"]),
        (
            ["no answer", "mismatch", "mismatch", "mismatch"],
            0,
            ["One ends", "No readable answer", "Wrong answers only"],
        ),
    ],
)
def test_the_advice_fits_the_responses(reasons, correct, advice):
    lines = diagnosed(reasons, correct).details.splitlines()
    assert len(lines) == len(advice)
    assert all(line.startswith(start) for line, start in zip(lines, advice, strict=True))
