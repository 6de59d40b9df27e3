"""What a run needs to know of its data: problems, how they become token ids, and who judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import grain

from opsd_jax.data.contexts import Context
from opsd_jax.problem import DataError, Problem
from opsd_jax.verify.verdict import Judge, Verifier


def check_fits(ids: list[int], limit: int, problem: Problem, field: str) -> list[int]:
    """The ids of a prompt.

    Raises:
      DataError: they are more than `limit`, the config's `field`; names the problem.
    """
    if len(ids) > limit:
        raise DataError(
            f"the prompt of problem {problem.id} has {len(ids)} tokens; {field} is {limit}."
        )
    return ids


class Demonstration(NamedTuple):
    """A prompt and the response to imitate, as token ids; the response ends with EOS."""

    prompt: Sequence[int]
    response: Sequence[int]


class Tokenizer(Protocol):
    """Text to token ids and back.

    Any of `eos_ids` ends a response; the first is what a demonstration ends with. `pad_id` only
    fills arrays: no loss and no attention sees it. `decode` takes any id that the model can sample,
    also where the model's vocabulary is larger.
    """

    vocab_size: int
    pad_id: int

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Task(NamedTuple):
    """Everything of the data that the stages use. Data sets are random-access and infinite or
    finite as they like: a step takes the elements at indices that depend on its number alone.

    Attributes:
      tokenizer: of prompts and responses.
      train: problems to roll out, each once.
      heldout: problems of the evaluation, disjoint from `train`.
      demonstrations: `seed -> data set of Demonstration`, for SFT.
      prompt: `Problem -> token ids`, what the student answers to.
      teacher_prompt: `(Problem, Context, limit) -> (token ids, whether they were cut)`, the same
        with the privileged text in it, in at most `limit` tokens: where they would be more, the end
        of the privileged text is left out and nothing else. DataError if that does not do.
      verify: a `Verifier`, or any pure `(Problem, response text) -> Verdict`, which then runs in a
        worker.
      note: what a reader of the figures has to know; the report shows it.
      stream: `seed -> data set` of the problems of `train` in the order in which they are rolled
        out; indices go on beyond its length. None is `train.shuffle(seed=seed).repeat()`: grain
        makes a new order for each time round.
      in_memory: the problems are there and cost nothing to look at: before a run begins, the
        longest are sought among all of them, however many.
      begun: what of a response its prompt has written already, such as "<think>": verifiers and
        contexts see it before the text of the response.
      memo_request: `(Problem, outcome) -> token ids` of what follows a response when the user asks
        for a memo on it, knowing that it is "correct", "incorrect" or "truncated", up to where the
        memo begins; None if there is no such thing.
      end_thinking: token ids that close the thinking of a memo that has used up its budget.
      reminder: `(Context, limit) -> (token ids, whether they were cut)`, the context as a thought
        within a response; None if there is no such thing.
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
