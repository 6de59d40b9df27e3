"""Whether a config's sizes hold its data, before anything is compiled."""

from __future__ import annotations

import functools
import heapq
import sys
from collections.abc import Callable, Iterable
from typing import Any

import grain
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.data import contexts
from opsd_jax.data.contexts import Context
from opsd_jax.data.problem import DataError, Problem
from opsd_jax.data.task import Task

# What is made into tokens of a data set before a run begins, if it has more elements than this:
WHOLLY_LOOKED_AT = 50_000
LONGEST = 256  # of problems in memory, those with the longest question, and with a solution to it;
LOOKED_AT = 64  # of others the first, as each may have to be made


def check(
    config: ConfigDict, task: Task, vocab_size: int, shards: int, stage_seed: Callable[[str], int]
) -> None:
    """Raises ConfigError where the task's data or the devices do not go with a field, as far as a
    first look at the data tells.

    Args:
      config: of the run.
      task: its data.
      vocab_size: the model's.
      shards: into how many parts rows of a batch are cut.
      stage_seed: name of a stage -> the seed of its demonstrations.
    """

    def expect(holds: bool, field: str, value: Any, expected: str) -> None:
        if not holds:
            raise config_lib.ConfigError(f"config.{field} is {value}; expected {expected}.")

    def divides(field: str, value: int) -> None:
        expect(value % shards == 0, field, value, f"a multiple of data x fsdp = {shards}")

    def looked_at(data: grain.MapDataset) -> Iterable[int]:
        if len(data) <= WHOLLY_LOOKED_AT:
            return range(len(data))
        if not (task.in_memory and (data is task.train or data is task.heldout)):
            return range(LOOKED_AT)
        question = [len(data[i].question) for i in range(len(data))]
        both = [n + len(data[i].solution or data[i].answer) for i, n in enumerate(question)]
        return {
            i
            for lengths in (question, both)
            for i in heapq.nlargest(LONGEST, range(len(data)), key=lengths.__getitem__)
        }

    @functools.cache
    def longest(data: grain.MapDataset, tokens: Callable) -> tuple[int, int]:
        return max((len(tokens(data[i])), i) for i in looked_at(data))

    def holds(field: str, value: int, data: grain.MapDataset, tokens: Callable) -> None:
        length, i = longest(data, tokens)
        row = data[i]
        whose = (
            f"problem {row.id}"
            if isinstance(row, Problem)
            else f"the demonstration to {task.tokenizer.decode(row.prompt)[:60]!r}"
        )
        expect(length <= value, field, value, f"at least {length}, which {whose} has")

    tokens, words = vocab_size, task.tokenizer.vocab_size
    expect(tokens >= words, "model.vocab_size", tokens, f"at least {words}, the tokenizer's")
    evaluation = config.evaluation
    there = len(task.heldout)
    expected = f"at most {there}, all that are held out"
    expect(evaluation.problems <= there, "evaluation.problems", evaluation.problems, expected)
    divides("evaluation.prompts_at_once", evaluation.prompts_at_once)
    holds("evaluation.prompt_tokens", evaluation.prompt_tokens, task.heldout, task.prompt)
    for name in config.stages:
        section = config[name]
        example = "sources, such as config.data.train.maths = config_lib.source('maths.jsonl')"
        expect(len(task.train) > 0, "data.train", "empty", example)
        divides(f"{name}.microbatch", section.microbatch)
        if section.algorithm == "sft":
            both = lambda row: [*row.prompt, *row.response]
            rows = task.demonstrations(stage_seed(name))
            holds(f"{name}.buckets", section.buckets[-1], rows, both)
            continue
        divides(f"{name}.prompts_at_once", min(section.prompts_at_once, section.prompts))
        holds(f"{name}.prompt_tokens", section.prompt_tokens, task.train, task.prompt)
        if section.algorithm == "opsd":
            for kind in section.contexts:
                _check_contexts(task, name, section, kind, looked_at(task.train))


def _check_contexts(
    task: Task, stage: str, section: ConfigDict, kind: str, looked_at: Iterable[int]
) -> None:
    """Raises ConfigError where a teacher's prompt does not fit without its context, and tells
    standard error how many of those looked at lose a part of it.
    """
    limit = section.teacher_prompt_tokens
    if section.reinject_every and task.reminder is not None and ":" not in kind:
        try:
            task.reminder(Context(kind, ""), section.reminder_tokens)
        except DataError as error:
            field = f"config.{stage}.reminder_tokens"
            raise config_lib.ConfigError(
                f"{field} is {section.reminder_tokens}; {error}"
            ) from error
    find = {"solution": contexts.solution, "answer": contexts.answer}.get(kind)
    cut = looked = 0
    for i in looked_at:
        problem = task.train[i]
        text = find(problem, 0, ()) if find else ""
        if text is None or ":" in kind:
            continue
        try:
            cut += task.teacher_prompt(problem, Context(kind, text), limit)[1]
        except ValueError as error:
            field = f"config.{stage}.teacher_prompt_tokens"
            raise config_lib.ConfigError(f"{field} is {limit}; {error}") from error
        looked += 1
    if cut:
        print(
            f"{stage}: of the teacher's prompts that were looked at, {cut} of {looked} lose a "
            f"part of the {kind} to teacher_prompt_tokens = {limit}.",
            file=sys.stderr,
        )
