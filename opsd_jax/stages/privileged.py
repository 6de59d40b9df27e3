"""Builds the teacher's inputs: prompts with a privileged context, and responses with reminders.

A reminder repeats the context inside the teacher's copy of a response.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from opsd_jax.data.contexts import (
    CONTEXTS,
    SIBLINGS,
    Attempt,
    Context,
    Find,
    context_kind,
    is_written,
    worded_as,
)
from opsd_jax.data.task import Task
from opsd_jax.options import ConfigError, fail, option
from opsd_jax.policy import Params
from opsd_jax.problem import Problem
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.stages.batch import Inserts
from opsd_jax.stages.memos import MemoOptions, Memos, check_memos
from opsd_jax.stages.options import RolloutOptions, StageOptions

logger = logging.getLogger(__name__)

_LISTED = re.compile(r"\s*\d+\.")


def _are_kinds(kinds: tuple[str, ...]) -> bool:
    return bool(kinds) and all(kind in CONTEXTS or ":" in kind for kind in kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivilegedOptions(RolloutOptions):
    """The options of a stage with a teacher that sees a privileged context for each rollout."""

    contexts: tuple[str, ...] = option(
        ("solution", "answer"),
        "Kinds of privileged context, in order of preference; the teacher sees the first that a "
        "rollout has (opsd_jax/data/contexts.py).",
        expects=lambda: (
            f"a tuple of kinds among {', '.join(CONTEXTS)}, or 'package.module:function'"
        ),
        check=_are_kinds,
    )
    sibling: str = option("shortest", "Which correct sibling the teacher sees.", choices=SIBLINGS)
    sibling_thinking: bool = option(False, "Whether the teacher also sees the sibling's thinking.")
    context_column: str = option(
        "", "Column that context kind 'column' shows: one of the sources' `extra` columns."
    )
    memo: MemoOptions = option(MemoOptions(), "Memos that the model writes.")
    reinject_every: int = option(
        0,
        "Tokens between reminders of the context in the teacher's copy of a response; 0 for none.",
        at_least=0,
    )
    reminder_tokens: int = option(
        256, "Longest reminder, in tokens; a longer one loses the end of its context.", at_least=1
    )
    teacher_prompt_tokens: int = option(
        4096,
        "Longest teacher prompt, in tokens; a longer one loses the end of its privileged text.",
        at_least=1,
    )

    def check(self, field: str) -> None:
        super().check(field)
        for kind in self.contexts:
            if kind in CONTEXTS:
                CONTEXTS[kind].check(self, field)

    @property
    def has_memos(self) -> bool:
        """Whether the contexts include memos, which the model writes during the run."""
        return any(map(is_written, self.contexts))


def privileged_options(options: StageOptions) -> PrivilegedOptions:
    """Returns `options` if they are `PrivilegedOptions`, which `Algorithm.privileged` requires.

    Raises:
      TypeError: their class does not extend `PrivilegedOptions`.
    """
    if not isinstance(options, PrivilegedOptions):
        raise TypeError(
            "an algorithm sets `privileged`, but its options are of class "
            f"{type(options).__name__}; expected a subclass of "
            "opsd_jax.stages.privileged.PrivilegedOptions."
        )
    return options


def inserted_tokens(options: PrivilegedOptions, response_tokens: int) -> int:
    """Returns the largest number of tokens that reminders add to a response of a given length."""
    every = options.reinject_every
    return response_tokens // every * options.reminder_tokens if every else 0


class TeacherInputs(NamedTuple):
    """The teacher's prompt and reminders for each rollout with a context, plus metrics.

    Attributes:
      rows: index of a rollout -> `{"teacher": prompt ids, "teacher/inserts": Inserts}`, in the
        order of the rollouts. Rollouts without a usable context are absent.
      metrics: how many rollouts had no context, how many contexts were cut, and how many contexts
        there are of each kind.
    """

    rows: dict[int, dict[str, Any]]
    metrics: dict[str, float]


class ContextFinder:
    """Finds a privileged context for each rollout, and builds the teacher's inputs from it."""

    def __init__(
        self,
        options: PrivilegedOptions,
        task: Task,
        group_size: int,
        memos: Memos | None = None,
    ):
        """Looks up the kinds of context in `options.contexts`.

        Args:
          options: the options of the stage.
          task: the data.
          group_size: rollouts per problem. The rollouts of a problem are adjacent.
          memos: writes contexts during the run, if the options have a kind that needs it.

        Raises:
          ConfigError: a context function of the user's own cannot be imported.
          ValueError: `memos` is None, and the options have a kind that needs it.
        """
        if options.has_memos and memos is None:
            raise ValueError(
                f"`memos` is None; expected a `Memos`, because {options.contexts} needs one."
            )
        self._options, self._task = options, task
        self._memos = memos if options.has_memos else None
        self._group_size = group_size
        self._kinds = options.contexts
        kinds = {name: context_kind(name, "contexts") for name in self._kinds}
        self._find: dict[str, Find] = {
            name: kind.find(options) for name, kind in kinds.items() if kind.find is not None
        }
        self._needs_group = any(kind.needs_group for kind in kinds.values())

    def __call__(
        self,
        step: int,
        params: Params,
        rollouts: Rollouts,
        wanted: Iterable[int],
        *,
        capacity: int,
    ) -> TeacherInputs:
        """Returns teacher inputs for the first `capacity` rollouts in `wanted` that have a context.

        Args:
          step: the number of the step in the stage; memos depend on it.
          params: the current parameters, which write memos.
          rollouts: the rollouts, with their verdicts, in whole groups.
          wanted: the indices of the wanted rollouts, ascending.
          capacity: the most rollouts to return.

        Raises:
          DataError: a teacher prompt does not fit even without its context; names the problem.
        """
        found = self._contexts(step, params, rollouts, wanted, capacity)
        rows, cut, reminders_cut = {}, 0, 0
        for i, context in found.items():
            if context is None:
                continue
            prompt, was_cut = self._task.teacher_prompt(
                rollouts.problems[i], context, self._options.teacher_prompt_tokens
            )
            cut += was_cut
            inserts, reminder_was_cut = self._reminders(context, rollouts.responses[i])
            reminders_cut += reminder_was_cut
            rows[i] = {"teacher": prompt, "teacher/inserts": inserts}
        counts = Counter({worded_as(kind): 0 for kind in self._kinds})
        counts.update(context.kind for context in found.values() if context)
        metrics = {
            "no_context": float(len(found) - len(rows)),
            "context_cut": float(cut),
            **({"reminder_cut": float(reminders_cut)} if self._options.reinject_every else {}),
            **{f"context/{kind}": float(count) for kind, count in counts.items()},
        }
        return TeacherInputs(rows, metrics)

    def _contexts(
        self,
        step: int,
        params: Params,
        rollouts: Rollouts,
        wanted: Iterable[int],
        capacity: int,
    ) -> dict[int, Context | None]:
        """Finds contexts for the wanted rollouts, in order, and stops after `capacity` contexts.

        Memos are sampled for as many rollouts at a time as could still be needed, since the model
        may write nothing for some of them.
        """
        found: dict[int, Context | None] = {}
        group_from = functools.cache(functools.partial(self._group_from, rollouts))
        at = [*map(is_written, self._kinds), True].index(True)  # the kind that is a memo, if any
        before, after = self._kinds[:at], self._kinds[at + 1 :]
        remaining, usable, asked = iter(wanted), 0, 0
        while usable < capacity:
            pending: list[int] = []  # rollouts that need a memo
            for i in remaining:
                found[i] = self._first_context(rollouts, i, before, group_from)
                if found[i] is not None:
                    usable += 1
                elif self._memos is not None:
                    pending.append(i)
                if usable + len(pending) == capacity:
                    break
            if self._memos is None or not pending:
                break
            memos = self._memos(step, params, rollouts, pending, offset=asked)
            asked += len(pending)
            for i, text in zip(pending, memos, strict=True):
                if text is None:
                    found[i] = self._first_context(rollouts, i, after, group_from)
                else:
                    found[i] = Context(self._kinds[at], text)
                usable += found[i] is not None
        return found

    def _first_context(
        self,
        rollouts: Rollouts,
        i: int,
        kinds: Sequence[str],
        group_from: Callable[[int], Sequence[Attempt]],
    ) -> Context | None:
        """Tries `kinds` in order, and returns the first context found for rollout `i`, or None."""
        first = i - i % self._group_size
        group = group_from(first) if self._needs_group else ()
        for kind in kinds:
            text = self._find[kind](rollouts.problems[i], i - first, group)
            if text is not None:
                return Context(worded_as(kind), text)
        return None

    def _group_from(self, rollouts: Rollouts, first: int) -> list[Attempt]:
        """Returns an `Attempt` for each rollout in the group that starts at index `first`."""
        correct = rollouts.judged.outcomes.correct
        return [
            Attempt(
                self._task.begun + self._task.tokenizer.decode(rollouts.responses[i].tolist()),
                len(rollouts.responses[i]),
                bool(correct[i]),
            )
            for i in range(first, first + self._group_size)
        ]

    def _reminders(self, context: Context, response: np.ndarray) -> tuple[Inserts, bool]:
        """Returns the reminders to insert into a response, and whether their text was cut."""
        every, task = self._options.reinject_every, self._task
        if not every:
            return [], False
        if task.reminder is None:
            raise ValueError(
                f"task.reminder is None; expected a function, because reinject_every is {every}."
            )
        ids, cut = task.reminder(context, self._options.reminder_tokens)
        own = response.tolist()
        if own[-1] in task.tokenizer.eos_ids:
            own = own[:-1]
        pieces = [task.tokenizer.decode([token]) for token in own]
        places = reminder_places(pieces, every, thinking="<think>" in task.begun)
        return [(at, ids) for at in places if ids], cut


