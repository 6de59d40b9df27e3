"""What the teacher is given of each rollout: its prompt with the context, and reminders."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from opsd_jax.data.contexts import Attempt, Context, Find, context_kind, worded_as
from opsd_jax.data.task import Task
from opsd_jax.policy import Params
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.stages.batch import Inserts
from opsd_jax.stages.memos import Memos

_LISTED = re.compile(r"\s*\d+\.")
_ENDS_SENTENCE = re.compile(r"[.!?][\"')\]]*\s*$|\n\s*$")


def inserted_tokens(config: ml_collections.ConfigDict, response_tokens: int) -> int:
    """The most tokens that reminders add to a response of so many; `config` is an OPSD stage's."""
    every = config.reinject_every
    return response_tokens // every * config.reminder_tokens if every else 0


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
        """
        self._config, self._task, self._memos = config, task, memos
        self._group_size = group_size
        kinds = {kind: context_kind(kind, "opsd.contexts") for kind in config.contexts}
        self._find: dict[str, Find] = {
            name: kind.find(config) for name, kind in kinds.items() if kind.find is not None
        }
        self._looks_around = any(kind.needs_group for kind in kinds.values())

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
        attempts = functools.cache(functools.partial(self._attempts, rollouts))
        kinds = tuple(self._config.contexts)
        at = kinds.index("memo") if "memo" in kinds else len(kinds)

        def find(i: int, kinds: Sequence[str]) -> Context | None:
            first = i - i % self._group_size
            group = attempts(first) if self._looks_around else ()
            for kind in kinds:
                text = self._find[kind](rollouts.problems[i], i - first, group)
                if text is not None:
                    return Context(worded_as(kind), text)
            return None

        ahead, usable, asked = iter(wanted), 0, 0
        while usable < capacity:
            pending: list[int] = []  # that need a memo; some may come to nothing
            for i in ahead:
                found[i] = find(i, kinds[:at])
                if found[i] is not None:
                    usable += 1
                elif at < len(kinds):
                    pending.append(i)
                if usable + len(pending) == capacity:
                    break
            if not pending:
                break
            assert self._memos is not None
            memos = self._memos(step, params, rollouts, pending, offset=asked)
            asked += len(pending)
            for i, text in zip(pending, memos, strict=True):
                found[i] = find(i, kinds[at + 1 :]) if text is None else Context("memo", text)
                usable += found[i] is not None

        rows, cut, reminders_cut = {}, 0, 0
        for i, context in found.items():
            if context is None:
                continue
            prompt, was_cut = self._task.teacher_prompt(
                rollouts.problems[i], context, self._config.teacher_prompt_tokens
            )
            cut += was_cut
            inserts, reminder_was_cut = self._reminders(context, rollouts.responses[i])
            reminders_cut += reminder_was_cut
            rows[i] = {"teacher": prompt, "teacher/inserts": inserts}
        counts = Counter({worded_as(kind): 0 for kind in kinds})
        counts.update(context.kind for context in found.values() if context)
        metrics = {
            "no_context": float(len(found) - len(rows)),
            "context_cut": float(cut),
            **({"reminder_cut": float(reminders_cut)} if self._config.reinject_every else {}),
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

    def _reminders(self, context: Context, response: np.ndarray) -> tuple[Inserts, bool]:
        """The reminders in a response, and whether they were cut."""
        every, task = self._config.reinject_every, self._task
        if not every:
            return [], False
        assert task.reminder is not None  # sizes.check
        ids, cut = task.reminder(context, self._config.reminder_tokens)
        own = response.tolist()
        if own[-1] in task.tokenizer.eos_ids:
            own = own[:-1]
        pieces = [task.tokenizer.decode([token]) for token in own]
        places = reminder_places(pieces, every, thinking="<think>" in task.begun)
        return [(at, ids) for at in places if ids], cut


def reminder_places(pieces: Sequence[str], every: int, *, thinking: bool = False) -> list[int]:
    """Where reminders go into a response: about every so many tokens, where a sentence ends.

    In one that thinks aloud they are within the thought, in another anywhere but at its end.

    Args:
      pieces: the text of each token, without EOS.
      every: tokens; each multiple of it is moved back to the next end of a sentence, and left out
        if there is none since the last.
      thinking: the prompt has begun a thought.

    Returns:
      Indices of tokens that reminders stand before, ascending.
    """
    text = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    token_at = lambda tag: int(np.searchsorted(ends, text.index(tag), side="right"))
    last = token_at("<think>") + 1 if "<think>" in text else 0
    end = token_at("</think>") if "</think>" in text else len(pieces)
    if not thinking and "<think>" not in text and "</think>" in text:
        return []  # no thought that we know the beginning of
    places = []
    for target in range(every, end, every):
        for at in range(target, last, -1):
            if _ends_sentence(pieces, at):
                places.append(at)
                last = at
                break
    return places


def _ends_sentence(pieces: Sequence[str], at: int) -> bool:
    """Whether a sentence ends before piece `at`: not inside a number, nor after that of a list."""
    before, after = pieces[at - 1], pieces[at][:1]
    if not _ENDS_SENTENCE.search(before):
        return False
    if not (before[-1:].isspace() or not after or after.isspace()):
        return False
    line = "".join(pieces[max(0, at - 4) : at]).rstrip().rpartition("\n")[2]
    return not _LISTED.fullmatch(line)
