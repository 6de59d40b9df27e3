"""`Algorithm`: everything that the library needs to know about a training algorithm.

The loader checks a stage's section with it, and the pipeline builds the stage with it. The plan
compiles the stage's sampling and training, and the report draws its curves. docs/extending.md adds
an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from opsd_jax.data.task import Task
from opsd_jax.options import fail
from opsd_jax.problem import Problem
from opsd_jax.stages.packing import Lengths
from opsd_jax.stages.parts import Parts, Sampling, TokenLimits
from opsd_jax.stages.privileged import ContextFinder
from opsd_jax.training.stage import Stage


class RowFields(NamedTuple):
    """Names of the config fields that determine how many rows one optimizer update processes.

    Attributes:
      factors: the number of rows grows with each of these fields.
      divisor: the field that splits the rows of a step over several updates; "" for one update.
    """

    factors: tuple[str, ...]
    divisor: str = ""


class DataSample(NamedTuple):
    """The task and some of its rows, used to check a stage's options before compilation.

    Attributes:
      task: the data.
      problems: returns training and held-out problems, as many as the check may read.
      longest: `(dataset, row -> token ids) -> (tokens, description of the row)`: finds the longest
        row of a dataset, among the rows that the check may read.
      seed: seed of the stage.
      max_positions: the most tokens of a sequence that the model was made for; 0 for any number.
    """

    task: Task
    problems: Callable[[], Sequence[Problem]]
    longest: Callable[[Any, Callable[[Any], Sequence[int]]], tuple[int, str]]
    seed: int
    max_positions: int = 0

    def check_fits(
        self, field: str, limit: int, data: Any, tokens: Callable[[Any], Sequence[int]]
    ) -> None:
        """Raises ConfigError if a row of a dataset has more tokens than a config field allows.

        Args:
          field: the config field, without "config.".
          limit: its value, the largest number of tokens.
          data: the dataset.
          tokens: `row -> token ids` to count.
        """
        length, row = self.longest(data, tokens)
        if length > limit:
            fail(field, limit, f"at least {length}, the number of tokens in {row}")


class Curve(NamedTuple):
    """A training metric that the report plots: its name, axis label and scale factor."""

    metric: str
    label: str
    scale: float = 1


Responses = Callable[[int, int], np.ndarray]  # (count, token budget) -> assumed lengths [count]


def no_sampling(*_: Any) -> tuple[Sampling, ...]:
    """Returns an empty tuple, for an `Algorithm` that samples no responses."""
    return ()


class Algorithm(NamedTuple):
    """A training algorithm: its options class, and functions that build, check and plan its stages.

    Every function takes the stage's options as its first argument.

    Attributes:
      options: the options class, a frozen dataclass that extends `StageOptions`. Its `check`
        method holds the checks that need the options alone.
      make: `(options, Parts) -> Stage`: builds the stage and compiles its engines.
      buckets: `options -> [Lengths]`: the padded shapes of a microbatch, ascending.
      check_data: `(options, section's name, DataSample)`: raises ConfigError where the data do not
        fit the options. Nothing has been compiled yet.
      step_rows: `(options, Responses) -> (response lengths, [Lengths])`: the rows that one
        optimizer update computes, for responses of assumed lengths. A plan reads it.
      row_fields: the fields that a plan advises to change when these rows need too much memory.
      sampling: `(options, task=None) -> (Sampling, ...)`: what each step samples; () if it samples
        nothing. Without a task, the lengths do not count the tokens that only the task knows.
      privileged: `(options, Parts, TokenLimits, group_size, seed) -> ContextFinder`: finds the
        privileged contexts of rollouts within these limits, `group_size` of each prompt. The run
        then also measures the divergence from the teacher by position, before and after the stage.
        The options extend `PrivilegedOptions`. None for an algorithm without a teacher that sees
        more than the student.
      privileged_sampling: `(options, TokenLimits, rollouts, task=None) -> (Sampling, ...)`: what
        `privileged` samples for this number of rollouts.
      curves: the training metrics that the report plots.
      headline: the statistic whose change the report shows first: "accuracy" or "length"; ""
        leaves the stage out.
      before_and_after: whether the report compares the responses before and after the stage.
      reported: fields of the options that the report records.
    """

    options: type
    make: Callable[[Any, Parts], Stage]
    buckets: Callable[[Any], list[Lengths]]
    check_data: Callable[[Any, str, DataSample], None]
    step_rows: Callable[[Any, Responses], tuple[list[int], list[Lengths]]]
    row_fields: RowFields
    sampling: Callable[..., tuple[Sampling, ...]] = no_sampling
    privileged: Callable[[Any, Parts, TokenLimits, int, int], ContextFinder] | None = None
    privileged_sampling: Callable[..., tuple[Sampling, ...]] = no_sampling
    curves: Sequence[Curve] = ()
    headline: str = ""
    before_and_after: bool = False
    reported: tuple[str, ...] = ()