def reminder_places(pieces: Sequence[str], every: int, *, thinking: bool = False) -> list[int]:
    """Returns where to insert reminders: at the ends of sentences, about `every` tokens apart.

    In a response with thinking, all places are inside the thinking. In any other response, places
    can be anywhere except at the end.

    Args:
      pieces: the text of each token, without EOS.
      every: distance in tokens. Each multiple of it moves back to the nearest end of a sentence,
        and is left out if no sentence ends between it and the previous place.
      thinking: whether the prompt has already opened the thinking.

    Returns:
      Indices of the tokens before which reminders are inserted, ascending.
    """
    text = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    token_at = lambda tag: int(np.searchsorted(ends, text.index(tag), side="right"))
    last = token_at("<think>") + 1 if "<think>" in text else 0
    end = token_at("</think>") if "</think>" in text else len(pieces)
    if not thinking and "<think>" not in text and "</think>" in text:
        return []  # the thinking has an end but no beginning
    places, nearest = [], last  # `nearest` is the last end of a sentence so far
    for at in range(last + 1, end):
        if _ends_sentence(pieces, at):
            nearest = at
        if at % every == 0 and nearest > last:
            places.append(nearest)
            last = nearest
    return places


def _ends_sentence(pieces: Sequence[str], at: int) -> bool:
    """Returns whether a sentence ends before token `at`. Dots in "3." and "3.14" do not count."""
    before, after = pieces[at - 1], pieces[at][:1]
    text = before.rstrip()
    if "\n" not in before[len(text) :] and not text.rstrip("\"')]").endswith((".", "!", "?")):
        return False
    if not (before[-1:].isspace() or not after or after.isspace()):
        return False
    line = "".join(pieces[max(0, at - 4) : at]).rstrip().rpartition("\n")[2]
    return not _LISTED.fullmatch(line)


