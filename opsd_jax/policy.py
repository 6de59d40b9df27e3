"""The interface between a language model and the rest of the library.

A `Policy` is a language model as three pure functions of its parameters. It is all that losses and
train steps need. A `Model` adds what a whole run needs: the initial parameters, the sharding of
every array, and optional hooks for sampling, loading and saving.

To train a model of your own, write a function that returns a `Model`, and name it in the config
field `model.make` as "package.module:function". It is called with the config section `model`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

Params = Any  # A nested dict of arrays.
Cache = Any  # A pytree of arrays that only the policy looks into; see `Policy.init_cache`.
Rules = Sequence[tuple[str, P]]  # Pairs of a regular expression and a sharding; see `Model.rules`.
ROWS = ("data", "fsdp")  # The mesh axes over which the rows of a batch are sharded.


class PagedCache(NamedTuple):
    """A cache of keys and values in pages of a fixed number of tokens, which rows draw from a pool.

    A page is read by the rows whose table names it. It is written by one row, except that rows with
    the same prompt share the pages that the prompt fills. With a mesh, the first axis of every
    array is sharded over `data` and `fsdp`, and a row uses only pages of its own shard.

    Attributes:
      pages: a pytree of arrays [N, PAGE, ...]: N pages of PAGE tokens.
      rows: a pytree of arrays [B, ...] that belong to a row and do not depend on its length.
      table: int32 [B, M], the pages of each row in the order of their positions: position p of
        row b is in page `table[b, p // PAGE]`. N stands for no page.
    """

    pages: Any
    rows: Any
    table: jax.Array


class Policy(NamedTuple):
    """A language model as three pure functions of its parameters.

    A policy is a static argument of `jax.jit`. Create it once and pass the same object everywhere.

    Positions tell attention all it needs. The position of a token is its index in its own sequence,
    counted from 0, and -1 for padding. A query at position q attends to exactly those keys of its
    sequence whose position p satisfies 0 <= p <= q. This one rule covers padding on the left and on
    the right, prefill and decoding. RoPE uses the same positions. Hidden states at padding may have
    any finite value.

    Shapes: B rows, T tokens per row, D hidden size, V vocabulary size.

    Attributes:
      forward: `(params, tokens, positions, cache=None) -> (hidden, cache)`. `tokens` and
        `positions` are int32 [B, T]. `hidden` is [B, T, D] in the data type of the activations: the
        input of `unembed`, so any final norm has been applied.

        Without a cache, the tokens attend to one another, and the returned cache is None. A row may
        then have several sequences, one after the other, if `Model.packs` is True: a token at
        position 0 begins a new one, and tokens attend only to their own sequence. `segment_ids`
        numbers the sequences. Along a row, the positions of a sequence ascend.

        A train step calls `forward` for the rows of one part of the mesh axis `data`. Sharding
        constraints and `jax.shard_map` may then name the axes "fsdp" and "tensor" only.
        `constrain` and `on_each_device` of `opsd_jax.parallel.mesh` leave out "data" where they
        must.

        With a cache, `forward` first stores the keys and values of `tokens` at their positions and
        nothing at padding, then lets each token attend to the cache of its row, and returns the
        updated cache. The caller makes sure that all positions up to a query's position have been
        stored for the current sequence. Entries at later positions may be left over from an
        earlier sequence; they must not change the result. `hidden` must equal that of a call
        without a cache on the whole sequence, up to rounding.
      unembed: `(params, hidden) -> logits`. `hidden` is [..., D] with any leading dimensions.
        `logits` is float32 [..., V] and includes a soft cap or scale if the model has one. A logit
        of -inf marks a token that can never occur, such as padding of the vocabulary. Each position
        is computed independently of the others.
      init_cache: `(batch, length) -> cache`, an empty cache for `batch` sequences of up to `length`
        tokens. The first axis of every array is the batch. At most one other axis of an array may
        depend on `length`. Entry i along it belongs to position i, because the engine shortens,
        lengthens and copies caches along this axis. The shape of a recurrent state doesn't depend
        on `length`.

        Alternatively, the cache is a `PagedCache` whose table gives every row pages of its own for
        `length` tokens, in order. The engine may then make the pool smaller, and it sets the table.
        The model then has `Model.ragged`.
    """

    forward: Callable[..., tuple[jax.Array, Cache]]
    unembed: Callable[[Params, jax.Array], jax.Array]
    init_cache: Callable[[int, int], Cache]


def segment_ids(positions: jax.Array) -> jax.Array:
    """Numbers the sequences of each row, for rows with several sequences (see `Policy.forward`).

    Args:
      positions: int32 [B, T]. A token at position 0 begins a new sequence, and -1 is padding.

    Returns:
      int32 [B, T]: 1 for the tokens of the first sequence of a row, 2 for those of the second, and
      so on; -1 for padding.
    """
    number_BxT = jnp.cumsum(positions == 0, axis=1, dtype=jnp.int32)
    return jnp.where(positions < 0, -1, number_BxT)


class Matrix(NamedTuple):
    """How the axes of a parameter form a matrix, or a stack of matrices, for a low-rank adapter.

    The axes are `stacked` axes that count the matrices, then `inputs` axes that a matmul contracts,
    then the axes of its output. Attention weights [L, D, H, C] that map a width of D to H heads of
    size C, in L layers, are `Matrix(stacked=1, inputs=1)`.
    """

    stacked: int = 0
    inputs: int = 1


class AdapterFiles(NamedTuple):
    """How a model reads and writes adapters in the format of Hugging Face PEFT.

    Attributes:
      about: `directory -> opsd_jax.models.peft.About`, what the adapter in a directory is.
      load: `(abstract_adapter, directory) -> adapter`, for shapes, dtypes and shardings of an
        adapter (see `opsd_jax.models.lora`). Every host calls it.
      save: `(adapter, directory, about, dropout=0.0) -> None`, for such an `About`. Every host
        calls it.
    """

    about: Callable[..., Any]
    load: Callable[..., Params]
    save: Callable[..., None]


class Model(NamedTuple):
    """A policy and everything else that a run needs to know about a model.

    The first four attributes are required. The others have default values that always work.

    Attributes:
      policy: The model as pure functions.
      init: `(key) -> params`, the randomly initialised parameters for a PRNG key. It is traced, so
        it must be pure. Its result defines the names, shapes and data types of all parameters.
      rules: The sharding of the parameters, as pairs of a regular expression and a
        `jax.sharding.PartitionSpec`. The path of a parameter, such as "layers/q", takes the first
        rule whose expression matches the whole path. A parameter that no rule matches is an error.
        The axes of the mesh are "data", "fsdp" and "tensor" (opsd_jax/parallel/mesh.py).
      vocab_size: V, the size of the last axis of the logits. It must be at least the tokenizer's.
      decode_rules: The sharding of the parameters while rollouts are sampled, in the form of
        `rules`. Every decoding step reads all weights, so sharding them over "fsdp", which gathers
        them at every step, is slow. None keeps the sharding of training.
      decode_params: `(params) -> params`, a pure function that prepares parameters for sampling and
        for the copies that a teacher keeps, for example casts them to the data type of the matmuls.
        The result has the same names and shapes, and `policy` takes it in place of the original. A
        parameter that it returns unchanged isn't copied.
      unrolled: `(params) -> params`, an optional form of the parameters for decoding on CPUs, which
        `policy.forward` must accept as well. The engine applies it after `decode_params`, once per
        call. XLA:CPU copies the weights of a layer out of a stacked array at every decoding step;
        separate arrays avoid the copy. None uses the parameters as they are.
      cache_rules: The sharding of the cache, in the form of `rules`. The default value shards the
        batch over "data" and "fsdp".
      ragged: Whether decoding reads only the filled part of the cache. If True, the engine
        allocates one cache of the full length. If False, it keeps the cache only as long as the
        rollouts in its slots need.
      load: `(abstract_params) -> params`, the initial parameters from files. The argument is a tree
        of `jax.ShapeDtypeStruct` with shardings, and the result must have these shapes, data types
        and shardings. Every host calls it. It raises `opsd_jax.models.safetensors.WeightsError` for
        files that can't be used. None initialises the parameters with `init`.
      save: `(params, directory, dtype="") -> None` writes a directory that Hugging Face
        transformers can load. Every host calls it. `dtype` is "float32", "bfloat16" or "float16";
        "" keeps the data types in which the weights were stored. `opsd-jax convert` needs it. None
        means that the model can't be exported.
      quantised: `(options) -> Model`, this model with weights or a cache in 8 bits. `options` are
        `opsd_jax.models.quantised.QuantisationOptions`. Its `decode_params` take the parameters of
        this model, and may return others in number and shape. Stages sample rollouts with it; this
        model is trained, evaluated and saved. None refuses `config.rollout_quantisation`.
      packs: Whether a row without a cache may have several sequences (see `Policy.forward`). The
        stages then put several responses in a row, if `packing` is on. If False, they give every
        response a row of its own.
      flops: `(tokens, pairs, predicted) -> FLOPs` of a forward pass over sequences of `tokens`
        tokens in all, with `pairs` pairs of a token and a token that it attends to (itself and
        those before it), and with logits at `predicted` positions. A multiply-add counts as two.
        The figures of a step's speed are computed from it. None leaves them out.
      matrices: The parameters that are matrices, or stacks of matrices, as pairs of a regular
        expression and a `Matrix`. `config.adapter` adapts these. If a model lists none, then it
        adapts parameters with two axes, [inputs, outputs], that its `targets` match.
      low_rank: Whether `policy` takes an `opsd_jax.models.lora.LowRank` in place of each parameter
        in `matrices`. If False, a train step adds each adapter to its matrix before it calls
        `policy`, which takes more memory and allows no dropout.
      adapter_files: The functions that read and write adapters. None means that adapters can't be
        exported or loaded.
      max_positions: The most tokens of a sequence that the model was made for. A run whose prompts
        and responses can be longer together is refused. 0 means any number.
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
    quantised: Callable[..., Model] | None = None
    matrices: Sequence[tuple[str, Matrix]] = ()
    low_rank: bool = False
    adapter_files: AdapterFiles | None = None
    max_positions: int = 0
    packs: bool = False
    flops: Callable[[float, float, float], float] | None = None


