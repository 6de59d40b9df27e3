"""The rollout engine: prompts of token ids in, responses out as they end.

A fixed number of decode slots is filled from a queue, and filled again as rollouts end, so that a
long one holds nobody up. A prompt is prefilled once, and its keys and values copied to each of its
rollouts. The host sends the device a chunk of steps and fetches what it drew: every decision rests
on that and on the arguments, so every host takes the same ones.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.parallel import aot, watchdog
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.program import ProgramKey, ProgramKind
from opsd_jax.policy import Model, Params
from opsd_jax.rollout import sampling, slots
from opsd_jax.rollout.slots import LIVE, STOP_EOS, STOP_LENGTH, Chunk, Rows, Slots

__all__ = ["STOP_EOS", "STOP_LENGTH", "Ended", "Engine", "EngineShape", "Response", "left_pad"]

STEPS = 64  # of decoding between two looks of the host
SHORTEST_VIEW = 128  # a cache is not made shorter than this: little would be won
ADMITTED = 4  # rollouts of an admission, at most: devices with rows of their own get all of them
PRNG = "threefry2x32"  # the only one whose numbers, one key a row, depend on that key alone


class EngineShape(NamedTuple):
    """The sizes that the programs of an engine are compiled for.

    Attributes:
      slots: S, rollouts in the making at once.
      prompts: n, prompts prefilled at once.
      prompt_tokens: P, the longest prompt.
      response_tokens: L, the largest budget of a response.
    """

    slots: int
    prompts: int
    prompt_tokens: int
    response_tokens: int


class Response(NamedTuple):
    """A rollout on the host.

    Attributes:
      prompt: the index of its prompt.
      member: which of that prompt's rollouts it is.
      tokens: int32 [n], the sampled ids, EOS included.
      sampling_logprobs: float32 [n], of each under the distribution that it was drawn from.
      model_logprobs: float32 [n], under the model's own: temperature 1, nothing cut or forbidden.
      stop: STOP_EOS, or STOP_LENGTH where it filled its budget.
    """

    prompt: int
    member: int
    tokens: np.ndarray
    sampling_logprobs: np.ndarray
    model_logprobs: np.ndarray
    stop: int


class Ended(NamedTuple):
    """Rollouts that ended in one chunk.

    Attributes:
      responses: one at least.
      device_idles: says whether the device has nothing to do now: all is done, or the next chunk.
    """

    responses: list[Response]
    device_idles: Callable[[], bool]


def shape_for(
    *,
    slots: int,
    group_size: int,
    rollouts: int,
    prompt_tokens: int,
    response_tokens: int,
    shards: int,
) -> EngineShape:
    """The sizes of an engine for so many `rollouts` at a time, `group_size` of each prompt, where
    rows are cut into `shards`: no more slots than rollouts; a prefill fills a quarter of them.
    """
    whole = lambda count: -(-count // shards) * shards
    slots = min(slots, whole(rollouts))
    prompts = whole(max(1, slots // (4 * group_size)))
    return EngineShape(slots, prompts, prompt_tokens, response_tokens)


def left_pad(prompts: Sequence[Sequence[int]], width: int, pad_id: int):
    """Prompts in the form that prefill and scoring take: int32 `(tokens, positions)`, [N, width].

    Raises:
      ValueError: a prompt is longer than `width`.
    """
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for i, ids in enumerate(prompts):
        if len(ids) > width:
            raise ValueError(f"prompt {i} has {len(ids)} tokens; {width} fit.")
        tokens[i, width - len(ids) :] = ids
        positions[i, width - len(ids) :] = np.arange(len(ids))
    return tokens, positions


def views(shape: EngineShape) -> list[int]:
    """The lengths that the cache takes, in tokens: each about twice the one before. Reading a cache
    costs what its length does, so it is as long as the longest rollout in the making needs.
    """
    sizes = [shape.prompt_tokens + shape.response_tokens]
    while sizes[0] > SHORTEST_VIEW and (half := -(-sizes[0] // 128) * 64) >= SHORTEST_VIEW:
        sizes.insert(0, half)
    return sizes


class _Waiting(NamedTuple):
    """A rollout whose prompt is prefilled: row `source` of `cache`."""

    cache: Any
    source: int
    rollout: _Rollout


class _Rollout:
    """A rollout in the making."""

    def __init__(self, prompt: int, member: int, ids: Sequence[int], rollout_id: int, budget: int):
        self.prompt, self.member = prompt, member
        self.row = Rows(ids[-1], len(ids) - 1, rollout_id, 0, budget)  # type: ignore[arg-type]
        self.end = len(ids) + budget - 1  # the cache's length at which its budget is full
        self.position = len(ids) - 1  # of its last token
        self.pieces: list[tuple[np.ndarray, ...]] = []

    def response(self, stop: int) -> Response:
        tokens, model, sampling = (np.concatenate(p) for p in zip(*self.pieces, strict=True))
        return Response(self.prompt, self.member, tokens, sampling, model, stop)


class Engine:
    """Samples responses. Its programs compile here, once, and none later."""

    def __init__(
        self,
        model: Model,
        abstract_params: Params,
        mesh: jax.sharding.Mesh,
        shape: EngineShape,
        *,
        pad_id: int = 0,
        lengths: Sequence[int] | None = None,
    ):
        """Compiles.

        Args:
          model: the model; its `cache_rules` say where the cache lies.
          abstract_params: the parameters' shapes, with shardings, as decoding has them.
          mesh: where they lie.
          shape: sizes; `slots` and `prompts` are multiples of data x fsdp.
          pad_id: fills arrays.
          lengths: those that the cache takes, ascending; by default `views`, and for a model that
            reads no more of a cache than is filled the largest alone.

        Raises:
          ValueError: `lengths` are not as described.
        """
        S, n, P, L = shape
        self.shape, self._pad_id, self._vocab_size = shape, pad_id, model.vocab_size
        # So many rollouts end before slots are filled again, if any wait.
        self._refill_at = np.int32(max(1, S // 16))
        if lengths is None:
            lengths = [P + L] if model.ragged else views(shape)
        self.lengths = list(lengths)
        if self.lengths != sorted({*self.lengths}) or self.lengths[-1] < P + L - 1:
            raise ValueError(
                f"lengths are {self.lengths}; expected them to ascend to {P + L - 1} or more."
            )
        policy, axes = model.policy, slots.length_axes(model.policy)
        rows, whole = mesh_lib.rows(mesh), mesh_lib.replicated(mesh)
        self._whole = whole

        def cache_of(batch: int, length: int):
            shapes = jax.eval_shape(lambda: policy.init_cache(batch, length))
            return mesh_lib.abstract_of(
                shapes, mesh_lib.tree_shardings(mesh, model.cache_rules, shapes, "cache")
            )

        def replicated(tree):
            shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
            return mesh_lib.abstract_of(shapes, jax.tree.map(lambda _: whole, shapes))

        def compiled(key, function, *args, out, donate=()):
            jitted = jax.jit(function, donate_argnums=donate, out_shardings=out)
            return aot.compiled(key, jitted.lower(*args))

        where = functools.partial(jax.tree.map, lambda leaf: leaf.sharding)
        slot_rows = jax.eval_shape(lambda: slots.empty_rows(S))
        slot_rows = mesh_lib.abstract_of(slot_rows, jax.tree.map(lambda _: rows, slot_rows))
        state = {length: Slots(slot_rows, cache_of(S, length)) for length in self.lengths}
        prompts, number = np.zeros((n, P), np.int32), np.int32(0)
        admitted = np.zeros(ADMITTED, np.int32)
        key = jax.random.key_data(jax.random.key(0, impl=PRNG))
        rule = sampling.rule(model.vocab_size, stop=())

        def prefill(params, *prompts):
            split = [jax.lax.with_sharding_constraint(x, rows) for x in prompts]
            return slots.prefill(policy, params, *split)

        def start():
            return Slots(slots.empty_rows(S), policy.init_cache(S, self.lengths[0]))

        def decode(params, state, key, rule, enough):
            key = jax.random.wrap_key_data(key, impl=PRNG)
            return slots.decode(policy, params, state, key, rule, enough, steps=STEPS)

        with jax.set_mesh(mesh):
            self._unrolled: Callable[[Params], Params] | None = None
            if model.unrolled and mesh.devices.flat[0].platform == "cpu":
                self._unrolled = jax.jit(model.unrolled).lower(abstract_params).compile()
                shapes = jax.eval_shape(model.unrolled, abstract_params)
                abstract_params = mesh_lib.abstract_of(shapes, self._unrolled.output_shardings)
            prefilled = cache_of(n, P)
            self._start = compiled(
                ProgramKey(ProgramKind.START), start, out=where(state[self.lengths[0]])
            )
            self._prefill = compiled(
                ProgramKey(ProgramKind.PREFILL),
                prefill,
                abstract_params,
                *replicated((prompts, prompts)),
                out=where(prefilled),
            )
            self._admit = {
                length: compiled(
                    ProgramKey(ProgramKind.INSERT, length),
                    functools.partial(slots.admit, axes),
                    there,
                    prefilled,
                    *replicated((admitted, admitted, Rows(*(admitted,) * len(Rows._fields)))),
                    out=where(there),
                    donate=0,
                )
                for length, there in state.items()
            }
            self._decode = {
                length: compiled(
                    ProgramKey(ProgramKind.DECODE, length),
                    decode,
                    abstract_params,
                    there,
                    *replicated((key, rule, number)),
                    out=(where(there), whole),
                    donate=1,
                )
                for length, there in state.items()
            }
            # A leaf at a time: while one is resized the others are not there twice.
            self._resize: dict[Any, Any] = {}
            for pair in itertools.permutations(state.values(), 2):
                leaves = (jax.tree.leaves(tree) for tree in (*(s.cache for s in pair), axes))
                for leaf, goal, axis in zip(*leaves, strict=True):
                    if axis >= 0 and (leaf, goal) not in self._resize:
                        resize = functools.partial(slots.resize, axis=axis, size=goal.shape[axis])
                        self._resize[leaf, goal] = compiled(
                            ProgramKey(ProgramKind.RESIZE), resize, leaf, out=goal.sharding
                        )
        self._state = state
        longest = state[self.lengths[-1]].cache
        # On a device: the cache, and that of the prompts of a prefill.
        self.cache_bytes = mesh_lib.shard_bytes(longest)
        self.prompts_bytes = mesh_lib.shard_bytes(prefilled)

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        ids: Sequence[Sequence[int]],
        *,
        key: jax.Array,
        rule: sampling.Rule,
        budgets: Sequence[Sequence[int]] | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> Iterator[Ended]:
        """Rollouts of each prompt, as they end. The device has its next chunk before the ended ones
        of the last are handed out.

        Args:
          params: the policy's, as decoding has them.
          prompts: token ids, any number.
          ids: of each prompt's rollouts, distinct under one key, in [0, 2^31): an id chooses the
            random numbers.
          key: PRNG key of this step and purpose.
          rule: how words are drawn (`sampling.rule`).
          budgets: tokens that each rollout may have; by default the shape's `response_tokens`.
          poll: called between chunks; what it raises ends the sampling, and has to do so on every
            host at once.

        Raises:
          ValueError: a prompt or a budget does not fit the shape; names its number. The rule is of
            another vocabulary.
        """
        S, n, P, L = self.shape
        if len(rule.stop) != self._vocab_size:
            raise ValueError(
                f"the rule is of {len(rule.stop)} words; the model has {self._vocab_size}."
            )
        if budgets is None:
            budgets = [[L] * len(own) for own in ids]
        queue: deque[int] = deque()
        rollouts: list[list[_Rollout]] = []
        for i, (prompt, own, room) in enumerate(zip(prompts, ids, budgets, strict=True)):
            if not 0 < len(prompt) <= P:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; between 1 and {P} fit.")
            if len(room) != len(own) or not all(0 < budget <= L for budget in room):
                raise ValueError(
                    f"budgets of prompt {i} are {room}; expected {len(own)} of 1 to {L} tokens."
                )
            rollouts.append(
                [
                    _Rollout(i, j, prompt, rollout_id, budget)
                    for j, (rollout_id, budget) in enumerate(zip(own, room, strict=True))
                ]
            )
            if own:
                queue.append(i)
        if not queue:
            return
        if self._unrolled:
            params = self._unrolled(params)
        if str(jax.random.key_impl(key)) != PRNG:
            key = jax.random.wrap_key_data(jax.random.bits(key, (2,), "uint32"), impl=PRNG)
        fixed = jax.device_put((np.asarray(jax.random.key_data(key)), rule), self._whole)
        waiting: deque[_Waiting] = deque()
        making: list[_Rollout | None] = [None] * S
        state, length = self._start(), self.lengths[0]
        ended: list[Response] = []
        while True:
            free = [slot for slot, rollout in enumerate(making) if rollout is None]
            while free and (waiting or queue):
                if not waiting:
                    chosen = [queue.popleft() for _ in range(min(n, len(queue)))]
                    cache = self._prefilled(params, [prompts[i] for i in chosen])
                    waiting.extend(
                        _Waiting(cache, source, rollout)
                        for source, i in enumerate(chosen)
                        for rollout in rollouts[i]
                    )
                    del cache
                state, length = self._admitted_to(state, length, free, waiting, making)
            chunk: Chunk | None = None
            if any(making):
                state, length = self._resized(state, length, making)
                enough = self._refill_at if waiting or queue else np.int32(S + 1)
                state, chunk = self._decode[length](params, state, *fixed, enough)
            if ended:
                yield Ended(ended, functools.partial(_is_done, chunk))
            if chunk is None:
                return
            poll()
            with watchdog.waiting("decoding"):
                fetched = jax.device_get(chunk)
            ended = _taken(fetched, making)

    def _prefilled(self, params: Params, prompts: list[Sequence[int]]):
        n, P = self.shape.prompts, self.shape.prompt_tokens
        begun = [ids[:-1] for ids in prompts] + [()] * (n - len(prompts))
        return self._prefill(params, *left_pad(begun, P, self._pad_id))

    def _admitted_to(
        self,
        state: Slots,
        length: int,
        free: list[int],
        waiting: deque[_Waiting],
        making: list[_Rollout | None],
    ) -> tuple[Slots, int]:
        """Puts rollouts of one prefill into free slots, as many as one admission takes."""
        source = np.zeros(ADMITTED, np.int32)
        slot = np.full(ADMITTED, self.shape.slots, np.int32)  # nowhere
        rows = np.zeros((len(Rows._fields), ADMITTED), np.int32)
        cache = waiting[0].cache
        for i in range(ADMITTED):
            if not free or not waiting or waiting[0].cache is not cache:
                break
            _, source[i], rollout = waiting.popleft()
            slot[i] = free.pop(0)
            rows[:, i] = rollout.row
            making[slot[i]] = rollout
        state, length = self._resized(state, length, making)
        return self._admit[length](state, cache, source, slot, Rows(*rows)), length

    def _resized(
        self, state: Slots, length: int, making: list[_Rollout | None]
    ) -> tuple[Slots, int]:
        """The state with a cache that holds the next chunk, and no longer than that asks for."""
        needed = max(min(r.position + STEPS, r.end) for r in making if r is not None)
        goal = next(size for size in self.lengths if size >= needed)
        if goal == length:
            return state, length
        there, tree = jax.tree.flatten(self._state[length].cache)
        goals = jax.tree.leaves(self._state[goal].cache)
        leaves = jax.tree.leaves(state.cache)
        for i, pair in enumerate(zip(there, goals, strict=True)):
            if pair in self._resize:
                old, leaves[i] = leaves[i], self._resize[pair](leaves[i])
                old.delete()
        return state._replace(cache=jax.tree.unflatten(tree, leaves)), goal


def _taken(chunk: Any, making: list[_Rollout | None]) -> list[Response]:
    """Gives each rollout what it drew in a fetched `Chunk`; returns those that ended, whose slots
    are free now.
    """
    ended = []
    for slot, rollout in enumerate(making):
        if rollout is None:
            continue
        n = int(chunk.drawn[slot])
        rollout.position += n
        drawn = chunk.tokens, chunk.model_logprobs, chunk.sampling_logprobs
        rollout.pieces.append(tuple(values[:n, slot].copy() for values in drawn))
        if chunk.stop[slot] != LIVE:
            ended.append(rollout.response(int(chunk.stop[slot])))
            making[slot] = None
    return ended


def _is_done(chunk: Chunk | None) -> bool:
    """Whether the device has made a chunk, if there is one."""
    return chunk is None or chunk.tokens.is_ready()  # type: ignore[attr-defined]
