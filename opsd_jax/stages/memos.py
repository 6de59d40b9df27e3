"""Memos: notes that the model writes about its rollouts, to show them to the teacher as contexts.

The user takes a second turn in the dialogue. It says whether the response was correct, what the
answer is, and asks for a memo. The model's thinking is stripped from the memo. Thinking that has
not ended within the budget is closed by force, and the memo that follows gets `close_tokens`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from opsd_jax.data.task import Task, check_fits
from opsd_jax.options import fail, option
from opsd_jax.policy import Params
from opsd_jax.problem import Problem
from opsd_jax.rollout import sampling
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.rollout.engine import Engine
from opsd_jax.stages.parts import Parts, Sampling
from opsd_jax.verify.extract import after_thinking
from opsd_jax.verify.outcomes import Outcomes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoOptions:
    """The options for sampling memos: token budgets, decoding slots and temperature."""

    request_tokens: int = option(256, "Longest request for a memo, in tokens.", at_least=1)
    tokens: int = option(1024, "Token budget of a memo, the model's thinking included.", at_least=1)
    close_tokens: int = option(
        256, "Further tokens for a memo whose thinking had to be closed.", at_least=1
    )
    slots: int = option(32, "Decoding slots: memos written at the same time.", at_least=1)
    temperature: float = option(1.0, "Sampling temperature of memos.", at_least=0)


def memo_sampling(
    options: MemoOptions,
    prompt_tokens: int,
    response_tokens: int,
    memos: int,
    task: Task | None = None,
) -> tuple[Sampling, Sampling]:
    """Returns a `Sampling` for memos, and one for continuing memos whose thinking was cut off.

    Args:
      options: the options of memos.
      prompt_tokens: longest prompt of a rollout, in tokens.
      response_tokens: token budget of a rollout.
      memos: memos per step.
      task: gives the tokens that close the thinking; None counts no such tokens.
    """
    before = prompt_tokens + response_tokens + options.request_tokens
    write = Sampling(
        name="memos",
        slots_field="memo.slots",
        response_tokens_field="memo.tokens",
        slots=options.slots,
        group_size=1,
        rollouts=options.slots,
        prompt_tokens=before,
        response_tokens=options.tokens,
        samples=memos,
        response_in_prompt=response_tokens,
    )
    close = write._replace(
        name="memos, closed",
        response_tokens_field="memo.close_tokens",
        prompt_tokens=before + options.tokens + (len(task.end_thinking) if task else 0),
        response_tokens=options.close_tokens,
        continues=True,
    )
    return write, close


def check_memos(options: MemoOptions, stage: str, task: Task, problems: Sequence[Problem]) -> None:
    """Checks that the task can request memos, and that each request fits `request_tokens`.

    Args:
      options: the options of memos.
      stage: the name of the stage, for messages.
      task: the data.
      problems: training and held-out problems to check.

    Raises:
      ConfigError: the task has no `memo_request`, or a request is too long.
    """
    if task.memo_request is None:
        expected = "kinds other than 'memo', because the task has no `memo_request`"
        fail(f"{stage}.contexts", "memo", expected)
    limit = options.request_tokens
    for problem in problems:
        for outcome in Outcomes._fields:
            needed = len(task.memo_request(problem, outcome))
            if needed > limit:
                expected = (
                    f"at least {needed}, the number of tokens in the memo request for problem "
                    f"{problem.id}"
                )
                fail(f"{stage}.memo.request_tokens", limit, expected)


def make_memos(
    options: MemoOptions, parts: Parts, seed: int, prompt_tokens: int, response_tokens: int
) -> Memos:
    """Compiles the engines that sample memos, and returns a `Memos` object that uses them.

    Args:
      options: the options of memos.
      parts: the parts of the run.
      seed: the seed of the random numbers.
      prompt_tokens: longest prompt of a rollout, in tokens.
      response_tokens: token budget of a rollout.
    """
    write, close = (
        each.engine(parts.engines)
        for each in memo_sampling(options, prompt_tokens, response_tokens, 0, parts.task)
    )
    vocab_size = parts.model.vocab_size
    return Memos(options, parts.task, seed, vocab_size, write, close, parts.poll)


class Memos:
    """Samples memos: notes that the model writes about its own rollouts.

    A memo depends only on the seed, the step, its place in the step, the parameters and the
    rollout.
    """

    def __init__(
        self,
        options: MemoOptions,
        task: Task,
        seed: int,
        vocab_size: int,
        write: Engine,
        close: Engine,
        poll: Callable[[], None] = lambda: None,
    ):
        """Creates a memo sampler from two compiled engines.

        Args:
          options: the options of memos.
          task: the data; it has a `memo_request`.
          seed: the seed of the random numbers.
          vocab_size: the vocabulary size of the model.
          write, close: engines with the shapes of `memo_sampling`.
          poll: called while they sample; an exception that it raises ends the sampling.

        Raises:
          ValueError: the task has no `memo_request`.
        """
        if task.memo_request is None:
            raise ValueError(
                "task.memo_request is None; expected a function, because the teacher's contexts "
                "include memos."
            )
        self._request, self._task, self._seed = task.memo_request, task, seed
        self._options, self._write, self._close, self._poll = options, write, close, poll
        self._sampling_params = sampling.params(
            vocab_size, stop=task.tokenizer.eos_ids, temperature=options.temperature
        )

    def __call__(
        self, step: int, params: Params, rollouts: Rollouts, rows: Sequence[int], offset: int = 0
    ) -> list[str | None]:
        """Samples a memo about each of the selected rollouts.

        Args:
          step: the number of the step in the stage.
          params: the parameters of the model that writes.
          rollouts: the rollouts, with their verdicts.
          rows: the indices of the selected rollouts.
          offset: the number of memos that this step has already sampled.

        Returns:
          The text of each memo; None if the model wrote nothing.

        Raises:
          DataError: a request for a memo has more than `request_tokens` tokens.
        """
        prompts = [self._prompt(rollouts, i) for i in rows]
        keys = [sampling.folded_key(self._seed, step, turn) for turn in range(2)]
        memos = self._sample(self._write, params, prompts, keys[0], offset)
        open_ended = [j for j, ids in enumerate(memos) if after_thinking(self._text(ids)) is None]
        closed = [[*self._without_eos(memos[j]), *self._task.end_thinking] for j in open_ended]
        continued = [[*prompts[j], *ids] for j, ids in zip(open_ended, closed, strict=True)]
        rest = self._sample(self._close, params, continued, keys[1], offset)
        for j, ids, more in zip(open_ended, closed, rest, strict=True):
            memos[j] = [*ids, *more]
        return [(after_thinking(self._text(ids)) or "").strip() or None for ids in memos]

    def _prompt(self, rollouts: Rollouts, i: int) -> list[int]:
        """Returns the prompt for a memo: the rollout's prompt, its response, and the request."""
        problem, response = rollouts.problems[i], rollouts.responses[i].tolist()
        outcomes = rollouts.judged.outcomes
        outcome = next(name for name in Outcomes._fields if getattr(outcomes, name)[i])
        request = check_fits(
            self._request(problem, outcome),
            self._options.request_tokens,
            problem,
            "memo.request_tokens",
        )
        # The request begins with the tokens that end the model's turn.
        return [*self._task.prompt(problem), *self._without_eos(response), *request]

    def _sample(
        self, engine: Engine, params: Params, prompts: list[list[int]], key: jax.Array, offset: int
    ) -> list[list[int]]:
        """Samples one response to each prompt, and returns the token ids of each response."""
        made: dict[int, list[int]] = {}
        numbers = [[offset + i] for i in range(len(prompts))]
        for ended in engine(
            params,
            prompts,
            numbers,
            key=key,
            sampling_params=self._sampling_params,
            poll=self._poll,
        ):
            made |= {response.prompt: response.tokens.tolist() for response in ended.responses}
        return [made[i] for i in range(len(prompts))]

    def _without_eos(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids[-1] in self._task.tokenizer.eos_ids else ids

    def _text(self, ids: list[int]) -> str:
        return self._task.begun + self._task.tokenizer.decode(ids)
