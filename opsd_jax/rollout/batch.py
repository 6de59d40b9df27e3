"""The state of one call of the rollout engine: its rollouts, its slots and its pages.

The device holds the slots. The host holds the tokens that it has fetched, and decides which rollout
starts in which slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.watchdog import Wait, waiting
from opsd_jax.policy import Cache, Params
from opsd_jax.rollout import sampling
from opsd_jax.rollout.pages import PagePool
from opsd_jax.rollout.programs import PRNG, ROLLOUTS_PER_INSERT, Programs
from opsd_jax.rollout.slots import RUNNING, Chunk, Rows

# The tokens of a response that has none, their sampling log-probabilities and the model's.
NO_TOKENS = np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32)


class Response(NamedTuple):
    """The response of a rollout, in host memory.

    Attributes:
      prompt: the index of its prompt.
      member: the index of the rollout among the rollouts of its prompt.
      tokens: int32 [n], the sampled token ids, including the EOS token.
      sampling_logprobs: float32 [n], log-probability of each token under the distribution that it
        was drawn from.
      model_logprobs: float32 [n], log-probability of each token under the model's own
        distribution: temperature 1, no restriction.
      stop: STOP_EOS, or STOP_LENGTH if the rollout reached its token budget. RUNNING for a rollout
        that the engine left unfinished; it may have no tokens.
    """

    prompt: int
    member: int
    tokens: np.ndarray
    sampling_logprobs: np.ndarray
    model_logprobs: np.ndarray
    stop: int


def left_pad(
    prompts: Sequence[Sequence[int]], width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts on the left and computes the positions of their tokens.

    Args:
      prompts: N sequences of token ids.
      width: P, the padded length.
      pad_id: the token id of padding.

    Returns:
      `(tokens_NxP, positions_NxP)`, int32. The positions of padding are -1.

    Raises:
      ValueError: a prompt is longer than `width`.
    """
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for i, ids in enumerate(prompts):
        if len(ids) > width:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens; expected at most {width}, the padded length."
            )
        tokens[i, width - len(ids) :] = ids
        positions[i, width - len(ids) :] = np.arange(len(ids))
    return tokens, positions


class Rollout:
    """The state of one rollout: its prompt and the tokens sampled so far."""

    def __init__(
        self,
        prompt: int,
        member: int,
        prompt_ids: Sequence[int],
        rollout_id: int,
        budget: int,
        begun: Response | None = None,
    ):
        self.prompt, self.member = prompt, member
        self.prompt_ids, self.rollout_id, self.budget = prompt_ids, rollout_id, budget
        self.position = len(prompt_ids) - 1  # position of the last token
        self._pieces: list[tuple[np.ndarray, ...]] = [NO_TOKENS]
        if begun is not None:
            self._add(begun.tokens, begun.sampling_logprobs, begun.model_logprobs)

    @property
    def drawn(self) -> int:
        """Number of tokens sampled so far."""
        return self.position + 1 - len(self.prompt_ids)

    @property
    def ids(self) -> list[int]:
        """The tokens of the prompt and those sampled so far."""
        return [*self.prompt_ids, *np.concatenate([piece[0] for piece in self._pieces]).tolist()]

    def _add(self, *columns: np.ndarray) -> None:
        """Appends tokens, their sampling log-probabilities and the model's."""
        self._pieces.append(columns)
        self.position += len(columns[0])

    def cache_length_after(self, steps: int) -> int:
        """Returns the cache length that suffices for the rollout's next `steps` tokens."""
        return min(self.position + steps, len(self.prompt_ids) + self.budget - 1)

    def row(self) -> tuple[int, ...]:
        """Returns this rollout's values for the fields of `slots.Rows`, in order."""
        return self.ids[-1], self.position, self.rollout_id, self.drawn, self.budget

    def history(self, length: int) -> np.ndarray:
        """Returns the tokens of the prompt and the response so far, padded: int32 [length]."""
        history_H = np.zeros(length, np.int32)
        history_H[: self.position + 1] = self.ids
        return history_H

    def append(self, chunk: Chunk, slot: int) -> None:
        """Appends this rollout's new tokens, which are in column `slot` of a fetched chunk."""
        n = int(chunk.drawn[slot])
        columns = chunk.tokens, chunk.sampling_logprobs, chunk.model_logprobs
        # Copies, so that the whole chunk is not kept alive.
        self._add(*(np.array(column[:n, slot]) for column in columns))

    def response(self, stop: int) -> Response:
        """Returns the sampled tokens as a `Response` with the stop reason `stop`."""
        tokens, sampling, model = map(np.concatenate, zip(*self._pieces, strict=True))
        return Response(self.prompt, self.member, tokens, sampling, model, stop)


class _Prefilled(NamedTuple):
    """A rollout that waits for a slot. Row `source` of `cache` contains its prefilled prompt.

    `number` is different for each prefill.
    """

    cache: Cache
    number: int
    source: int
    rollout: Rollout


