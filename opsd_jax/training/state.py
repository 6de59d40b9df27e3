"""The state of a stage: one pytree, and where its leaves live."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Params
from opsd_jax.training.stage import Teacher

# {"step": int32, optimiser updates tried; "params"; "opt_state"; "teacher": params or None}
State = dict[str, Any]


def init_state(
    params: Params, optimizer: optax.GradientTransformation, teacher: Teacher | None = None
) -> State:
    """A stage's first state."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(params),
        "teacher": teacher.init(params) if teacher else None,
    }


def abstract_state(
    abstract_params: Params,
    optimizer: optax.GradientTransformation,
    teacher: Teacher | None,
    mesh: jax.sharding.Mesh,
) -> State:
    """The shapes of `init_state`, with shardings, from those of the parameters."""
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, teacher), abstract_params)
    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
    return mesh_lib.abstract_of(shapes, state_shardings(shapes, optimizer, params, mesh))


def state_shardings(
    state: State, optimizer: optax.GradientTransformation, params: Any, mesh: jax.sharding.Mesh
) -> State:
    """The sharding of each leaf: moments and teacher lie as the parameters do, numbers everywhere.

    Args:
      state: a state or its shapes.
      optimizer: the one that made `state["opt_state"]`.
      params: the shardings of the parameters.
      mesh: for what is replicated.
    """
    whole = mesh_lib.replicated(mesh)
    return {
        "step": whole,
        "params": params,
        "opt_state": optax.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            state["opt_state"],
            params,
            transform_non_params=lambda _: whole,
        ),
        "teacher": None if state["teacher"] is None else params,
    }
