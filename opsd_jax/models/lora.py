"""Low-rank adapters of a model's matrices (LoRA; Hu et al., arXiv 2106.09685).

A stage that trains an adapter holds the matrices W of the base model once, without gradients and
without optimizer state. It trains A and B of each adapted matrix, and the model computes with
`W + alpha / rank * A B`. A starts with random values and B with zeros, so a new adapter changes
nothing.

An adapter is a dict: the path of a matrix, such as "layers/q" -> {"a": A, "b": B}. A matrix that
maps I inputs to O outputs has A [I, rank] and B [rank, O]. If the parameter is a stack of matrices,
or has several axes for its inputs or outputs (see `opsd_jax.policy.Matrix`), then A and B have the
same axes in place of I and O. They are float32.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax.models.quantised import Quantised, is_quantised, quantise
from opsd_jax.options import ConfigError, fail, option
from opsd_jax.parallel.mesh import axes_of, path_name, shards
from opsd_jax.policy import Matrix, Model, Params, Policy
from opsd_jax.storage.foreign import listed

FIELD = "adapter"  # the config section


def _are_expressions(texts: tuple[str, ...]) -> bool:
    try:
        for text in texts:
            re.compile(text)
    except re.error:
        return False
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """The options of a run's adapter."""

    kind: str = option(
        "none",
        "'lora' trains a low-rank adapter and leaves the model's own parameters as they are; "
        "'none' trains all parameters.",
        choices=("none", "lora"),
        added=True,
    )
    rank: int = option(
        64, "Rank of the adapter of each matrix; at most its smaller side.", at_least=1, added=True
    )
    alpha: float = option(
        128.0, "The product of A and B is multiplied by alpha / rank.", above=0, added=True
    )
    targets: tuple[str, ...] = option(
        (),
        "Parameters to adapt, as regular expressions of whole paths, such as 'layers/(q|v)'; () "
        "for all that the model lists in `Model.matrices`.",
        expects="regular expressions",
        check=_are_expressions,
        added=True,
    )
    dropout: float = option(
        0.0,
        "Probability with which each input of A is set to zero while training.",
        at_least=0,
        below=1,
        added=True,
    )
    base: str = option(
        "auto",
        "Matrices of the base model while an adapter trains: 'exact' in `model.dtype`, 'int8' with "
        "a scale for each output, or 'auto': 'int8' if `rollout_quantisation.weights` is.",
        choices=("auto", "exact", "int8"),
        added=True,
    )
    stages: tuple[str, ...] = option(
        (), "The stages that train the adapter; () for all stages.", added=True
    )
    path: str = option(
        "",
        "Local directory of an adapter in the format of Hugging Face PEFT, with which the run "
        "begins; '' for a new adapter. The first stage has to train the adapter.",
        added=True,
    )

    def check(self, field: str) -> None:
        """Raises ConfigError if other fields are set, but `kind` does not turn the adapter on."""
        for name, about in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if self.kind == "none" and name != "kind" and value != about.default:
                expected = (
                    f"{about.default!r}, its default value, because config.{field}.kind is 'none'. "
                    f"To train an adapter, set config.{field}.kind to 'lora'"
                )
                fail(f"{field}.{name}", value, expected)
        if "://" in self.path:
            fail(f"{field}.path", self.path, "a directory on this machine")

    def trains(self, stage: str) -> bool:
        """Returns whether a stage trains the adapter."""
        return self.kind == "lora" and (not self.stages or stage in self.stages)