def check_contexts(
    options: PrivilegedOptions, stage: str, task: Task, problems: Sequence[Problem]
) -> None:
    """Checks that a task provides a stage's contexts, and that token limits leave room for them.

    Logs how many of the problems lack a context or lose a part of it.

    Args:
      options: the options of the stage.
      stage: its name, for messages.
      task: the data.
      problems: training and held-out problems to check.

    Raises:
      ConfigError: the task cannot give a context, no problem has one, or a token limit leaves no
        room for one.
    """
    if options.reinject_every and task.reminder is None:
        expected = "0, because the task has no `reminder`"
        fail(f"{stage}.reinject_every", options.reinject_every, expected)
    if options.has_memos:
        check_memos(options.memo, stage, task, problems)
    for kind in options.contexts:
        _check_context(options, stage, task, problems, kind)


def _check_context(
    options: PrivilegedOptions, stage: str, task: Task, problems: Sequence[Problem], kind: str
) -> None:
    """Checks that problems have contexts of one kind, and that token limits leave room for them."""
    limit, wording = options.teacher_prompt_tokens, worded_as(kind)
    found = context_kind(kind, f"{stage}.contexts")
    # The text of a memo, a sibling or a user's function depends on rollouts.
    find = None if found.needs_group or found.find is None else found.find(options)
    texts = ["" if find is None else find(problem, 0, ()) for problem in problems]
    cut = 0
    try:
        for problem, text in zip(problems, texts, strict=True):
            cut += task.teacher_prompt(problem, Context(wording, text or ""), limit)[1]
    except ValueError as error:
        raise ConfigError(f"config.{stage}.teacher_prompt_tokens is {limit}; {error}") from error
    if options.reinject_every and task.reminder is not None:
        try:
            task.reminder(Context(wording, ""), options.reminder_tokens)
        except ValueError as error:
            limit = options.reminder_tokens
            raise ConfigError(f"config.{stage}.reminder_tokens is {limit}; {error}") from error
    with_context = len(texts) - texts.count(None)
    if not with_context and len(options.contexts) == 1:
        expected = (
            f"another kind, because none of the {len(texts)} checked problems has this context"
        )
        fail(f"{stage}.contexts", (kind,), expected)
    if cut or with_context < len(texts):
        logger.warning(
            f"{stage}: of {len(texts)} problems checked, {with_context} have a context of kind "
            f"{kind!r}, and {cut} of these contexts must be cut to fit teacher_prompt_tokens = "
            f"{limit}."
        )
