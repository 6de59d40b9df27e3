"""The task that reads problems from files, and renders them as prompts with a chat template.

    config.task = "opsd_jax.data.text:task"
    config.data.train.maths = config_lib.source("train.jsonl")
    config.data.heldout.math500 = config_lib.source("math500.jsonl")
    config.data.tokenizer = "models/Qwen3-8B"

docs/data.md explains the sources, and docs/prompts.md the other fields of `config.data`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import grain
from ml_collections import ConfigDict

from opsd_jax.data.chat import Chat, ChatTemplate, cut_to_fit, read_template
from opsd_jax.data.contexts import CONTEXTS, Context
from opsd_jax.data.load import load
from opsd_jax.data.mixture import mixture
from opsd_jax.data.options import CHAT_TEMPLATES, DataOptions, MemoWording
from opsd_jax.data.task import Demonstration, Task, Tokenizer
from opsd_jax.data.tokenizer import PretrainedTokenizer
from opsd_jax.options import fail, import_function
from opsd_jax.problem import DataError, Problem
from opsd_jax.storage import hub
from opsd_jax.verify.verifiers import by_source

UNANSWERED = (
    "ask for it in config.data.prompt in a form that the verifier reads, by default \\boxed{...}; "
    "or train with SFT on such solutions first; or let the verifier read other forms with the "
    "field verifier.answer of a source"
)
_PLACEHOLDER = re.compile(r"\{(question|solution|answer|context)\}")


def task(options: DataOptions) -> Task:
    """Returns the task that `config.data` describes.

    Raises:
      DataError: a source cannot be used (see `load`).
      ConfigError: a wording, the tokenizer or the chat template cannot be used. Names the field.
      ValueError: the tokenizer's files cannot be read, or the chat template fails.
    """
    check_wording(options)
    tokenizer = make_tokenizer(options.tokenizer)
    prompts = Prompts(options, tokenizer)
    data = load(options)
    weights = {name: source.weight for name, source in options.train.items()}
    return Task(
        tokenizer=tokenizer,
        train=grain.MapDataset.source([p for part in data.train.values() for p in part]),
        heldout=grain.MapDataset.source([p for part in data.heldout.values() for p in part]),
        demonstrations=functools.partial(_demonstrations, prompts, data.train, weights),
        prompt=prompts.student,
        teacher_prompt=prompts.teacher,
        verify=by_source(data.verifiers),
        stream=functools.partial(mixture, data.train, weights),
        in_memory=True,
        begun=prompts.begun,
        memo_request=prompts.memo_request,
        end_thinking=tokenizer.encode("\n</think>\n\n"),
        reminder=prompts.reminder,
        unanswered=UNANSWERED,
    )


class Prompts:
    """Renders problems as token ids, with the prompt texts and chat template in `config.data`.

    Attributes:
      tokenizer: tokenizer of the model.
      begun: text with which the prompt begins the response, such as "<think>", or "".
    """

    def __init__(self, options: DataOptions, tokenizer: Tokenizer):
        """Creates the chat. Raises ConfigError or ValueError if its template cannot be used."""
        self.tokenizer = tokenizer
        self._options = options
        self._chat = make_chat(options, tokenizer)
        self.begun, self._thinks_nothing = self._chat.begun(), self._chat.thinks_nothing()
        control_tokens: Sequence[str] = getattr(tokenizer, "control_tokens", ())
        # Without control tokens, "$^" matches nothing.
        self._control_tokens = re.compile("|".join(map(re.escape, control_tokens)) or "$^")

    def student(self, problem: Problem) -> list[int]:
        """Returns the token ids of the student's prompt for a problem."""
        return self._prompt(fill(self._options.prompt, question=problem.question))

    def teacher(self, problem: Problem, context: Context, limit: int) -> tuple[list[int], bool]:
        """Returns the teacher's prompt in at most `limit` tokens, and whether its context was cut.

        Raises:
          DataError: the prompt is too long even without the text of the context.
        """

        def render(text: str) -> list[int]:
            if not CONTEXTS[context.kind].wording:
                return self.student(problem)
            worded = self._worded(context.kind, text)
            wording = self._options.teacher_prompt
            return self._prompt(fill(wording, question=problem.question, context=worded))

        try:
            return cut_to_fit(render, context.text, limit)
        except ValueError as error:
            raise DataError(
                f"the teacher's prompt for problem {problem.id} is too long: {error} Increase "
                "teacher_prompt_tokens."
            ) from error

    def reminder(self, context: Context, limit: int) -> tuple[list[int], bool]:
        """Returns a reminder of the context in at most `limit` tokens, and whether it was cut.

        Raises:
          DataError: the reminder is too long even without the text of the context.
        """

        def render(text: str) -> list[int]:
            worded = self._worded(context.kind, text)
            return self.tokenizer.encode(fill(self._options.reminder, context=worded))

        if not CONTEXTS[context.kind].wording:
            return [], False
        try:
            return cut_to_fit(render, context.text, limit)
        except ValueError as error:
            raise DataError(
                f"a reminder of the context {context.kind!r} is too long: {error} Increase "
                "reminder_tokens."
            ) from error

    def memo_request(self, problem: Problem, outcome: str) -> list[int]:
        """Returns the token ids that follow a response and ask the model for a memo on it.

        Args:
          problem: the problem of the response.
          outcome: "correct", "incorrect" or "truncated".
        """
        wording = getattr(self._options.memo, outcome)
        solution = problem.solution or problem.answer
        return self._chat.next_turn(fill(wording, answer=problem.answer, solution=solution))

    def demonstration(self, problem: Problem) -> Demonstration:
        """Returns an SFT example: the student's prompt, and the solution as the response.

        If the prompt already has the <think> with which the solution begins, the response begins
        after it.

        Raises:
          DataError: the prompt begins a thought, and the solution does not end it; or the prompt
            ends an empty thought, and the solution has another one.
        """
        solution = problem.solution
        if self._thinks_nothing and "<think>" in solution:
            raise DataError(
                f"the prompt of problem {problem.id} ends with an empty thought, but its solution "
                "has a <think>, so SFT would teach the model to think nevertheless; expected a "
                "solution without it, or config.data.thinking = 'on'."
            )
        if self.begun and solution.lstrip().startswith("<think>"):
            solution = solution.lstrip().removeprefix("<think>")
            solution = solution.lstrip() if self.begun[-1].isspace() else solution
        if self.begun and "</think>" not in solution:
            raise DataError(
                f"the chat template begins the response of problem {problem.id} with <think>, but "
                "its solution has no </think>, so SFT would teach the model never to stop "
                "thinking; expected a </think> in the solution, or another chat_template."
            )
        response = [*self.tokenizer.encode(solution), self.tokenizer.eos_ids[0]]
        return Demonstration(self.student(problem), response)

    def _prompt(self, message: str) -> list[int]:
        """Returns the token ids of the prompt for one user message."""
        return self._chat.prompt(message.strip() if self._chat.templated else message)

    def _worded(self, kind: str, text: str) -> str:
        """Inserts `text` into the sentence that `config.data.contexts` sets for this `kind`.

        Control tokens are removed from the text. The model may have written it, and such a token
        would end the user's turn.
        """
        # The config lacks a kind that was added after it was made.
        wording = self._options.contexts.get(kind, CONTEXTS[kind].wording)
        return fill(wording, context=self._control_tokens.sub("", text))


