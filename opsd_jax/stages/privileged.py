"""What the teacher is given of each rollout: its prompt with the context, and reminders."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from opsd_jax.config import import_function
from opsd_jax.data import contexts
from opsd_jax.data.contexts import Attempt, Context, Find
from opsd_jax.data.task import Task
from opsd_jax.policy import Params
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.stages.batch import Inserts
from opsd_jax.stages.memos import Memos

_ENDS_SENTENCE = re.compile(r"[.!?][\"')\]]*\s*$|\n\s*$")


class Taught(NamedTuple):
    """What the teachers of some rollouts are given.

    Attributes:
      rows: rollout -> `{"teacher": prompt ids, "teacher/inserts": Inserts}`, in the order of the
        rollouts. Those without a usable context are not there.
      metrics: how many had none, how many contexts were cut, and how many there are of each kind.
    """

    rows: dict[int, dict[str, Any]]
    metrics: dict[str, float]


class Privileged:
    """Finds the contexts of rollouts, as an OPSD stage's section says."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        task: Task,
        group_size: int,
        memos: Memos | None = None,
    ):
        """
        Args:
          config: the section of an OPSD stage.
          task: of the run.
          group_size: rollouts of each problem, which stand next to each other.
          memos: writes the contexts "memo", if the section has that kind.

        Raises:
          ValueError: the task has no reminders, and they are asked for.
        """
        self._config, self._task, self._memos = config, task, memos
        self._group_size = group_size
        self._find: dict[str, Find] = {
            "solution": contexts.solution,
            "answer": contexts.answer,
            "sibling": contexts.sibling(config.sibling, thinking=config.sibling_thinking),
            "concise": contexts.nothing,
            "column": contexts.column(config.context_column),
            "none": contexts.nothing,
        }
        own = [kind for kind in config.contexts if ":" in kind]
        self._find |= {kind: import_function(kind, "opsd.contexts") for kind in own}
        self._looks_around = bool(own) or "sibling" in config.contexts
        if config.reinject_every and task.reminder is None:
            raise ValueError("reinject_every is set, and the task has no reminder.")

    def insert_tokens(self, padded: int) -> int:
        """The most tokens that reminders add to a response of up to `padded` tokens."""
        every = self._config.reinject_every
        return padded // every * self._config.reminder_tokens if every else 0

    def __call__(
        self,
        step: int,
        params: Params,
        rollouts: Rollouts,
        wanted: Iterable[int],
        *,
        capacity: int,
    ) -> Taught:
        """What the teachers of the first `capacity` of the wanted rollouts with a context see.

        Args:
          step: of the stage; memos depend on it.
          params: the current ones, which write memos.
          rollouts: with their verdicts, in whole groups.
          wanted: indices, ascending.
          capacity: see above.

        Raises:
          DataError: a teacher's prompt does not fit even without its context; names the problem.
        """
        found: dict[int, Context | None] = {}
        pending: list[int] = []  # that need a memo
        attempts = functools.cache(functools.partial(self._attempts, rollouts))

        def find(i: int, kinds: Sequence[str]) -> Context | None:
            first = i - i % self._group_size
            group = attempts(first) if self._looks_around else ()
            for kind in kinds:
                text = self._find[kind](rollouts.problems[i], i - first, group)
                if text is not None:
                    return Context("column" if ":" in kind else kind, text)
            return None

        kinds = tuple(self._config.contexts)
        before, memo, after = kinds, (), ()
        if "memo" in kinds:
            at = kinds.index("memo")
            before, memo, after = kinds[:at], kinds[at : at + 1], kinds[at + 1 :]
        usable = 0
        for i in wanted:
            if usable == capacity:
                break
            found[i] = find(i, before)
            if found[i] is None and memo:
                pending.append(i)
            usable += found[i] is not None or bool(memo)
        if pending:
            assert self._memos is not None
            for i, text in zip(pending, self._memos(step, params, rollouts, pending), strict=True):
                found[i] = find(i, after) if text is None else Context("memo", text)

        rows, cut = {}, 0
        for i, context in found.items():
            if context is None:
                continue
            prompt, was_cut = self._task.teacher_prompt(
                rollouts.problems[i], context, self._config.teacher_prompt_tokens
            )
            cut += was_cut
            inserts = self._reminders(context, rollouts.responses[i])
            rows[i] = {"teacher": prompt, "teacher/inserts": inserts}
        counts = Counter({"column" if ":" in kind else kind: 0 for kind in kinds})
        counts.update(context.kind for context in found.values() if context)
        metrics = {
            "no_context": float(len(found) - len(rows)),
            "context_cut": float(cut),
            **{f"context/{kind}": float(count) for kind, count in counts.items()},
        }
        return Taught(rows, metrics)

    def _attempts(self, rollouts: Rollouts, first: int) -> list[Attempt]:
        """The group that begins with rollout `first`."""
        correct = rollouts.judged.groups.correct
        return [
            Attempt(
                self._task.begun + self._task.tokenizer.decode(rollouts.responses[i].tolist()),
                len(rollouts.responses[i]),
                bool(correct[i]),
            )
            for i in range(first, first + self._group_size)
        ]

    def _reminders(self, context: Context, response: np.ndarray) -> Inserts:
        every, reminder = self._config.reinject_every, self._task.reminder
        if not every or reminder is None:
            return []
        ids = reminder(context, self._config.reminder_tokens)
        pieces = [self._task.tokenizer.decode([token]) for token in response.tolist()]
        return [(at, ids) for at in reminder_places(pieces, every)] if ids else []


def reminder_places(pieces: Sequence[str], every: int) -> list[int]:
    """Where reminders go into a response: about every so many tokens, where a sentence ends.

    Args:
      pieces: the text of each token.
      every: tokens; each multiple of it is moved back to the next end of a sentence, and left out
        if there is none since the last.

    Returns:
      Indices of tokens that reminders stand before, ascending; none after `</think>`.
    """
    thought = "".join(pieces).partition("</think>")
    end = len(pieces)
    if thought[1]:
        ends = np.cumsum([len(piece) for piece in pieces])
        end = int(np.searchsorted(ends, len(thought[0]), side="right"))
    places, last = [], 0
    for target in range(every, end, every):
        for at in range(target, last, -1):
            goes_on = pieces[at][:1]
            if _ENDS_SENTENCE.search(pieces[at - 1]) and (
                pieces[at - 1][-1:].isspace() or not goes_on or goes_on.isspace()
            ):
                places.append(at)
                last = at
                break
    return places