def from_nnx(
    make: Callable[[nnx.Rngs], Any],
) -> tuple[Policy, Callable[[jax.Array], Params]]:
    """Converts a Flax NNX module to a `Policy` and a function that initialises its parameters.

    The module is split once. Its parameters become a plain nested dict, and training and sampling
    never see the module.

    Args:
      make: `(nnx.Rngs) -> module`. The module has the methods `__call__(tokens, positions, cache)`,
        `unembed(hidden)` and `init_cache(batch, length)`, which do what `Policy` describes without
        the argument `params`. All of its variables are of type `nnx.Param`.

    Returns:
      `(policy, init)`. `init(key)` returns new parameters as a nested dict. Call it within
      `jax.jit(init, out_shardings=...)` to create sharded parameters.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def merge(params: Params) -> Any:
        # `replace_by_pure_dict` modifies its argument, so give it a copy.
        state = jax.tree.map(lambda leaf: leaf, abstract)
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


def from_linen(module: linen.Module) -> tuple[Policy, Callable[[jax.Array], Params]]:
    """Converts a Flax Linen module to a `Policy` and a function that initialises its parameters.

    Args:
      module: has the methods `__call__(tokens, positions, cache)`, `unembed(hidden)` and
        `init_cache(batch, length)`, which do what `Policy` describes without the argument `params`.
        All of its variables are in the collection "params". Metadata about their sharding is
        dropped: `Model.rules` shards them.

    Returns:
      `(policy, init)`, as for `from_nnx`.

    Raises:
      ValueError: the module has variables in other collections, such as a cache.
    """

    def every_parameter(module, tokens):
        return module.unembed(module(tokens, tokens, None)[0])

    def variables(key: jax.Array) -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return linen.meta.unbox(module.init(key, tokens, method=every_parameter))

    abstract = jax.eval_shape(variables, jax.random.key(0))
    if others := sorted(abstract.keys() - {"params"}):
        raise ValueError(
            f"the module has variables in the collections {others}; expected only 'params'. Its "
            "cache has to be an argument and a result of __call__, as Policy describes."
        )

    def forward(params, tokens, positions, cache=None):
        return module.apply({"params": params}, tokens, positions, cache)

    def unembed(params, hidden):
        return module.apply({"params": params}, hidden, method="unembed")

    def init_cache(batch, length):
        return module.apply(abstract, batch, length, method="init_cache")

    return Policy(forward, unembed, init_cache), lambda key: variables(key)["params"]
