"""The programs of a rollout engine, compiled ahead of time for fixed shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.program import ProgramKey, ProgramKind
from opsd_jax.policy import Cache, Model, PagedCache, Params
from opsd_jax.rollout import pages, sampling, slots, speculation
from opsd_jax.rollout.slots import Rows, Slots

STEPS_PER_CHUNK = 64  # decoding steps between two fetches by the host
# Rollouts per call of `insert`. Small, because every device receives the prompts of all of them.
ROLLOUTS_PER_INSERT = 4
# In a vmap over keys, only this implementation's numbers do not depend on the other keys.
PRNG = "threefry2x32"


class EngineShape(NamedTuple):
    """The array sizes that the programs of an engine are compiled for.

    Attributes:
      slots: S, number of decoding slots: rollouts that are sampled at the same time.
      prompts: n, prompts per prefill.
      prompt_tokens: P, maximum length of a prompt, in tokens.
      response_tokens: L, maximum length of a response, in tokens.
      continues: whether rollouts can continue from tokens that they have already: those of an
        earlier call, or those of this call if they lost their pages.
      speculation: K, number of tokens that speculation guesses per forward pass; 0 turns it off.
      pool_tokens: number of tokens that a paged cache holds, over all devices. 0 gives every slot
        room for a rollout of full length. A smaller pool needs `continues`.
    """

    slots: int
    prompts: int
    prompt_tokens: int
    response_tokens: int
    continues: bool = False
    speculation: int = 0
    pool_tokens: int = 0

    @property
    def few(self) -> int:
        """The most active slots with which the engine speculates; 0 if it never does.

        A forward pass then computes at most as many tokens of active rollouts as an ordinary
        decoding step of full slots, or those of one rollout.
        """
        return max(1, self.slots // (self.speculation + 1)) if self.speculation else 0


class Programs:
    """The programs of a rollout engine, such as prefill and decode, compiled at construction.

    Attributes:
      shape: the sizes.
      cache_lengths: the lengths that the slots' cache can take, in tokens, ascending.
      prepare: `params -> params`, which converts the parameters from the layout for decoding to the
        form that `prefill` and `decode` take. Call it once per batch of rollouts.
      start: `() -> Slots`. Empty slots whose cache has the shortest length.
      prefill: `(params, tokens_nxP, positions_nxP) -> Cache`; see `slots.prefill`.
      insert: for each cache length, `(state, prefilled, source_m, slot_m, rows) -> Slots`; see
        `slots.insert`. Donates the state.
      proceed: for numbers of columns C, `(params, state, tokens_mxC, positions_mxC, slot_m, rows)
        -> Slots`, which prefills rollouts that have tokens already and inserts them. Donates the
        state. For a dense cache, C is the cache length. A paged cache has one length, and C is that
        length, its half or its quarter. Row i of a paged cache's call is for shard i. Empty unless
        `shape.continues`.
      continued: m, rollouts per call of `proceed`: one for each part that the mesh splits rows
        into.
      decode: for each cache length, `(params, state, key_data, sampling_params, stop_after) ->
        (Slots, Chunk)`; see `slots.decode`. Donates the state.
      speculate: for each cache length, `(params, state, key_data, sampling_params, history_SxH) ->
        (Slots, Chunk)`; see `speculation.decode`. H is P + L. Donates the state. Empty if
        `shape.speculation` is 0.
      pool_sizes: the sizes of the page pool of the slots' cache.
      replicated: the sharding of the key and the sampling parameters, of which every device holds a
        full copy.
      steps_per_chunk: maximum number of steps of `decode`.
      tokens_per_speculation: the most tokens that `speculate` adds to a rollout.
      cache_bytes: bytes per device of the slots' cache at its longest.
      cache_tokens: number of tokens in this cache, over all devices.
      prefill_cache_bytes: bytes per device of the cache of one prefill.
    """

    def __init__(
        self,
        model: Model,
        abstract_params: Params,
        mesh: jax.sharding.Mesh,
        shape: EngineShape,
        cache_lengths: Sequence[int],
    ):
        """Compiles all programs of a rollout engine.

        Args:
          model: the model.
          abstract_params: the parameters' shapes and shardings in the layout for decoding.
          mesh: the mesh of that layout.
          shape: the sizes.
          cache_lengths: the lengths that the slots' cache can take, in tokens, ascending.

        Raises:
          ValueError: `shape.speculation` is not 0, and `speculation.check` refuses it. Or
            `shape.pool_tokens` is too small for one rollout, or needs a cache with pages or
            `shape.continues`. Or the cache is paged, and there are several cache lengths.
        """
        if shape.speculation:
            speculation.check(model, shape.speculation)
        self.shape, self.cache_lengths = shape, cache_lengths
        self._model, self._mesh = model, mesh
        self.pool_sizes = self._pool_sizes()
        self._rows, self.replicated = mesh_lib.rows(mesh), mesh_lib.replicated(mesh)
        self._axes = slots.length_axes(model.policy)
        self._states = {length: self._abstract_state(length) for length in cache_lengths}
        self._prefilled = self._abstract_cache(
            lambda: model.policy.init_cache(shape.prompts, shape.prompt_tokens)
        )
        self.steps_per_chunk, self.continued = STEPS_PER_CHUNK, mesh_lib.row_shards(mesh)
        self.tokens_per_speculation = STEPS_PER_CHUNK + shape.speculation
        self.cache_bytes = mesh_lib.shard_bytes(self._states[cache_lengths[-1]].cache)
        self.cache_tokens = self.pool_sizes.tokens or shape.slots * cache_lengths[-1]
        self.prefill_cache_bytes = mesh_lib.shard_bytes(self._prefilled)
        with jax.set_mesh(mesh):
            self.prepare, abstract_params = self._compile_prepare(abstract_params)
            self.start = self._compile_start(cache_lengths[0])
            self.prefill = self._compile_prefill(abstract_params)
            self.insert = {n: self._compile_insert(n) for n in cache_lengths}
            self.decode = {n: self._compile_decode(n, abstract_params) for n in cache_lengths}
            lengths = self._continue_lengths()
            self.proceed = {n: self._compile_proceed(n, abstract_params) for n in lengths}
            speculative = cache_lengths if shape.speculation else ()
            self.speculate = {n: self._compile_speculate(n, abstract_params) for n in speculative}
            self._resize = self._compile_resize()

    def _pool_sizes(self) -> pages.PoolSizes:
        """Returns the sizes of the page pool.

        Raises:
          ValueError: they need one cache length, or `shape.continues`.
        """
        sizes = pages.pool_sizes(
            self._model.policy,
            slots=self.shape.slots,
            length=self.cache_lengths[-1],
            shards=mesh_lib.row_shards(self._mesh),
            pool_tokens=self.shape.pool_tokens,
        )
        if sizes.pages and len(self.cache_lengths) > 1:
            raise ValueError(
                f"cache_lengths is {self.cache_lengths}; expected one length, because a paged "
                "cache is never resized. A Model with a paged cache has `ragged=True`."
            )
        if not (sizes.is_full or self.shape.continues):
            raise ValueError(
                f"pool_tokens is {self.shape.pool_tokens} and continues is False; expected True, "
                "because a rollout that loses its pages has to continue from its tokens."
            )
        return sizes

    def resize(self, state: Slots, old: int, new: int) -> Slots:
        """Resizes the slots' cache from length `old` to length `new`, and returns the new state.

        Resizes one leaf at a time and deletes its old form, so that the device never holds a
        second copy of more than one leaf.
        """
        old_leaves, tree = jax.tree.flatten(self._states[old].cache)
        new_leaves = jax.tree.leaves(self._states[new].cache)
        leaves = jax.tree.leaves(state.cache)
        for i, pair in enumerate(zip(old_leaves, new_leaves, strict=True)):
            if pair in self._resize:
                leaf = leaves[i]
                leaves[i] = self._resize[pair](leaf)
                leaf.delete()
        return state._replace(cache=jax.tree.unflatten(tree, leaves))

    def with_pages(self, state: Slots, table: np.ndarray) -> Slots:
        """Returns the state with another page table; the state itself if the cache has no pages.

        Args:
          state: the state.
          table: int32, equal on all hosts; see `opsd_jax.policy.PagedCache`.
        """
        if not isinstance(state.cache, PagedCache):
            return state
        (placed,) = mesh_lib.placed((table.copy(),), (state.cache.table.sharding,))
        return state._replace(cache=state.cache._replace(table=placed))

    def with_positions(self, state: Slots, position: np.ndarray) -> Slots:
        """Returns the state with other positions, int32 [S], where -1 empties a slot."""
        (placed,) = mesh_lib.placed((position,), (self._rows,))
        return state._replace(rows=state.rows._replace(position=placed))

    def _empty_cache(self, length: int) -> Cache:
        """Returns an empty cache for all slots, with rows of `length` tokens. Runs in a trace."""
        cache = self._model.policy.init_cache(self.shape.slots, length)
        if isinstance(cache, PagedCache):
            return slots.pooled(cache, self.pool_sizes.pages)
        return cache

    def _abstract_cache(self, make: Callable[[], Cache]) -> Cache:
        """Returns the shapes and shardings of the cache that `make` returns."""
        shapes = jax.eval_shape(make)
        rules = self._model.cache_rules
        return mesh_lib.abstract_of(
            shapes, mesh_lib.tree_shardings(self._mesh, rules, shapes, "cache")
        )

    def _abstract_state(self, length: int) -> Slots:
        """Returns the shapes and shardings of a `Slots` whose cache has the given length."""
        S = self.shape.slots
        rows = jax.eval_shape(lambda: slots.empty_rows(S))
        rows = mesh_lib.abstract_of(rows, jax.tree.map(lambda _: self._rows, rows))
        return Slots(rows, self._abstract_cache(lambda: self._empty_cache(length)))

    def _abstract_arguments(self, *arguments: Any) -> Any:
        """Returns the shapes of arguments, with a sharding that replicates them on every device."""
        return mesh_lib.abstract_of(arguments, jax.tree.map(lambda _: self.replicated, arguments))

    def _compile_prepare(
        self, abstract_params: Params
    ) -> tuple[Callable[[Params], Params], Params]:
        """Compiles `Model.unrolled`, which prepares the parameters for decoding on CPUs.

        Other devices use the parameters as they are.

        Returns:
          `(prepare, abstract_params)`: a function that converts the parameters from the layout for
          decoding to the form that `prefill` and `decode` take, and the shapes in this form.
        """
        unrolled = self._model.unrolled
        if unrolled is None or self._mesh.devices.flat[0].platform != "cpu":
            return (lambda params: params), abstract_params
        program = jax.jit(unrolled).lower(abstract_params).compile()
        shapes = jax.eval_shape(unrolled, abstract_params)
        return program, mesh_lib.abstract_of(shapes, program.output_shardings)

    def _compile_start(self, length: int) -> Callable[[], Slots]:
        """Compiles the program that creates empty slots, for one cache length."""

        def start():
            return Slots(slots.empty_rows(self.shape.slots), self._empty_cache(length))

        return _compile(ProgramKey(ProgramKind.START), start, out=_shardings(self._states[length]))

    def _compile_prefill(self, abstract_params: Params) -> Callable[..., Cache]:
        """Compiles the program that prefills prompts, which are sharded by row."""

        def prefill(params, *prompts):
            sharded = [jax.lax.with_sharding_constraint(x, self._rows) for x in prompts]
            return slots.prefill(self._model.policy, params, *sharded)

        prompts = np.zeros((self.shape.prompts, self.shape.prompt_tokens), np.int32)
        return _compile(
            ProgramKey(ProgramKind.PREFILL),
            prefill,
            abstract_params,
            *self._abstract_arguments(prompts, prompts),
            out=_shardings(self._prefilled),
        )

    def _compile_insert(self, length: int) -> Callable[..., Slots]:
        """Compiles the program that inserts rollouts into slots, for one cache length."""
        state, values = self._states[length], np.zeros(ROLLOUTS_PER_INSERT, np.int32)
        return _compile(
            ProgramKey(ProgramKind.INSERT, length),
            functools.partial(slots.insert, self._axes),
            state,
            self._prefilled,
            *self._abstract_arguments(values, values, Rows(*(values,) * len(Rows._fields))),
            out=_shardings(state),
            donate=0,
        )

    def _continue_lengths(self) -> list[int]:
        """Returns the numbers of columns of the programs that continue rollouts, ascending."""
        if not self.shape.continues:
            return []
        longest = self.cache_lengths[-1]
        parts = [-(-longest // (128 * n)) * 128 for n in (4, 2)] if self.pool_sizes.pages else []
        return sorted({*self.cache_lengths, *(part for part in parts if part < longest)})

    def _compile_proceed(self, length: int, abstract_params: Params) -> Callable[..., Slots]:
        """Compiles the program that continues rollouts, for one number of columns."""

        def proceed(params, state, tokens_mxC, positions_mxC, slot_m, rows):
            policy = self._model.policy
            sharded = (
                jax.lax.with_sharding_constraint(tokens_mxC, self._rows),
                jax.lax.with_sharding_constraint(positions_mxC, self._rows),
            )
            if isinstance(state.cache, PagedCache):
                return slots.prefill_in_place(policy, params, state, *sharded, slot_m, rows)
            prefilled = slots.prefill(policy, params, *sharded)
            return slots.insert(self._axes, state, prefilled, jnp.arange(m), slot_m, rows)

        state = self._states.get(length, self._states[self.cache_lengths[-1]])
        m = self.continued
        prefix, values = np.zeros((m, length), np.int32), np.zeros(m, np.int32)
        rows = Rows(*(values,) * len(Rows._fields))
        return _compile(
            ProgramKey(ProgramKind.CONTINUE, length),
            proceed,
            abstract_params,
            state,
            *self._abstract_arguments(prefix, prefix, values, rows),
            out=_shardings(state),
            donate=1,
        )

    def _compile_decode(
        self, length: int, abstract_params: Params
    ) -> Callable[..., tuple[Slots, slots.Chunk]]:
        """Compiles the program that runs a chunk of decoding steps, for one cache length."""
        policy, steps = self._model.policy, self.steps_per_chunk

        def decode(params, state, key_data, sampling_params, stop_after):
            key = jax.random.wrap_key_data(key_data, impl=PRNG)
            return slots.decode(
                policy, params, state, key, sampling_params, stop_after, steps=steps
            )

        return self._compile_sampling(
            ProgramKey(ProgramKind.DECODE, length), decode, abstract_params, np.int32(0)
        )

    def _compile_speculate(
        self, length: int, abstract_params: Params
    ) -> Callable[..., tuple[Slots, slots.Chunk]]:
        """Compiles the program that decodes with speculation, for one cache length."""
        policy, shape, steps = self._model.policy, self.shape, self.steps_per_chunk

        def speculate(params, state, key_data, sampling_params, history_SxH):
            return speculation.decode(
                policy,
                params,
                state,
                jax.random.wrap_key_data(key_data, impl=PRNG),
                sampling_params,
                jax.lax.with_sharding_constraint(history_SxH, self._rows),
                steps=steps,
                guesses=shape.speculation,
            )

        history = np.zeros((shape.slots, shape.prompt_tokens + shape.response_tokens), np.int32)
        return self._compile_sampling(
            ProgramKey(ProgramKind.SPECULATE, length), speculate, abstract_params, history
        )

    def _compile_sampling(
        self, key: ProgramKey, function: Callable, abstract_params: Params, last: Any
    ) -> Callable[..., tuple[Slots, slots.Chunk]]:
        """Compiles a program that decodes; `last` has the shape of its last argument."""
        assert key.cache_length is not None
        state = self._states[key.cache_length]
        key_data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=PRNG)))
        sampling_params = sampling.params(self._model.vocab_size, stop=())
        return _compile(
            key,
            function,
            abstract_params,
            state,
            *self._abstract_arguments(key_data, sampling_params, last),
            out=(_shardings(state), self.replicated),
            donate=1,
        )

    def _compile_resize(self) -> dict[Any, Callable[[jax.Array], jax.Array]]:
        """Compiles the programs that resize cache arrays, and returns them in a dict.

        A key is a pair `(old, new)`: the abstract array before and after the resize.
        """
        programs: dict[Any, Callable[[jax.Array], jax.Array]] = {}
        for states in itertools.permutations(self._states.values(), 2):
            old, new = (jax.tree.leaves(state.cache) for state in states)
            for leaf, goal, axis in zip(old, new, jax.tree.leaves(self._axes), strict=True):
                if axis >= 0 and (leaf, goal) not in programs:
                    resize = functools.partial(slots.resize, axis=axis, size=goal.shape[axis])
                    programs[leaf, goal] = _compile(
                        ProgramKey(ProgramKind.RESIZE), resize, leaf, out=goal.sharding
                    )
        return programs


def _compile(
    key: ProgramKey, function: Callable, *arguments: Any, out: Any, donate: Any = ()
) -> Any:
    """Compiles a function for the shapes in `arguments`, with the output shardings `out`."""
    jitted = jax.jit(function, donate_argnums=donate, out_shardings=out)
    return aot.compiled(key, jitted.lower(*arguments))


def _shardings(tree: Any) -> Any:
    """Returns the sharding of each leaf, as a tree of the same structure."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
