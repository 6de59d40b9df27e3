"""A task from files: questions and answers as text, prompts by templates.

    config.task = "opsd_jax.data.text:task"
    config.data.train.maths = config_lib.source("train.jsonl")
    config.data.heldout.math500 = config_lib.source("math500.jsonl")

docs/data.md explains every field of `config.data`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import grain
from ml_collections import ConfigDict

from opsd_jax.config import import_function
from opsd_jax.data.load import load
from opsd_jax.data.mixture import mixture
from opsd_jax.data.problem import DataError, Problem
from opsd_jax.data.task import Demonstration, Task, Tokenizer

_FIELD = re.compile(r"\{(question|solution|answer)\}")


def task(config: ConfigDict) -> Task:
    """The task of `config.data`.

    Raises:
      DataError: a source that cannot be used; see `load`.
      ValueError: a template or a tokenizer that cannot.
    """
    from opsd_jax.verify.verifiers import by_source

    tokenizer: Tokenizer = import_function(config.tokenizer, "data.tokenizer")()
    prompt = template(config.prompt, "prompt")
    teacher_prompt = template(config.teacher_prompt, "teacher_prompt")
    if {"solution", "answer"} & set(_FIELD.findall(config.prompt)):
        raise ValueError(
            f"data.prompt is {config.prompt!r}, which shows the student what it is to find; "
            "expected {question} alone in it."
        )
    data = load(config)
    weights = {name: section.weight for name, section in config.train.items()}
    solved = {
        name: shown
        for name, problems in data.train.items()
        if (shown := [problem for problem in problems if problem.solution])
    }

    def demonstrate(problem: Problem) -> Demonstration:
        response = [*tokenizer.encode(problem.solution), tokenizer.eos_ids[0]]
        return Demonstration(tokenizer.encode(prompt(problem)), response)

    def demonstrations(seed: int) -> grain.MapDataset:
        if not solved:
            raise DataError(
                "SFT imitates solutions, and no problem of config.data.train has one; expected one "
                "in the column that a source's columns.solution names."
            )
        return mixture(solved, weights, seed).map(demonstrate)

    return Task(
        tokenizer=tokenizer,
        train=grain.MapDataset.source([p for part in data.train.values() for p in part]),
        heldout=grain.MapDataset.source([p for part in data.heldout.values() for p in part]),
        demonstrations=demonstrations,
        prompt=lambda problem: tokenizer.encode(prompt(problem)),
        teacher_prompt=lambda problem: tokenizer.encode(teacher_prompt(problem)),
        verify=by_source(data.verifiers),
        stream=lambda seed: mixture(data.train, weights, seed),
        in_memory=True,
    )


def template(text: str, field: str) -> Callable[[Problem], str]:
    """`Problem -> text` with its question, solution and answer in the places of `{question}`,
    `{solution}` and `{answer}`; the answer does for a solution that is not there. Other braces stay
    as they are, those of what is filled in too.

    Raises:
      ValueError: there is no place for the question; names the field of `config.data`.
    """
    if "question" not in _FIELD.findall(text):
        raise ValueError(f"data.{field} is {text!r}; expected {{question}} in it.")

    def fill(problem: Problem) -> str:
        values = problem._asdict() | {"solution": problem.solution or problem.answer}
        return _FIELD.sub(lambda field: values[field[1]], text)

    return fill
