"""The rollout engine, which samples responses to prompts and yields them as they end.

A fixed number of decoding slots is filled from a queue. The engine refills a slot as soon as its
rollout ends, so a long rollout does not delay the others. Each prompt is prefilled once, and its
keys and values are copied into the slot of each of its rollouts. A rollout can also continue from
tokens that an earlier call sampled: they are prefilled after its prompt.

The host starts a chunk of decoding steps and then fetches the sampled tokens. All its decisions
depend only on these tokens and on the arguments, so every host makes the same decisions.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Model, Params
from opsd_jax.rollout import sampling
from opsd_jax.rollout.batch import NO_TOKENS, Batch, Response, Rollout, left_pad
from opsd_jax.rollout.decoding import Decoding
from opsd_jax.rollout.programs import (
    ROLLOUTS_PER_INSERT,
    STEPS_PER_CHUNK,
    EngineShape,
    Programs,
)
from opsd_jax.rollout.slots import RUNNING, STOP_EOS, STOP_LENGTH, Chunk

__all__ = [
    "NOTHING_BEGUN",
    "NO_TOKENS",
    "ROLLOUTS_PER_INSERT",
    "RUNNING",
    "STEPS_PER_CHUNK",
    "STOP_EOS",
    "STOP_LENGTH",
    "EndedRollouts",
    "Engine",
    "EngineShape",
    "Response",
    "default_cache_lengths",
    "left_pad",
    "shape_for",
]

SHORTEST_CACHE = 128  # tokens; a shorter cache would save little
NOTHING_BEGUN: Mapping[tuple[int, int], Response] = types.MappingProxyType({})


class EndedRollouts(NamedTuple):
    """The responses of the rollouts that ended during one chunk of decoding steps.

    Attributes:
      responses: at least one. If the engine was told to stop early, the last ones are those of the
        rollouts that have not ended.
      device_is_idle: `() -> bool`, whether the device has nothing left to do, because the next
        chunk is finished or there is none.
      steps: number of forward passes of decoding since the last batch, or since the beginning.
    """

    responses: list[Response]
    device_is_idle: Callable[[], bool]
    steps: int = 0


def shape_for(
    *,
    slots: int,
    group_size: int,
    rollouts: int,
    prompt_tokens: int,
    response_tokens: int,
    shards: int,
    continues: bool = False,
    speculation: int = 0,
    pool_tokens: int = 0,
) -> EngineShape:
    """Computes the `EngineShape` for a given number and size of rollouts.

    The engine has no more slots than rollouts, and one prefill fills a quarter of the slots. Both
    numbers are rounded up to a multiple of `shards`.

    Args:
      slots: maximum number of decoding slots.
      group_size: rollouts per prompt.
      rollouts: rollouts per call of the engine.
      prompt_tokens: maximum length of a prompt, in tokens.
      response_tokens: maximum length of a response, in tokens.
      shards: number of parts that the mesh splits rows into (`mesh.row_shards`).
      continues: whether rollouts can continue from tokens of an earlier call.
      speculation: tokens that speculation guesses per forward pass; 0 turns it off.
      pool_tokens: number of tokens that a paged cache holds; see `EngineShape`.
    """
    rounded_up = lambda count: -(-count // shards) * shards
    slots = min(slots, rounded_up(rollouts))
    prompts = rounded_up(max(1, slots // (4 * group_size)))
    if pool_tokens >= slots * (prompt_tokens + response_tokens):
        pool_tokens = 0  # every slot has room for the longest rollout
    return EngineShape(
        slots,
        prompts,
        prompt_tokens,
        response_tokens,
        continues=continues or pool_tokens > 0,
        speculation=speculation,
        pool_tokens=pool_tokens,
    )


def default_cache_lengths(shape: EngineShape) -> list[int]:
    """Returns the default cache lengths of an engine, in tokens, in ascending order.

    Each length is about twice the previous one. A decoding step reads the whole cache, so the
    engine keeps it only as long as its longest active rollout needs.
    """
    sizes = [shape.prompt_tokens + shape.response_tokens]
    while sizes[0] > SHORTEST_CACHE and (half := -(-sizes[0] // 128) * 64) >= SHORTEST_CACHE:
        sizes.insert(0, half)
    return sizes


class Engine:
    """Samples responses to prompts with programs that are compiled at construction.

    Attributes:
      shape: the sizes that the programs are compiled for.
      cache_lengths: the lengths that the slots' cache can take, in tokens, ascending.
      cache_bytes: bytes per device of the slots' cache at its longest.
      cache_tokens: number of tokens in this cache, over all devices.
      pool_sizes: the sizes of its page pool.
      prefill_cache_bytes: bytes per device of the cache of one prefill.
      continued: rollouts that continue in one execution of a program.
      continue_lengths: the numbers of columns of these programs, ascending.
      decoding: the memory traffic and the time of all calls so far.
    """

    def __init__(
        self,
        model: Model,
        abstract_params: Params,
        mesh: jax.sharding.Mesh,
        shape: EngineShape,
        *,
        pad_id: int = 0,
        cache_lengths: Sequence[int] | None = None,
    ):
        """Compiles the programs of the engine.

        Args:
          model: the model. Its `cache_rules` define the sharding of the cache.
          abstract_params: the parameters' shapes and shardings in the layout for decoding.
          mesh: the mesh of that layout.
          shape: the sizes. `slots` and `prompts` are multiples of data x fsdp.
          pad_id: the token id of padding.
          cache_lengths: the lengths that the slots' cache can take, in tokens, ascending. The
            default value is `default_cache_lengths(shape)`. For a ragged model, which reads only
            the filled part of a cache, it is the largest length alone.

        Raises:
          ValueError: `cache_lengths` do not ascend, or the last one is too short. Or
            `shape.speculation` is not 0, and the model does not support it. Or `shape.pool_tokens`
            is too small for one rollout, or the model's cache has no pages.
        """
        longest = shape.prompt_tokens + shape.response_tokens
        if cache_lengths is None:
            cache_lengths = [longest] if model.ragged else default_cache_lengths(shape)
        lengths = list(cache_lengths)
        if lengths != sorted({*lengths}) or lengths[-1] < longest - 1:
            raise ValueError(
                f"cache_lengths is {lengths}; expected strictly ascending lengths in tokens, with "
                f"a last value of at least {longest - 1} (prompt_tokens + response_tokens - 1)."
            )
        self.shape, self.cache_lengths = shape, lengths
        self._pad_id, self._vocab_size = pad_id, model.vocab_size
        self._programs = Programs(model, abstract_params, mesh, shape, lengths)
        self.cache_bytes = self._programs.cache_bytes
        self.cache_tokens = self._programs.cache_tokens
        self.pool_sizes = self._programs.pool_sizes
        self.prefill_cache_bytes = self._programs.prefill_cache_bytes
        self.continued, self.continue_lengths = self._programs.continued, [*self._programs.proceed]
        self._weight_bytes = mesh_lib.shard_bytes(abstract_params)
        self.decoding = Decoding()

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        ids: Sequence[Sequence[int]],
        *,
        key: jax.Array,
        sampling_params: sampling.SamplingParams,
        budgets: Sequence[Sequence[int]] | None = None,
        begun: Mapping[tuple[int, int], Response] = NOTHING_BEGUN,
        enough: Callable[[Sequence[Response]], bool] = lambda ended: False,
        poll: Callable[[], None] = lambda: None,
    ) -> Iterator[EndedRollouts]:
        """Samples rollouts for each prompt, and yields the responses in batches as rollouts end.

        The engine starts the next chunk on the device before it yields the rollouts that ended in
        the last one.

        Args:
          params: the model's parameters in the layout for decoding.
          prompts: token ids of any number of prompts.
          ids: for each prompt, the ids of its rollouts, in [0, 2^31). All ids under one key are
            different: the id selects the rollout's random numbers.
          key: PRNG key for this training step and purpose.
          sampling_params: from `sampling.params`.
          budgets: for each prompt, the maximum number of tokens of each response. The default value
            is the shape's `response_tokens`.
          begun: for the rollout `(prompt, member)`, a response with stop RUNNING whose tokens it
            continues. These rollouts start first. The shape has to have `continues`.
          enough: called with the responses that ended in each chunk. Once it returns True, the
            engine yields the responses of all other rollouts, with stop RUNNING, and ends. It has
            to decide the same on every host.
          poll: called between chunks. An exception that it raises ends the sampling. It has to
            raise on every host at the same time.

        Raises:
          ValueError: a prompt or a budget does not fit the shape, a rollout cannot continue, or
            `sampling_params` are for another vocabulary.
        """
        self._check_vocabulary(len(sampling_params.stop))
        groups = self._groups(prompts, ids, budgets, begun)
        if not groups:
            return
        steps, ended, began = 0, list[Response](), time.monotonic()
        batch = Batch(self._programs, groups, self._pad_id, params, key, sampling_params)
        while True:
            batch.fill_slots()
            chunk = batch.decode()
            if ended:
                yield EndedRollouts(ended, functools.partial(_is_done, chunk), steps)
                steps = 0
            if chunk is None:
                return
            poll()
            ended, passes, read = batch.record(chunk)
            steps += passes
            began = self._count(passes, read, began)
            if ended and enough(ended):
                yield EndedRollouts(ended + batch.unfinished(), lambda: True, steps)
                return

    def _count(self, passes: int, read: int, began: float) -> float:
        """Adds a chunk, and the time since `began`, to `decoding`. Returns the current time."""
        now = time.monotonic()
        traffic = passes * self._weight_bytes + read * self.cache_bytes / self.cache_tokens
        self.decoding = Decoding(self.decoding.bytes + traffic, self.decoding.seconds + now - began)
        return now

    def _groups(
        self,
        prompts: Sequence[Sequence[int]],
        ids: Sequence[Sequence[int]],
        budgets: Sequence[Sequence[int]] | None,
        begun: Mapping[tuple[int, int], Response],
    ) -> list[list[Rollout]]:
        """Validates the arguments, and groups the rollouts by prompt. Omits prompts without any."""
        P, L = self.shape.prompt_tokens, self.shape.response_tokens
        if budgets is None:
            budgets = [[L] * len(prompt_ids) for prompt_ids in ids]
        groups = []
        for i, (prompt, own, room) in enumerate(zip(prompts, ids, budgets, strict=True)):
            if not 0 < len(prompt) <= P:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; expected 1 to {P} (prompt_tokens)."
                )
            if len(room) != len(own) or not all(0 < budget <= L for budget in room):
                raise ValueError(
                    f"budgets[{i}] is {room}; expected one value for each of the {len(own)} "
                    f"rollouts of prompt {i}, from 1 to {L} tokens."
                )
            for j, budget in enumerate(room):
                self._check_begun(begun.get((i, j)), i, j, budget)
            rollouts = [
                Rollout(i, j, prompt, rollout_id, budget, begun.get((i, j)))
                for j, (rollout_id, budget) in enumerate(zip(own, room, strict=True))
            ]
            if rollouts:
                groups.append(rollouts)
        return groups

    def _check_vocabulary(self, size: int) -> None:
        """Raises ValueError if `size` is not the vocabulary size of the model."""
        if size != self._vocab_size:
            raise ValueError(
                f"sampling_params was built for a vocabulary of {size} tokens; expected "
                f"{self._vocab_size}, the vocabulary size of the model."
            )

    def _check_begun(self, begun: Response | None, prompt: int, member: int, budget: int) -> None:
        """Raises ValueError if a rollout cannot continue from the response `begun`."""
        if begun is None or not len(begun.tokens):
            return
        if not self.shape.continues:
            raise ValueError(
                f"begun has rollout {member} of prompt {prompt}, but the engine was compiled "
                "without `continues` in its shape; expected `continues=True`."
            )
        if begun.stop != RUNNING or len(begun.tokens) >= budget:
            raise ValueError(
                f"begun has {len(begun.tokens)} tokens and stop {begun.stop} for rollout {member} "
                f"of prompt {prompt}; expected fewer tokens than its budget, {budget}, and stop "
                f"{RUNNING}: an unfinished response."
            )


def _is_done(chunk: Chunk | None) -> bool:
    """Returns whether the device has finished computing `chunk`. None counts as finished."""
    return chunk is None or chunk.tokens.is_ready()  # type: ignore[attr-defined] # not in its stub
