"""Memos: what the model itself writes when it looks back at a rollout, knowing how it went.

The dialogue goes on with a second turn of the user, which says whether the response was right, what
the answer is, and asks for a memo. The model's thinking about that is stripped; where it has not
ended within the budget it is closed by force, and the memo gets what `close_tokens` allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_collections

from opsd_jax.data.task import Task, check_fits
from opsd_jax.policy import Params
from opsd_jax.rollout import sampling
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.rollout.engine import Engine
from opsd_jax.verify.extract import after_thinking
from opsd_jax.verify.outcomes import Groups


def sizes(
    config: ml_collections.ConfigDict, task: Task, prompt_tokens: int, response_tokens: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The longest prompt and response of a memo, and of what follows where its thinking was closed.

    Args:
      config: the section `memo` of an OPSD stage.
      task: of the run.
      prompt_tokens, response_tokens: the most that there are before the request.
    """
    before = prompt_tokens + response_tokens + config.request_tokens
    closed = before + config.tokens + len(task.end_thinking)
    return (before, config.tokens), (closed, config.close_tokens)


class Memos:
    """Writes memos on rollouts: a function of (seed, step), the parameters and the rollouts."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        task: Task,
        seed: int,
        vocab_size: int,
        write: Engine,
        close: Engine,
        poll: Callable[[], None] = lambda: None,
    ):
        """`config` is the section `memo` of a stage; `write` and `close` hold its `sizes`;
        `poll` is called while they sample, and what it raises ends that.
        """
        assert task.memo_request is not None  # sizes.check
        self._request, self._task, self._seed = task.memo_request, task, seed
        self._config, self._write, self._close, self._poll = config, write, close, poll
        self._rule = sampling.rule(
            vocab_size, stop=task.tokenizer.eos_ids, temperature=config.temperature
        )

    def __call__(
        self, step: int, params: Params, rollouts: Rollouts, rows: Sequence[int], offset: int = 0
    ) -> list[str | None]:
        """The memo on each of `rows` of the rollouts; None where nothing was written. `offset` is
        the number of memos that the step has already.
        """
        task, tokenizer = self._task, self._task.tokenizer
        groups = rollouts.judged.groups

        def unended(ids: list[int]) -> list[int]:
            return ids[:-1] if ids[-1] in tokenizer.eos_ids else ids

        def asked(i: int) -> list[int]:
            problem, response = rollouts.problems[i], rollouts.responses[i].tolist()
            group = next(name for name in Groups._fields if getattr(groups, name)[i])
            request = check_fits(
                self._request(problem, group),
                self._config.request_tokens,
                problem,
                "memo.request_tokens",
            )
            # The request begins with what ends the model's turn.
            return [*task.prompt(problem), *unended(response), *request]

        def sample(engine: Engine, prompts: list[list[int]], turn: int) -> list[list[int]]:
            made: dict[int, list[int]] = {}
            numbers = [[offset + i] for i in range(len(prompts))]
            turn_key = sampling.folded_key(self._seed, step, turn)
            for ended in engine(
                params, prompts, numbers, key=turn_key, rule=self._rule, poll=self._poll
            ):
                made |= {response.prompt: response.tokens.tolist() for response in ended.responses}
            return [made[i] for i in range(len(prompts))]

        def text(ids: list[int]) -> str:
            return task.begun + tokenizer.decode(ids)

        prompts = [asked(i) for i in rows]
        memos = sample(self._write, prompts, 0)
        open_ended = [j for j, ids in enumerate(memos) if after_thinking(text(ids)) is None]
        closed = [[*unended(memos[j]), *task.end_thinking] for j in open_ended]
        rest = sample(
            self._close, [[*prompts[j], *ids] for j, ids in zip(open_ended, closed, strict=True)], 1
        )
        for j, ids, more in zip(open_ended, closed, rest, strict=True):
            memos[j] = [*ids, *more]
        return [(after_thinking(text(ids)) or "").strip() or None for ids in memos]
