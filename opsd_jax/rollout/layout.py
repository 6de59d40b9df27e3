"""The layout of the parameters during decoding: their shardings and dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.program import ProgramKey, ProgramKind
from opsd_jax.policy import Model, Params


class Layout(NamedTuple):
    """A layout of the parameters for decoding, and a function that converts parameters to it.

    Attributes:
      mesh: the devices, in the shape that decoding uses.
      abstract: the parameters' shapes, dtypes and shardings in this layout.
      moved_bytes: bytes per device of the parameters that differ from the training layout. Each
        device holds them in addition to the training state.
      convert: `params -> params`, from the training layout to this one. One compiled program casts
        and moves the parameters that differ. The other arrays are returned as they are.
    """

    mesh: jax.sharding.Mesh
    abstract: Params
    moved_bytes: int
    convert: Callable[[Params], Params]


class Sampler:
    """A model in the form that samples, and the layout of its parameters.

    Attributes:
      model: the model.
    """

    def __init__(self, model: Model, abstract_params: Params, mesh: jax.sharding.Mesh):
        """Compiles nothing. The arguments are those of `decode_layout`."""
        self.model, self._abstract_params, self._mesh = model, abstract_params, mesh

    @functools.cached_property
    def layout(self) -> Layout:
        """The `Layout` of the parameters. The first access compiles its `convert` function."""
        return decode_layout(self.model, self._abstract_params, self._mesh)


def check_fits(model: Model, shapes: Params, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the model cannot decode on the mesh. Compiles nothing.

    Args:
      model: the model.
      shapes: the parameters' shapes in training.
      mesh: the mesh for decoding.

    Raises:
      ValueError: a parameter matches no sharding rule, the mesh does not divide a parameter, or
        the decoding kernel does not support a device's part of the cache.
    """
    decoding = jax.eval_shape(model.decode_params, shapes)
    mesh_lib.tree_shardings(mesh, _rules(model), decoding)
    if model.ragged:
        one = jax.ShapeDtypeStruct((mesh_lib.row_shards(mesh), 1), jnp.int32)
        policy = model.policy

        def step(params, tokens, positions):
            return policy.forward(params, tokens, positions, policy.init_cache(len(tokens), 1))

        with jax.set_mesh(mesh):
            jax.eval_shape(step, decoding, one, one)


def _rules(model: Model) -> mesh_lib.Rules:
    """Returns the sharding rules of the parameters during decoding."""
    return model.rules if model.decode_rules is None else model.decode_rules


def decode_layout(model: Model, abstract_params: Params, mesh: jax.sharding.Mesh) -> Layout:
    """Builds the layout of a model's parameters for decoding.

    The model's `decode_params` and `decode_rules` describe the layout. If a parameter has to
    change, the function compiles the program that converts it.

    Args:
      model: the model.
      abstract_params: the parameters' shapes and shardings in training.
      mesh: the mesh for decoding. It has the same devices as in training, in the same order, in
        the same or another shape.

    Raises:
      ValueError: a parameter matches no sharding rule, or the mesh does not divide it.
    """
    traced, shapes = jax.make_jaxpr(model.decode_params, return_shape=True)(abstract_params)
    shardings = jax.tree.leaves(mesh_lib.tree_shardings(mesh, _rules(model), shapes))
    tree, given = jax.tree.structure(shapes), jax.tree.leaves(abstract_params)
    sources = _unchanged(traced.jaxpr, given, shardings)
    moved = [i for i, source in enumerate(sources) if source is None]

    def convert_moved(params: Params) -> list[jax.Array]:
        prepared = jax.tree.leaves(model.decode_params(params))
        return [prepared[i] for i in moved]

    program: Callable[[Params], list[jax.Array]] | None = None
    if moved:
        out = [shardings[i] for i in moved]
        lowered = jax.jit(convert_moved, out_shardings=out).lower(abstract_params)
        program = aot.compiled(ProgramKey(ProgramKind.RESHARD), lowered)

    def convert(params: Params) -> Params:
        unmoved = jax.tree.leaves(params)
        new = iter(program(params)) if program else iter(())
        return jax.tree.unflatten(tree, [next(new) if j is None else unmoved[j] for j in sources])

    placement = [
        sharding if j is None else given[j].sharding
        for j, sharding in zip(sources, shardings, strict=True)
    ]
    abstract = mesh_lib.abstract_of(shapes, jax.tree.unflatten(tree, placement))
    placed = jax.tree.leaves(abstract)
    return Layout(mesh, abstract, mesh_lib.shard_bytes([placed[i] for i in moved]), convert)


def _unchanged(
    jaxpr: Any, given: Sequence[jax.ShapeDtypeStruct], shardings: Sequence[jax.sharding.Sharding]
) -> list[int | None]:
    """Finds the parameters that need no conversion between training and decoding.

    Args:
      jaxpr: the traced `decode_params`.
      given: the parameters in training, with shardings.
      shardings: the sharding of each output of `decode_params`.

    Returns:
      For each output of `decode_params`, the index of the parameter that it is, or None if its
      values, dtype or sharding differ.
    """
    sources: list[int | None] = []
    for variable, sharding in zip(jaxpr.outvars, shardings, strict=True):
        source = next((j for j, v in enumerate(jaxpr.invars) if v is variable), None)
        if source is not None:
            leaf = given[source]
            if not leaf.sharding.is_equivalent_to(sharding, len(leaf.shape)):
                source = None
        sources.append(source)
    return sources
