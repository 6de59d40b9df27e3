"""The training state of a stage, as one pytree, and the shardings of its leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Params
from opsd_jax.training.stage import Teacher

# {"step": int32 [], number of attempted optimizer updates; "params"; "opt_state"; "teacher": the
# teacher's parameters, or None}
State = dict[str, Any]


def init_state(
    params: Params, optimizer: optax.GradientTransformation, teacher: Teacher | None = None
) -> State:
    """Returns the training state at the start of a stage.

    Args:
      params: the parameters that the stage starts from.
      optimizer: the stage's optimizer.
      teacher: how to make the teacher's parameters; None for a stage that stores none.
    """
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
    """Returns the shapes, dtypes and shardings of the initial training state.

    Args:
      abstract_params: shapes, dtypes and shardings of the parameters.
      optimizer: the stage's optimizer.
      teacher: the stage's teacher.
      mesh: the mesh of the parameters.
    """
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, teacher), abstract_params)
    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
    return mesh_lib.abstract_of(shapes, state_shardings(shapes, optimizer, params, mesh))


def state_shardings(
    state: State, optimizer: optax.GradientTransformation, params: Any, mesh: jax.sharding.Mesh
) -> State:
    """Returns the sharding of each leaf of a training state.

    The optimizer's moments and the teacher are sharded like the parameters; scalars are replicated.

    Args:
      state: a state or its shapes.
      optimizer: the optimizer that made `state["opt_state"]`.
      params: shardings of the parameters.
      mesh: the mesh of the parameters.
    """
    replicated = mesh_lib.replicated(mesh)
    return {
        "step": replicated,
        "params": params,
        "opt_state": optax.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            state["opt_state"],
            params,
            transform_non_params=lambda _: replicated,
        ),
        "teacher": None if state["teacher"] is None else params,
    }