class Weights(NamedTuple):
    """The parameters of a model with an adapter: those of the base model, and the adapter."""

    base: Params
    adapter: Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A matrix with its adapter, in place of the parameter. It stands for `weight + a b`.

    Attributes:
      weight: the parameter of the base model.
      a, b: the factors; `b` has been multiplied by alpha / rank.
      key: selects the inputs of `a` that dropout sets to zero; None for no dropout. It has the
        stacked axes of the parameter.
      dropout: their fraction.
    """

    weight: jax.Array | Quantised
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def astype(self, dtype: Any) -> LowRank:
        """Casts all three arrays, except a weight that is quantised."""
        w = self.weight
        weight = w if isinstance(w, Quantised) else w.astype(dtype)
        return dataclasses.replace(
            self, weight=weight, a=self.a.astype(dtype), b=self.b.astype(dtype)
        )

    def reshape(self, size: int, *sizes: int) -> LowRank:
        """Reshapes a weight whose inputs come first, and become one axis of `size`.

        The axes of the outputs, in `b`, stay as they are.
        """
        weight, a = self.weight.reshape(size, *sizes), self.a.reshape(size, -1)
        return dataclasses.replace(self, weight=weight, a=a)

    def dropped(self, x: jax.Array) -> jax.Array:
        """Applies dropout to the inputs [..., I] of `a`."""
        if self.key is None:
            return x
        kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)


def without_dropout(params: Params) -> Params:
    """Returns the parameters of a model for a forward pass without dropout."""
    is_low_rank = lambda leaf: isinstance(leaf, LowRank)
    plain = lambda leaf: dataclasses.replace(leaf, key=None) if is_low_rank(leaf) else leaf
    return jax.tree.map(plain, params, is_leaf=is_low_rank)


class LoRA:
    """The adapter of one model: which parameters it adapts, and how.

    Attributes:
      matrices: the path of each adapted parameter -> how its axes form a matrix.
      scale: alpha / rank.
      native: whether the model computes with factors, and their sum is not formed.
    """

    def __init__(self, options: LoRAOptions, model: Model, shapes: Params, make: str = ""):
        """Finds the parameters that the options adapt. Compiles nothing.

        Args:
          options: the config section `adapter`.
          model: the model.
          shapes: the shapes of its parameters.
          make: the function that made the model, for the error about a model without matrices.

        Raises:
          ConfigError: a target matches no matrix, the rank is larger than a matrix allows, or the
            model does not support dropout or a base in 8 bits.
        """
        self._options, self._model = options, model
        self.scale = options.alpha / options.rank
        paths = jax.tree_util.tree_leaves_with_path(shapes)
        self._shapes = {path_name(path): tuple(leaf.shape) for path, leaf in paths}
        declared = {name: found for name in self._shapes if (found := _declared(model, name))}
        plain = {name: Matrix() for name, shape in self._shapes.items() if len(shape) == 2}
        if not declared and not options.targets:
            expected = (
                f"the paths of matrices, such as {listed(sorted(plain), count=3)}, because the "
                f"model of {make!r} lists none in `Model.matrices`"
            )
            fail(f"{FIELD}.targets", (), expected)
        self.matrices = _matched(options.targets, self._shapes, declared or plain)
        self.native = bool(declared) and model.low_rank
        self._int8 = declared if options.base == "int8" else {}
        for name, matrix in self.matrices.items():
            _, inputs, outputs = _split(self._shapes[name], matrix)
            side = min(math.prod(inputs), math.prod(outputs))
            if options.rank > side:
                shape = " x ".join(map(str, self._shapes[name]))
                expected = f"at most {side}, the smaller side of the matrix {name} [{shape}]"
                fail(f"{FIELD}.rank", options.rank, expected)
        for name, only in (("dropout", 0.0), ("base", "exact")):
            value = getattr(options, name)
            if value not in (only, "auto") and not self.native:
                expected = (
                    f"{only!r}, because the model does not apply adapters itself "
                    "(`Model.low_rank`), so each adapter is added to its matrix"
                )
                fail(f"{FIELD}.{name}", value, expected)

    @property
    def about(self) -> dict[str, Any]:
        """What an adapter's values mean: they are useless with other options. JSON-ready."""
        options = self._options
        return {"rank": options.rank, "alpha": options.alpha, "targets": sorted(self.matrices)}

    def init(self, key: jax.Array) -> Params:
        """Returns a new adapter. A has values in (-1, 1) / sqrt(inputs), as in PEFT; B is 0.

        Args:
          key: a PRNG key.
        """
        adapter, rank = {}, self._options.rank
        for name, matrix in self.matrices.items():
            stacked, inputs, outputs = _split(self._shapes[name], matrix)
            bound = math.prod(inputs) ** -0.5
            a = jax.random.uniform(
                _fold(key, name), (*stacked, *inputs, rank), minval=-bound, maxval=bound
            )
            adapter[name] = {"a": a, "b": jnp.zeros((*stacked, rank, *outputs), jnp.float32)}
        return adapter

    def held(self, params: Params) -> Params:
        """Returns the parameters of the base model in the form in which stages hold them.

        They have the dtypes of the matmuls, or 8 bits.
        """
        if not self._int8:
            return self._model.decode_params(params)

        def leaf(path, exact, prepared):
            matrix = self._int8.get(path_name(path))
            if matrix is None:
                return prepared
            return quantise(exact, tuple(range(matrix.stacked, matrix.stacked + matrix.inputs)))

        return jax.tree_util.tree_map_with_path(leaf, params, self._model.decode_params(params))

    def abstract_base(self, params: Params) -> Params:
        """Returns the shapes, dtypes and shardings of `held(params)`, for those of `params`."""

        def sharded(x: jax.ShapeDtypeStruct, given: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = given.sharding
            if x.shape != given.shape:  # a scale, whose contracted axes have size 1
                spec = (*sharding.spec, *(None,) * len(x.shape))
                kept = (spec[i] if x.shape[i] == n else None for i, n in enumerate(given.shape))
                sharding = NamedSharding(sharding.mesh, P(*kept))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        placed = lambda held, given: jax.tree.map(lambda x: sharded(x, given), held)
        return jax.tree.map(placed, jax.eval_shape(self.held, params), params, is_leaf=is_quantised)

    def abstract(self, params: Params) -> Params:
        """Returns the shapes, dtypes and shardings of an adapter.

        A is sharded like the inputs of its matrix, and B like the outputs. If the other side of the
        matrix is sharded over `fsdp`, the rank is, so that no device holds a whole factor.

        Args:
          params: shapes and shardings of the model's own parameters.
        """
        leaves = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
        shapes = jax.eval_shape(self.init, jax.random.key(0))

        def placed(name: str, factor: str, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding, count = leaves[name].sharding, len(self._shapes[name])
            spec = (*sharding.spec, *(None,) * count)[:count]
            stacked, inputs, outputs = _split(spec, self.matrices[name])
            others = outputs if factor == "a" else inputs
            rank = next((entry for entry in others if "fsdp" in axes_of(entry)), None)
            if self._options.rank % shards(sharding.mesh, rank):
                rank = None
            axes = (*inputs, rank) if factor == "a" else (rank, *outputs)
            placed = NamedSharding(sharding.mesh, P(*stacked, *axes))
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed)

        return {
            name: {factor: placed(name, factor, shape) for factor, shape in factors.items()}
            for name, factors in shapes.items()
        }

    def merged(self, weights: Weights) -> Params:
        """Returns parameters without an adapter, which compute the same as `weights`.

        The sums are computed in float32 and cast to the dtypes of the base model. Matrices in
        8 bits become float32.
        """
        summed = self._mapped(weights.base, weights.adapter, self._sum)
        exact = lambda leaf: leaf.values * leaf.scale if is_quantised(leaf) else leaf
        return jax.tree.map(exact, summed, is_leaf=is_quantised)

    def applied(
        self,
        base: Params,
        adapter: Params | None,
        draw: Sequence[jax.Array] | None = None,
        *,
        seed: int = 0,
    ) -> Params:
        """Returns parameters that `policy` takes, for a train step.

        Args:
          base: the parameters of the base model.
          adapter: the adapter; None for the base model alone.
          draw: integers that select the inputs to drop; None for no dropout.
          seed: another one of these integers.
        """
        if adapter is None:
            return base
        key = None
        if draw is not None and self._options.dropout:
            key = jax.random.key(seed)
            for number in draw:
                key = jax.random.fold_in(key, number)

        def join(name: str, weight: Any, factors: Mapping[str, jax.Array]) -> Any:
            if not self.native:
                return self._sum(name, weight, factors)
            own = None
            if key is not None:
                own = _fold(key, name)
                stacked = self._shapes[name][: self.matrices[name].stacked]
                own = jax.random.split(own, stacked) if stacked else own
            b = factors["b"] * self.scale
            return LowRank(weight, factors["a"], b, own, self._options.dropout)

        return self._mapped(base, adapter, join)

    @property
    def policy(self) -> Policy:
        """The model as functions of `Weights`, without dropout."""
        policy = self._model.policy
        return policy._replace(
            forward=lambda weights, *rest: policy.forward(self.applied(*weights), *rest),
            unembed=lambda weights, hidden: policy.unembed(self.applied(*weights), hidden),
        )

    def _sum(self, name: str, weight: Any, factors: Mapping[str, jax.Array]) -> jax.Array:
        """Returns a matrix of the base model plus its adapter."""
        stacked, inputs, outputs = _split(range(len(self._shapes[name])), self.matrices[name])
        rank = len(self._shapes[name])
        a, b = (*stacked, *inputs, rank), (*stacked, rank, *outputs)
        product = jnp.einsum(
            factors["a"], a, factors["b"], b, [*stacked, *inputs, *outputs], precision="highest"
        )
        if isinstance(weight, Quantised):
            return weight.values * weight.scale + self.scale * product
        return (weight.astype(jnp.float32) + self.scale * product).astype(weight.dtype)

    def _mapped(self, base: Params, adapter: Params, join: Any) -> Params:
        """Returns `base` with `join(path, parameter, factors)` in place of adapted parameters."""

        def leaf(path, weight):
            name = path_name(path)
            return join(name, weight, adapter[name]) if name in adapter else weight

        return jax.tree_util.tree_map_with_path(leaf, base, is_leaf=is_quantised)


def _declared(model: Model, name: str) -> Matrix | None:
    """Returns how the model declares that a parameter is a matrix; None if it does not."""
    return next((m for pattern, m in model.matrices if re.fullmatch(pattern, name)), None)


def _split(axes: Sequence[Any], matrix: Matrix) -> tuple[Any, Any, Any]:
    """Splits what belongs to the axes of a parameter into stacked axes, inputs and outputs."""
    first = matrix.stacked + matrix.inputs
    return axes[: matrix.stacked], axes[matrix.stacked : first], axes[first:]


def _fold(key: jax.Array, name: str) -> jax.Array:
    """Returns the PRNG key of a matrix. It does not depend on which others are adapted."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) >> 1)


def _matched(
    targets: Sequence[str], shapes: Mapping[str, tuple[int, ...]], allowed: Mapping[str, Matrix]
) -> dict[str, Matrix]:
    """Returns the matrices that targets match; all if there are no targets.

    Args:
      targets: regular expressions.
      shapes: the shape of each parameter.
      allowed: the parameters that can be adapted.

    Raises:
      ConfigError: a target matches none.
    """
    matched = set[str]() if targets else {*allowed}
    for target in targets:
        every = {name for name in shapes if re.fullmatch(target, name)}
        if not every & allowed.keys():
            found = f"only {listed(sorted(every))}, which cannot be adapted" if every else "nothing"
            raise ConfigError(
                f"config.{FIELD}.targets: {target!r} matches {found}; expected a regular "
                f"expression that matches the whole path of a matrix: {listed(sorted(allowed))}."
            )
        matched |= every & allowed.keys()
    return {name: matrix for name, matrix in allowed.items() if name in matched}
