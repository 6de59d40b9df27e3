"""The interface between the data and the rest of a run: problems, prompts and the verifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import grain

from opsd_jax.data.contexts import Context
from opsd_jax.data.options import DataOptions
from opsd_jax.problem import DataError, Problem
from opsd_jax.verify.verdict import Judge, Verifier


def check_fits(ids: list[int], limit: int, problem: Problem, field: str) -> list[int]:
    """Checks that a prompt has at most `limit` tokens, and returns its token ids unchanged.

    Args:
      ids: token ids of the prompt.
      limit: largest number of tokens.
      problem: the problem of the prompt, for the error.
      field: config field with the limit, for the error.

    Raises:
      DataError: there are more than `limit` tokens.
    """
    if len(ids) > limit:
        raise DataError(
            f"the prompt of problem {problem.id} has {len(ids)} tokens; {field} is {limit}. "
            f"Increase {field}, or remove the problem from the data."
        )
    return ids


def check_no_sources(options: DataOptions, reason: str) -> None:
    """Raises ValueError if the config has sources, for a task that generates its problems.

    Args:
      options: the section `data`.
      reason: why there must be none, for the message.
    """
    if options.train or options.heldout or options.exclude:
        raise ValueError(
            f"{reason}, but config.data has sources; expected no sources, or config.task = "
            "'opsd_jax.data.text:task'."
        )


class Demonstration(NamedTuple):
    """An example for SFT: a prompt and the response to imitate.

    Attributes:
      prompt: token ids of the prompt.
      response: token ids of the response to imitate, which ends with an end-of-sequence token.
    """

    prompt: Sequence[int]
    response: Sequence[int]


class Tokenizer(Protocol):
    """Converts text to token ids and back.

    Attributes:
      vocab_size: number of token ids.
      pad_id: fills arrays; losses and attention ignore it.
      eos_ids: ids that end a response. Demonstrations end with the first.
    """

    vocab_size: int
    pad_id: int

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without adding special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids.

        It must accept every id that the model can sample, even beyond `vocab_size`.
        """
        ...


class Task(NamedTuple):
    """The data of a run, as its stages use it: problems, prompts, demonstrations and a verifier.

    Datasets are random-access. A step reads the elements at indices that depend only on the number
    of the step, so there is no iterator state.

    Attributes:
      tokenizer: tokenizer of prompts and responses.
      train: problems to train on, each once.
      heldout: problems to evaluate on, disjoint from `train`.
      demonstrations: `seed -> dataset of Demonstration`, for SFT.
      prompt: `Problem -> token ids` of the student's prompt.
      teacher_prompt: `(Problem, Context, limit) -> (token ids, cut)`, the prompt with the
        privileged context. If it would have more than `limit` tokens, the end of the context is
        left out, and `cut` is True. Raises DataError if it is too long without any context.
      verify: a `Verifier`, or a pure function `(Problem, response text) -> Verdict` that runs in a
        worker.
      note: what a reader of the results should know. The report shows it.
      stream: `seed -> dataset` with the problems of `train` in the order of training. Its indices
        continue beyond its length. None is `train.shuffle(seed=seed).repeat()`, which grain
        shuffles again for each epoch.
      in_memory: whether problems are cheap to read, so that the checks before a run may read all of
        them to find the longest.
      begun: text with which the prompt begins the response, such as "<think>". Verifiers and
        contexts read it in front of the response.
      memo_request: `(Problem, outcome) -> token ids` that follow a response when the user asks for
        a memo on it, up to the first token of the memo. The outcome is "correct", "incorrect" or
        "truncated". None if the task has no memos.
      end_thinking: token ids that close the thinking of a memo that has used up its budget.
      reminder: `(Context, limit) -> (token ids, cut)`, the context as a thought inside a response,
        cut as for `teacher_prompt`. None if the task has no reminders.
      unanswered: what the user can do if most responses have no readable answer, as a clause.
    """

    tokenizer: Tokenizer
    train: grain.MapDataset
    heldout: grain.MapDataset
    demonstrations: Callable[[int], grain.MapDataset]
    prompt: Callable[[Problem], list[int]]
    teacher_prompt: Callable[[Problem, Context, int], tuple[list[int], bool]]
    verify: Verifier | Judge
    note: str = ""
    stream: Callable[[int], grain.MapDataset] | None = None
    in_memory: bool = False
    begun: str = ""
    memo_request: Callable[[Problem, str], list[int]] | None = None
    end_thinking: Sequence[int] = ()
    reminder: Callable[[Context, int], tuple[list[int], bool]] | None = None
    unanswered: str = "train first with SFT on solutions with an answer that the verifier reads"
