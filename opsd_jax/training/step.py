"""The train step: gradients and weights summed over microbatches, divided once, and one update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.program import ProgramKey, ProgramKind, bucket_scope
from opsd_jax.training.stage import Batch, Stage, Teacher
from opsd_jax.training.state import State


def make_train_step(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    teacher_rule: Teacher | None = None,
) -> Callable[[State, Batch], tuple[State, dict[str, Any]]]:
    """The pure function `(state, batch) -> (state, metrics)`; jit it with the state donated.

    Only the first `count` microbatches of each bucket are computed. The loss is
    sum / weight over all of them, on every device. When no row has weight, or the gradient is not
    finite, the parameters, the optimiser's moments and the teacher stay as they are, to the bit.

    Args:
      loss: as `Stage.loss`.
      optimizer: of `state["opt_state"]`.
      teacher_rule: how `state["teacher"]` follows the parameters; None for not at all.

    Returns:
      The step. Its metrics are `(sum, weight)` pairs: those of the loss, and `loss`, `grad_norm`
      (before clipping), `empty` (1 if no row had weight) and `nonfinite` (1 if an update was
      skipped for its gradient).
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        params, teacher = state["params"], state["teacher"]

        def accumulate(totals, bucket, name):
            def add(i, totals):
                microbatch = jax.tree.map(lambda x: x[i], bucket["rows"])
                # Tied to i: with M = 1 the body would be the same in every turn, and XLA would move
                # it out of the loop, where it is computed whatever `count` is.
                microbatch, _ = jax.lax.optimization_barrier((microbatch, i))
                return jax.tree.map(jnp.add, totals, gradient(params, teacher, microbatch))

            with jax.named_scope(name):
                return jax.lax.fori_loop(0, bucket["count"], add, totals)

        first = jax.tree.map(lambda x: x[0], batch[0]["rows"])
        shapes = jax.eval_shape(gradient, params, teacher, first)
        totals = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
        for b, bucket in enumerate(batch):
            totals = accumulate(totals, bucket, bucket_scope(b))
        (total, (weight, metrics)), grads = totals

        with jax.named_scope("update"):
            empty = weight == 0
            grads = jax.tree.map(lambda g: g / jnp.where(empty, 1.0, weight), grads)
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(norm)
            updates, opt_state = optimizer.update(grads, state["opt_state"], params)
            updated = {
                "params": optax.apply_updates(params, updates),
                "opt_state": opt_state,
            }
            kept = {"params": params, "opt_state": state["opt_state"]}
            ok = finite & ~empty
            updated = jax.tree.map(
                lambda new, old: jnp.where(ok, new, old).astype(old.dtype), updated, kept
            )
            if teacher_rule is not None and teacher_rule.update is not None:
                updated["teacher"] = teacher_rule.update(
                    teacher, updated["params"], state["step"] + 1, ok
                )
        one = jnp.ones((), jnp.float32)
        live = jnp.where(empty, 0.0, one)
        metrics = metrics | {
            "loss": (total, weight),
            "grad_norm": (jnp.where(empty, 0.0, norm), live),
            "empty": (1 - live, one),
            "nonfinite": (jnp.where(finite, 0.0, one), one),
        }
        return state | updated | {"step": state["step"] + 1}, metrics

    return train_step


def batch_shardings(batch: Batch, mesh: jax.sharding.Mesh) -> Any:
    """Where a batch lies: rows of a microbatch over `data` and `fsdp`, counts everywhere."""
    rows, whole = mesh_lib.rows(mesh, axis=1), mesh_lib.replicated(mesh)
    return jax.tree.map(lambda x: rows if np.ndim(x) else whole, batch)


def compile_train_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    abstract_state: State,
    mesh: jax.sharding.Mesh,
) -> Callable[[State, Batch], tuple[State, dict[str, Any]]]:
    """`make_train_step`, compiled for the shapes of `stage.empty_batch`, the state donated.

    Args:
      stage: gives the loss and the shapes.
      optimizer: the stage's.
      abstract_state: shapes with shardings.
      mesh: the mesh.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    where = batch_shardings(stage.empty_batch, mesh)
    step = jax.jit(
        make_train_step(stage.loss, optimizer, stage.teacher),
        donate_argnums=0,
        in_shardings=(state_shardings, where),
        out_shardings=(state_shardings, None),
    )
    with jax.set_mesh(mesh):
        return aot.compiled(
            ProgramKey(ProgramKind.TRAIN_STEP),
            step.lower(abstract_state, mesh_lib.abstract_of(stage.empty_batch, where)),
        )
