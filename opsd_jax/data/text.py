"""A task from files: questions and answers as text, prompts by templates.

    config.task = "opsd_jax.data.text:task"
    config.data.train.maths = config_lib.source("train.jsonl")
    config.data.heldout.math500 = config_lib.source("math500.jsonl")
    config.data.tokenizer = "models/Qwen3-8B"

docs/data.md explains the sources, docs/prompts.md the rest of `config.data`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import grain
from ml_collections import ConfigDict

from opsd_jax.data.chat import Chat, ChatTemplate, fitting
from opsd_jax.data.contexts import CONTEXTS, Context
from opsd_jax.data.load import load
from opsd_jax.data.mixture import mixture
from opsd_jax.data.options import DataOptions, MemoWording
from opsd_jax.data.task import Demonstration, Task, Tokenizer
from opsd_jax.data.tokenizer import PretrainedTokenizer
from opsd_jax.options import import_function
from opsd_jax.problem import DataError, Problem
from opsd_jax.verify.verifiers import by_source

_FIELD = re.compile(r"\{(question|solution|answer|context)\}")


def task(config: DataOptions) -> Task:
    """The task of `config.data`.

    Raises:
      DataError: a source that cannot be used; see `load`.
      ValueError: a template or a tokenizer that cannot; names the field.
    """
    check_wording(config)
    tokenizer = make_tokenizer(config.tokenizer)
    chat = make_chat(config, tokenizer)
    begun = chat.begun()
    data = load(config)
    weights = {name: section.weight for name, section in config.train.items()}
    solved = {
        name: shown
        for name, problems in data.train.items()
        if (shown := [problem for problem in problems if problem.solution])
    }

    control = re.compile("|".join(map(re.escape, getattr(tokenizer, "control_tokens", ()))) or "$^")

    def ask(text: str) -> list[int]:
        return chat.prompt(text.strip() if chat.templated else text)

    def prompt(problem: Problem) -> list[int]:
        return ask(fill(config.prompt, question=problem.question))

    def informed(context: Context, text: str) -> str:
        # A sibling or a memo is the model's own words: they are not to end the user's turn.
        return fill(config.contexts[context.kind], context=control.sub("", text))

    def teacher_prompt(problem: Problem, context: Context, limit: int) -> tuple[list[int], bool]:
        def render(text: str) -> list[int]:
            asked = {"question": problem.question, "context": informed(context, text)}
            return ask(fill(config.teacher_prompt, **asked))

        try:
            if context.kind == "none":
                return fitting(lambda _: prompt(problem), "", limit)
            return fitting(render, context.text, limit)
        except ValueError as error:
            raise DataError(f"the teacher's prompt of problem {problem.id} has {error}") from error

    def reminder(context: Context, limit: int) -> tuple[list[int], bool]:
        render = lambda text: tokenizer.encode(
            fill(config.reminder, context=informed(context, text))
        )
        if context.kind == "none":
            return [], False
        try:
            return fitting(render, context.text, limit)
        except ValueError as error:
            raise DataError(f"a reminder of the {context.kind} has {error}") from error

    def memo_request(problem: Problem, group: str) -> list[int]:
        known = {"answer": problem.answer, "solution": problem.solution or problem.answer}
        return chat.next_turn(fill(getattr(config.memo, group), **known))

    def demonstrate(problem: Problem) -> Demonstration:
        if begun and "</think>" not in problem.solution:
            raise DataError(
                f"the prompt of problem {problem.id} opens its thinking, and its solution has no "
                "</think>: a model that imitates it never ends a thought. Expected one in it, or "
                "another chat_template."
            )
        return Demonstration(
            prompt(problem), [*tokenizer.encode(problem.solution), tokenizer.eos_ids[0]]
        )

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
        prompt=prompt,
        teacher_prompt=teacher_prompt,
        verify=by_source(data.verifiers),
        stream=lambda seed: mixture(data.train, weights, seed),
        in_memory=True,
        begun=begun,
        memo_request=memo_request,
        end_thinking=tokenizer.encode("\n</think>\n\n"),
        reminder=reminder,
    )


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a directory, or that a function "package.module:function" returns.

    Raises:
      ValueError: it can be neither read nor imported.
    """
    if pathlib.Path(name).is_dir() or ":" not in name:
        return PretrainedTokenizer(name)
    return import_function(name, "data.tokenizer")()


def make_chat(config: DataOptions, tokenizer: Tokenizer) -> Chat:
    """How `config.data` has the user's words made into prompts.

    Raises:
      ValueError: there is no such template, or it does not do what is asked of it.
    """
    template: ChatTemplate | None = getattr(tokenizer, "chat_template", None)
    if config.chat_template == "none":
        template = None
    elif config.chat_template:
        path = pathlib.Path(config.chat_template)
        if not path.is_file():
            raise ValueError(
                f"data.chat_template is {config.chat_template!r}; expected '' for the tokenizer's "
                "own, 'none' for plain text, or a file."
            )
        special_tokens = getattr(tokenizer, "special_tokens", {})
        template = ChatTemplate(path.read_text(encoding="utf-8"), special_tokens)
    return Chat(
        tokenizer,
        template,
        system=config.system,
        thinking=config.thinking,
        date=config.date,
        options={
            name: value.to_dict() if isinstance(value, ConfigDict) else value
            for name, value in config.template_options.items()
        },
    )


def check_wording(config: DataOptions) -> None:
    """Raises ValueError for a text of `config.data` without the places that it needs, or with one
    that would show the student what it is to find; names the field.
    """

    def check(field: str, text: str, needed: set[str], allowed: set[str]) -> None:
        there = set(_FIELD.findall(text))
        if missing := needed - there:
            raise ValueError(f"data.{field} is {text!r}; expected {{{missing.pop()}}} in it.")
        if more := there - needed - allowed:
            raise ValueError(
                f"data.{field} is {text!r}; {{{more.pop()}}} is not filled in there, expected only "
                + ", ".join(f"{{{name}}}" for name in sorted(needed | allowed))
                + "."
            )

    check("prompt", config.prompt, {"question"}, set())
    check("teacher_prompt", config.teacher_prompt, {"question", "context"}, set())
    check("reminder", config.reminder, {"context"}, set())
    for kind, about in CONTEXTS.items():
        if kind in config.contexts:
            needed = {"context"} if about.needs_context else set()
            check(f"contexts.{kind}", config.contexts[kind], needed, set())
    for field in dataclasses.fields(MemoWording):
        text = getattr(config.memo, field.name)
        check(f"memo.{field.name}", text, set(), {"answer", "solution"})


def fill(text: str, **values: Any) -> str:
    """`text` with the values in the places of their names in braces. Other braces stay as they are,
    those of what is filled in too.
    """
    return _FIELD.sub(lambda field: values[field[1]], text)