class Batch:
    """The state of one call of the engine: its rollouts and its decoding slots."""

    def __init__(
        self,
        programs: Programs,
        groups: Sequence[list[Rollout]],
        pad_id: int,
        params: Params,
        key: jax.Array,
        sampling_params: sampling.SamplingParams,
    ):
        """Creates empty decoding slots and a queue of all prompts.

        Args:
          programs: the engine's compiled programs.
          groups: the rollouts of each prompt, at least one per prompt.
          pad_id: the token id of padding.
          params, key, sampling_params: see `Engine.__call__`.
        """
        self._programs, self._shape, self._pad_id = programs, programs.shape, pad_id
        self._params = programs.prepare(params)
        key_data = jax.random.key_data(_threefry(key))
        self._key_data, self._sampling_params = self._put(key_data, sampling_params)
        # Rollouts that continue, and prompts that are not prefilled. As many rollouts as there are
        # slots start in the order of their lengths, because a prefill is as long as the cache, and
        # the cache as long as the longest rollout.
        begun = [r for group in groups for r in group if r.drawn]
        slots = programs.shape.slots
        self._begun = deque(sorted(begun[:slots], key=lambda r: r.position) + begun[slots:])
        new = ([r for r in group if not r.drawn] for group in groups)
        self._queue = deque(group for group in new if group)
        self._prefilled: deque[_Prefilled] = deque()
        self._prefills = 0
        self._pool = PagePool(programs.pool_sizes)
        self._active: list[Rollout | None] = [None] * programs.shape.slots
        self._state, self._cache_length = programs.start(), programs.cache_lengths[0]

    def _put(self, *arrays: Any) -> tuple[Any, ...]:
        """Copies host arrays to every device. `jax.transfer_guard` does not reject this copy."""
        return mesh_lib.placed(arrays, jax.tree.map(lambda _: self._programs.replicated, arrays))

    def fill_slots(self) -> None:
        """Reserves pages for the next chunk, and inserts waiting rollouts while there is room."""
        self._reserve()
        while self._pool.has_free_slot and self._are_waiting:
            if self._begun:
                if not self._continue():
                    return
                continue
            if not self._prefilled:
                self._prefill()
            if not self._insert():
                return

    def _reserve(self) -> None:
        """Gives active rollouts pages for the next chunk, and preempts some if it has to.

        The preempted rollouts return to the front of the queue.
        """
        active = {slot: rollout for slot, rollout in enumerate(self._active) if rollout is not None}
        preempted = self._pool.reserve({slot: self._needed(r) for slot, r in active.items()})
        if not preempted:
            return
        for slot in preempted:
            self._active[slot] = None
        self._begun.extendleft(active[slot] for slot in reversed(preempted))
        positions = [-1 if rollout is None else rollout.position for rollout in self._active]
        self._state = self._programs.with_positions(self._state, np.array(positions, np.int32))

    def _needed(self, rollout: Rollout) -> int:
        """Returns the cache length that suffices for a rollout's next chunk."""
        return rollout.cache_length_after(self._programs.steps_per_chunk)

    @property
    def _are_waiting(self) -> bool:
        """Whether rollouts wait for slots."""
        return bool(self._begun or self._prefilled or self._queue)

    def decode(self) -> Chunk | None:
        """Starts and returns the next chunk of decoding steps; None if every slot is empty."""
        if not any(self._active):
            return None
        active, few = sum(rollout is not None for rollout in self._active), self._shape.few
        if active <= few and not self._are_waiting:
            self._resize(self._programs.tokens_per_speculation)
            program, last = self._programs.speculate, self._history()
        else:
            # Where rollouts wait for slots, refill when a sixteenth of the slots is free. Otherwise
            # go on until few rollouts are active, so that speculation begins, or none.
            self._resize(self._programs.steps_per_chunk)
            stop_after = max(1, self._shape.slots // 16) if self._are_waiting else active - few
            program, last = self._programs.decode, np.asarray(stop_after, np.int32)
        self._state = self._programs.with_pages(self._state, self._pool.table)
        self._state, chunk = program[self._cache_length](
            self._params, self._state, self._key_data, self._sampling_params, *self._put(last)
        )
        return chunk

    def _history(self) -> np.ndarray:
        """Returns the token at each position of the rollout in each slot, int32 [S, H]."""
        H = self._shape.prompt_tokens + self._shape.response_tokens
        empty_H = np.zeros(H, np.int32)
        return np.stack([empty_H if r is None else r.history(H) for r in self._active])

    def record(self, chunk: Chunk) -> tuple[list[Response], int, int]:
        """Fetches a chunk's tokens, and frees the slots of the rollouts that ended.

        Returns:
          `(ended, passes, read)`: the responses of the rollouts that ended, the number of forward
          passes, and the number of cached tokens that they read.
        """
        with waiting(Wait.DECODING):
            chunk = jax.device_get(chunk)
        ended = []
        for slot, rollout in enumerate(self._active):
            if rollout is None:
                continue
            rollout.append(chunk, slot)
            if chunk.stop[slot] != RUNNING:
                ended.append(rollout.response(int(chunk.stop[slot])))
                self._active[slot] = None
                self._pool.free(slot)
        return ended, chunk.forward_passes(), int(chunk.read.sum())

    def unfinished(self) -> list[Response]:
        """Returns the responses so far of the rollouts that have not ended, with stop RUNNING."""
        waiting = [*self._begun, *(item.rollout for item in self._prefilled)]
        waiting += [rollout for group in self._queue for rollout in group]
        active = [rollout for rollout in self._active if rollout is not None]
        return [rollout.response(RUNNING) for rollout in active + waiting]

    def _continue(self) -> bool:
        """Prefills and inserts the next rollouts that have tokens already, as many as fit.

        Returns:
          Whether any rollout was inserted. If not, the first one waits for pages.
        """
        m, S = self._programs.continued, self._shape.slots
        rows = np.zeros((len(Rows._fields), m), np.int32)
        slot_m = np.full(m, S, np.int32)  # past the last slot: not inserted
        prefixes: list[list[int]] = [[] for _ in range(m)]
        taken: list[int] = []
        for i in range(min(m, len(self._begun))):
            slot = self._start(self._begun[0], without=taken if self._pool.has_pages else ())
            if slot is None:
                break
            rollout = self._begun.popleft()
            row = self._pool.shard(slot) if self._pool.has_pages else i
            taken.append(row)
            slot_m[row], rows[:, row], prefixes[row] = slot, rollout.row(), rollout.ids[:-1]
        if not taken:
            return False
        self._resize(0)
        longest = max(map(len, prefixes)) if self._pool.has_pages else self._cache_length
        columns = next(n for n in self._programs.proceed if n >= longest)
        arguments = *left_pad(prefixes, columns, self._pad_id), slot_m, Rows(*rows)
        self._state = self._programs.proceed[columns](
            self._params,
            self._programs.with_pages(self._state, self._pool.table),
            *self._put(*arguments),
        )
        return True

    def _prefill(self) -> None:
        """Prefills the next prompts in the queue."""
        n, P = self._shape.prompts, self._shape.prompt_tokens
        groups = [self._queue.popleft() for _ in range(min(n, len(self._queue)))]
        begun = [group[0].prompt_ids[:-1] for group in groups] + [()] * (n - len(groups))
        prompts = self._put(*left_pad(begun, P, self._pad_id))
        cache = self._programs.prefill(self._params, *prompts)
        self._prefills += 1
        self._prefilled.extend(
            _Prefilled(cache, self._prefills, source, rollout)
            for source, group in enumerate(groups)
            for rollout in group
        )

    def _insert(self) -> bool:
        """Inserts up to ROLLOUTS_PER_INSERT rollouts of one prefill into slots.

        Returns:
          Whether any rollout was inserted. If not, the first one waits for pages.
        """
        m, cache = ROLLOUTS_PER_INSERT, self._prefilled[0].cache
        source_m = np.zeros(m, np.int32)
        slot_m = np.full(m, self._shape.slots, np.int32)  # past the last slot: not inserted
        rows = np.zeros((len(Rows._fields), m), np.int32)
        for i in range(m):
            if not self._prefilled or self._prefilled[0].cache is not cache:
                break
            _, number, source, rollout = self._prefilled[0]
            slot = self._start(rollout, (number, source), len(rollout.prompt_ids) - 1)
            if slot is None:
                break
            self._prefilled.popleft()
            source_m[i], slot_m[i], rows[:, i] = source, slot, rollout.row()
        if slot_m[0] == self._shape.slots:
            return False
        self._resize(self._programs.steps_per_chunk)
        self._state = self._programs.insert[self._cache_length](
            self._programs.with_pages(self._state, self._pool.table),
            cache,
            *self._put(source_m, slot_m, Rows(*rows)),
        )
        return True

    def _start(
        self,
        rollout: Rollout,
        prompt: Hashable = None,
        shared: int = 0,
        without: Sequence[int] = (),
    ) -> int | None:
        """Gives a slot and pages to a rollout. Returns the slot; None if it has to wait.

        Args:
          rollout: the rollout.
          prompt, shared, without: see `PagePool.start`.
        """
        slot = self._pool.start(
            self._needed(rollout),
            rollout.cache_length_after(rollout.budget),
            prompt=prompt,
            shared=shared,
            without=without,
        )
        if slot is not None:
            self._active[slot] = rollout
        return slot

    def _resize(self, tokens: int) -> None:
        """Resizes the cache to the shortest available length with room for `tokens` more tokens."""
        needed = max(r.cache_length_after(tokens) for r in self._active if r is not None)
        goal = next(length for length in self._programs.cache_lengths if length >= needed)
        if goal != self._cache_length:
            self._state = self._programs.resize(self._state, self._cache_length, goal)
            self._cache_length = goal


def _threefry(key: jax.Array) -> jax.Array:
    """Returns the key if it is a threefry key, otherwise a threefry key derived from it."""
    if str(jax.random.key_impl(key)) == PRNG:
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), "uint32"), impl=PRNG)
