"""The state of a stage: one pytree, and where its leaves live."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Params
from opsd_jax.stages.teacher import Teacher

# {"step": int32, optimiser updates tried; "params"; "opt_state"; "teacher": params or None}
State = dict[str, Any]


def make_optimizer(config: ml_collections.ConfigDict, updates: int) -> optax.GradientTransformation:
    """AdamW with clipping by the global norm, warm-up, and a constant or cosine learning rate.

    Args:
      config: a stage's `optimizer` (see opsd_jax/config.py).
      updates: of the whole stage; the cosine ends there.
    """
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=config.learning_rate,
            warmup_steps=config.warmup,
            decay_steps=updates,
            end_value=config.learning_rate * config.final_fraction,
        )
    elif config.warmup:
        rate = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
    else:  # a linear schedule of no steps would stay at its first value, 0
        rate = optax.constant_schedule(config.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            rate,
            config.b1,
            config.b2,
            mu_dtype=config.moment_dtype,
            weight_decay=config.weight_decay,
        ),
    )


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
