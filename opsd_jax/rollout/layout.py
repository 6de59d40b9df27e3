"""Where and in which dtype the parameters lie while rollouts are sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.program import ProgramKey, ProgramKind
from opsd_jax.policy import Model, Params


class Layout(NamedTuple):
    """A layout of the parameters, and the way to it.

    Attributes:
      mesh: the devices as decoding sees them.
      abstract: the parameters' shapes there, with shardings.
      moved: bytes on a device of what is not as it is in training.
      convert: `params -> params`: one program casts and moves what is not as it should be; the
        other arrays stay where they are and are returned themselves.
    """

    mesh: jax.sharding.Mesh
    abstract: Params
    moved: int
    convert: Callable[[Params], Params]


def check_fits(model: Model, shapes: Params, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError as `decode_layout` does, from the shapes of the parameters alone, and where
    a device's part of the cache is none that decoding takes.
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
    return model.rules if model.decode_rules is None else model.decode_rules


def decode_layout(model: Model, abstract_params: Params, mesh: jax.sharding.Mesh) -> Layout:
    """The layout that `model.decode_params` and `model.decode_rules` describe; compiles the way.

    Args:
      model: the model.
      abstract_params: its parameters' shapes with shardings, as training has them.
      mesh: for decoding: the devices of training in the same order, in that shape or another.

    Raises:
      ValueError: a parameter matches no rule or is not divided by the mesh; names it.
    """
    traced, shapes = jax.make_jaxpr(model.decode_params, return_shape=True)(abstract_params)
    shardings = jax.tree.leaves(mesh_lib.tree_shardings(mesh, _rules(model), shapes))
    leaves, tree = jax.tree.flatten(shapes)
    given, inputs = jax.tree.leaves(abstract_params), traced.jaxpr.invars

    def stays(i: int) -> int | None:
        """Which parameter the i-th of the layout is, unchanged and in its place; None if none."""
        for j, variable in enumerate(inputs):
            if variable is traced.jaxpr.outvars[i]:
                there = given[j].sharding.is_equivalent_to(shardings[i], len(leaves[i].shape))
                return j if there else None
        return None

    kept = [stays(i) for i in range(len(leaves))]
    moved = [i for i, source in enumerate(kept) if source is None]

    def convert_moved(params: Params) -> list[jax.Array]:
        prepared = jax.tree.leaves(model.decode_params(params))
        return [prepared[i] for i in moved]

    program = None
    if moved:
        out = [shardings[i] for i in moved]
        lowered = jax.jit(convert_moved, out_shardings=out).lower(abstract_params)
        program = aot.compiled(ProgramKey(ProgramKind.RESHARD), lowered)

    def convert(params: Params) -> Params:
        there = jax.tree.leaves(params)
        new = iter(program(params)) if program else iter(())
        return jax.tree.unflatten(tree, [next(new) if j is None else there[j] for j in kept])

    where = [s if j is None else given[j].sharding for j, s in zip(kept, shardings, strict=True)]
    abstract = mesh_lib.abstract_of(shapes, jax.tree.unflatten(tree, where))
    placed = jax.tree.leaves(abstract)
    return Layout(mesh, abstract, mesh_lib.shard_bytes([placed[i] for i in moved]), convert)
