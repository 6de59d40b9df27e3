"""Bounds of the options of an evaluation."""

import pytest

from opsd_jax.evaluation.options import EvaluationOptions
from opsd_jax.options import ConfigError, parse, section


@pytest.mark.parametrize("problems", [0, 2, 500])
def test_numbers_of_problems(problems):
    config = section(EvaluationOptions(problems=problems))
    assert parse(EvaluationOptions, config, "evaluation").problems == problems


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("problems", 1, "0 for all problems, or at least 2"),
        ("samples", 0, "at least 1"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("inf"), "a finite number"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, r"a number in \(0, 1\]"),
        ("min_p", 1.5, r"a number in \[0, 1\]"),
        ("seed", 2**31, r"a number in \[0, 2\^31\)"),
    ],
)
def test_values_out_of_bounds_are_refused(field, value, expected):
    config = section(EvaluationOptions(**{field: value}))
    with pytest.raises(ConfigError, match=f"config.evaluation.{field} is .*; expected {expected}"):
        parse(EvaluationOptions, config, "evaluation")