def _demonstrations(
    prompts: Prompts,
    train: Mapping[str, Sequence[Problem]],
    weights: Mapping[str, float],
    seed: int,
) -> grain.MapDataset:
    """Returns an endless dataset of demonstrations, from the problems that have a solution.

    Args:
      prompts: renders them.
      train: source -> problems.
      weights: source -> its weight.
      seed: seed of the order.

    Raises:
      DataError: no problem has a solution.
    """
    solved = {
        name: shown
        for name, problems in train.items()
        if (shown := [problem for problem in problems if problem.solution])
    }
    if not solved:
        raise DataError(
            "SFT trains on worked solutions, but no problem of config.data.train has one; expected "
            "a source whose `columns.solution` names a column with solutions."
        )
    return mixture(solved, weights, seed).map(prompts.demonstration)


def make_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that `config.data.tokenizer` names.

    Args:
      name: a directory, a model on the Hugging Face Hub, or "package.module:function" of a
        function that returns a tokenizer.

    Raises:
      ConfigError: the function cannot be imported.
      ValueError: the directory cannot be read.
    """
    if pathlib.Path(name).is_dir() or ":" not in name:
        return PretrainedTokenizer(hub.local(name, hub.TOKENIZER, "config.data.tokenizer"))
    return import_function(name, "data.tokenizer")()


def make_chat(options: DataOptions, tokenizer: Tokenizer) -> Chat:
    """Returns the `Chat` that renders user messages as prompts.

    Raises:
      ConfigError: the file of the chat template does not exist, or an option has no effect.
      ValueError: the chat template fails.
    """
    template: ChatTemplate | None = getattr(tokenizer, "chat_template", None)
    if options.chat_template == "none":
        template = None
    elif options.chat_template:
        path = pathlib.Path(options.chat_template)
        if not path.is_file():
            fail("data.chat_template", options.chat_template, CHAT_TEMPLATES)
        special_tokens = getattr(tokenizer, "special_tokens", {})
        template = ChatTemplate(read_template(path), special_tokens)
    return Chat(
        tokenizer,
        template,
        system=options.system,
        thinking=options.thinking,
        date=options.date,
        options={
            name: value.to_dict() if isinstance(value, ConfigDict) else value
            for name, value in options.template_options.items()
        },
    )


def check_wording(options: DataOptions) -> None:
    """Raises ConfigError if a prompt text lacks a placeholder or contains a forbidden one.

    A missing placeholder would hide the question or the context. A forbidden one could show the
    student the answer.
    """
    _check_placeholders("prompt", options.prompt, needed={"question"})
    _check_placeholders("teacher_prompt", options.teacher_prompt, needed={"question", "context"})
    _check_placeholders("reminder", options.reminder, needed={"context"})
    for kind, about in CONTEXTS.items():
        if kind in options.contexts:
            needed = {"context"} if about.needs_context else set()
            _check_placeholders(f"contexts.{kind}", options.contexts[kind], needed=needed)
    for field in dataclasses.fields(MemoWording):
        wording = getattr(options.memo, field.name)
        _check_placeholders(f"memo.{field.name}", wording, optional={"answer", "solution"})


def _check_placeholders(
    field: str, wording: str, *, needed: Set[str] = frozenset(), optional: Set[str] = frozenset()
) -> None:
    """Raises ConfigError if `wording` lacks a placeholder or contains a forbidden one.

    Args:
      field: its field in `config.data`.
      wording: its text.
      needed: placeholders that it must have.
      optional: placeholders that it may have.
    """
    found = set(_PLACEHOLDER.findall(wording))
    if missing := needed - found:
        fail(f"data.{field}", wording, f"a text that contains {{{min(missing)}}}")
    if forbidden := found - needed - optional:
        names = " and ".join(f"{{{name}}}" for name in sorted(needed | optional))
        allowed = f"no placeholder except {names}" if names else "a text without placeholders"
        fail(
            f"data.{field}",
            wording,
            f"{allowed}, because opsd_jax does not fill in {{{min(forbidden)}}} here",
        )


def fill(text: str, **values: Any) -> str:
    """Replaces each placeholder in a text, such as {question}, with its value.

    Other braces do not change, nor do braces in the values.
    """
    return _PLACEHOLDER.sub(lambda field: values[field[1]], text)
