"""`Parts`: the objects from which a stage is built. `Sampling`: what a stage samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from opsd_jax.data.task import Task
from opsd_jax.policy import Model
from opsd_jax.rollout.engine import Engine
from opsd_jax.stages import flops
from opsd_jax.stages.options import StageOptions
from opsd_jax.stages.packing import Packing
from opsd_jax.verify.pool import VerifierPool

T = TypeVar("T")
MakeEngine = Callable[..., Engine]  # the sizes that `Sampling.engine` passes -> the engine


class TokenLimits(Protocol):
    """Protocol for options with token limits, such as those of a stage or an evaluation."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def response_tokens(self) -> int: ...


class Sampling(NamedTuple):
    """A sampling phase of each training step: its engine's sizes and its number of responses.

    Attributes:
      name: its name in a plan, such as "rollouts".
      slots_field: the field of its section that sets `slots`, such as "memo.slots".
      response_tokens_field: the field of its section that sets `response_tokens`.
      slots: decoding slots, over all devices.
      group_size: responses per prompt.
      rollouts: the most responses that one call of the engine samples.
      prompt_tokens: longest prompt.
      response_tokens: token budget of a response.
      samples: responses per step.
      response_in_prompt: tokens of the prompt that are an earlier response at its full budget. The
        plan assumes shorter responses, and therefore shorter prompts.
      pool_tokens: number of tokens that a paged cache holds, over all devices; 0 for `slots` times
        the longest rollout.
      continues: whether this sampling continues the responses of the entry before this one that
        filled their budget.
      carries_over: whether a call of the engine continues rollouts of the call before it.
      speculation: tokens that speculation guesses per forward pass; 0 turns it off.
    """

    name: str
    slots_field: str
    response_tokens_field: str
    slots: int
    group_size: int
    rollouts: int
    prompt_tokens: int
    response_tokens: int
    samples: int
    response_in_prompt: int = 0
    pool_tokens: int = 0
    continues: bool = False
    carries_over: bool = False
    speculation: int = 0

    def engine(self, engines: Callable[..., T]) -> T:
        """Builds the engine of this sampling, by calling `engines` with its sizes.

        With `Parts.engines`, this returns the compiled engine.
        """
        return engines(
            slots=self.slots,
            group_size=self.group_size,
            rollouts=self.rollouts,
            prompt_tokens=self.prompt_tokens,
            response_tokens=self.response_tokens,
            continues=self.carries_over,
            speculation=self.speculation,
            pool_tokens=self.pool_tokens,
        )


class Parts(NamedTuple):
    """The objects from which a stage is built, such as the task, the model and the engines.

    Attributes:
      task: the data: problems, prompts, verifier.
      model: the model.
      engines: compiles engines that sample.
      pool: worker processes that verify responses.
      seed: seed of the stage.
      seed_of: name -> the seed of a named part of the run.
      row_shards: the number of shards over which the mesh splits the rows of a microbatch.
      poll: called while the stage samples; an exception that it raises ends the sampling.
      trained: forward passes that take as long as a forward and a backward pass of the model.
    """

    task: Task
    model: Model
    engines: MakeEngine
    pool: VerifierPool
    seed: int
    seed_of: Callable[[str], int]
    row_shards: int = 1
    poll: Callable[[], None] = lambda: None
    trained: int = flops.TRAINED

    def packing(self, options: StageOptions) -> Packing | None:
        """Returns how responses share rows; None if the options or the model do not allow it."""
        return Packing(self.row_shards) if options.packing and self.model.packs else None
