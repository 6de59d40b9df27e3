"""A policy: a language model seen as three pure functions.

Losses and train steps take a `Policy` and a pytree of parameters, and nothing else of a model; the
rollout engine takes a `Model`, which holds one and says where its arrays lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

Params = Any  # A nested dict of arrays.
Cache = Any  # A pytree that belongs to the policy; axis 0 of every leaf is the batch.
Rules = Sequence[tuple[str, P]]  # (regular expression on a parameter's path, its partition)
ROWS = ("data", "fsdp")  # the mesh axes over which rows of a batch are split


class Policy(NamedTuple):
    """A model as pure functions of its parameters.

    `positions` (int32) carries everything that attention has to know. It is the token's index in
    its own sequence, which RoPE uses, or -1 for padding; a query at position q attends to the keys
    with `0 <= position <= q`. Left padding, right padding, prefill and decoding follow from that.

    With a cache, `forward` first writes the keys and values of `tokens` at their positions, and
    then attends to the whole cache; the entries at positions up to the query's must have been
    written, and whatever an earlier sequence left beyond them is never read.

    Attributes:
      forward: `(params, tokens[B, T], positions[B, T], cache=None) -> (hidden[B, T, D], cache)`.
        `hidden` is what `unembed` takes, after the final norm. Without a cache, returns None.
      unembed: `(params, hidden[..., D]) -> logits[..., V]`, float32, with soft-capping or scaling
        if the model has them; -inf marks words that cannot occur.
      init_cache: `(batch, length) -> cache` for sequences of up to `length` tokens. Each leaf has
        one axis at most that grows with it, and is filled there by position.
    """

    forward: Callable[..., tuple[jax.Array, Cache]]
    unembed: Callable[[Params, jax.Array], jax.Array]
    init_cache: Callable[[int, int], Cache]


class Model(NamedTuple):
    """What a run needs of a model; `config.model.make` names a function that returns one.

    Attributes:
      policy: the model.
      init: `PRNG key -> params`, fresh parameters.
      rules: (regular expression on a parameter's path, jax PartitionSpec) pairs; the first that
        matches the whole path says where the parameter lies (opsd_jax/parallel/mesh.py).
      vocab_size: V; at least the tokenizer's.
      decode_rules: as `rules`, while rollouts are sampled; None: where they lie anyway.
      decode_params: `params -> params`, a tree of the same names and shapes, as they are while
        rollouts are sampled and in a teacher: cast to the dtype of the products, say; pure.
      unrolled: `params -> params` in a form that `policy.forward` takes as well, in which a step of
        decoding finds its weights as they are multiplied: XLA:CPU copies a layer's out of their
        stack at every step, other compilers read them there. The engine calls it on CPUs, once a
        call. None: there is no such form.
      cache_rules: as `rules`, of the policy's cache; by default its first axis, the batch, is cut
        over `data` and `fsdp`.
      ragged: decoding reads no more of the cache than is filled, however long it is.
      load: `abstract params -> params`, initial parameters that are read from files, straight to
        the shardings that the abstract ones have; None: they come from `init`.
      save: `(params, directory, dtype="")`, writes a directory that transformers loads, as
        "float32", "bfloat16" or "float16", by default as they were; None: there is no such form.
    """

    policy: Policy
    init: Callable[[jax.Array], Params]
    rules: Rules
    vocab_size: int
    decode_rules: Rules | None = None
    decode_params: Callable[[Params], Params] = lambda params: params
    unrolled: Callable[[Params], Params] | None = None
    cache_rules: Rules = ((r".*", P(ROWS)),)
    ragged: bool = False
    load: Callable[[Params], Params] | None = None
    save: Callable[..., None] | None = None


def from_nnx(
    make: Callable[[nnx.Rngs], Any],
) -> tuple[Policy, Callable[[jax.Array], Params]]:
    """A policy from a Flax NNX module, which is split once and not seen again.

    Args:
      make: builds the module, `make(nnx.Rngs)`. That has `__call__(tokens, positions, cache)`,
        `unembed(hidden)` and `init_cache(batch, length)` as in `Policy`, without `params`, and
        keeps all of its weights in `nnx.Param`.

    Returns:
      `(policy, init)`, where `init(key) -> params` makes fresh parameters as a nested dict; jit it
      with `out_shardings` to make them where they belong.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def merge(params: Params) -> Any:
        state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the next line writes into it
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    def forward(params, tokens, positions, cache=None):
        return merge(params)(tokens, positions, cache)

    def unembed(params, hidden):
        return merge(params).unembed(hidden)

    def init_cache(batch, length):
        return nnx.merge(graphdef, abstract).init_cache(batch, length)

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key))))

    return Policy(forward, unembed, init_cache), init
