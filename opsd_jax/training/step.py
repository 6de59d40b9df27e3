"""The train step, which makes one optimizer update from the gradients of all microbatches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opsd_jax.losses.checks import without_debug_checks
from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.program import ProgramKey, ProgramKind, bucket_scope
from opsd_jax.training.stage import Batch, Microbatch, Stage, Teacher
from opsd_jax.training.state import State


def make_train_step(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    teacher: Teacher | None = None,
    joined: Callable[..., Any] | None = None,
) -> Callable[..., tuple[State, dict[str, Any]]]:
    """Makes the train step, a pure function `(state, batch, base=None) -> (state, metrics)`.

    `base` has the parameters of the base model, if the stage trains an adapter. Jit the step with
    the state donated. It computes only the first `count` microbatches of each bucket. The loss is
    sum / weight over all microbatches of all devices. If no row has weight, or the gradient is not
    finite, the parameters, the optimizer's moments and the teacher keep their exact values.

    Args:
      loss: as `Stage.loss`.
      optimizer: the optimizer that made `state["opt_state"]`.
      teacher: how `state["teacher"]` is updated; None if it never changes.
      joined: as `Stage.joined`.

    Returns:
      The train step. Its metrics are `(sum, weight)` pairs, float32 []: those of the loss, and
      `loss`, `grad_norm` (before clipping), `empty` (1 if no row had weight) and `nonfinite` (1 if
      the update was skipped because of its gradient).
    """
    gradient = jax.value_and_grad(_with_base(loss, joined), has_aux=True)

    def train_step(state: State, batch: Batch, base: Any = None) -> tuple[State, dict[str, Any]]:
        models = state["params"], state["teacher"], base, state["step"]
        accumulate = lambda models, batch: _sum_over_microbatches(
            functools.partial(gradient, *models), batch
        )
        (total, (weight, metrics)), grads = mesh_lib.over_data(accumulate, batch)(models, batch)

        with jax.named_scope("update"):
            empty = weight == 0
            grads = jax.tree.map(lambda g: g / jnp.where(empty, 1.0, weight), grads)
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(norm)
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            new = {"params": params, "opt_state": opt_state}
            old = {name: state[name] for name in new}
            applied = finite & ~empty
            updated = jax.tree.map(lambda n, o: jnp.where(applied, n, o).astype(o.dtype), new, old)
            if teacher is not None and teacher.update is not None:
                updated["teacher"] = teacher.update(
                    state["teacher"], updated["params"], state["step"] + 1, applied
                )
        one = jnp.ones((), jnp.float32)
        active = jnp.where(empty, 0.0, one)
        metrics = metrics | {
            "loss": (total, weight),
            "grad_norm": (jnp.where(empty, 0.0, norm), active),
            "empty": (1 - active, one),
            "nonfinite": (jnp.where(finite, 0.0, one), one),
        }
        return state | updated | {"step": state["step"] + 1}, metrics

    return train_step


def _with_base(loss: Callable[..., Any], joined: Callable[..., Any] | None) -> Callable[..., Any]:
    """Returns `Stage.loss` as a function of a state, a base model and the number of a microbatch.

    Its arguments are params, teacher, base, the step, the number and the microbatch. `joined` is
    `Stage.joined`.
    """
    if joined is None:
        return lambda params, teacher, base, step, number, rows: loss(params, teacher, rows)

    def loss_of(adapter, teacher, base, step, number, rows):
        draw = step, number, mesh_lib.part_of_data()
        return loss(joined(base, adapter, draw), joined(base, teacher), rows)

    return loss_of


def _sum_over_microbatches(gradient: Callable[[Any, Microbatch], Any], batch: Batch) -> Any:
    """Sums `gradient(number, microbatch)` in float32 over the microbatches that are in use.

    These are the first `count` microbatches of each bucket. Each microbatch has its own number.
    """

    def add_bucket(totals, bucket, first):
        def add(i, totals):
            microbatch = jax.tree.map(lambda x_Mxm: x_Mxm[i], bucket["rows"])
            # Ties the microbatch to i. With M = 1, the loop's body would not depend on i, so XLA
            # would move it out of the loop and compute it even if `count` is 0.
            microbatch, _ = jax.lax.optimization_barrier((microbatch, i))
            return jax.tree.map(jnp.add, totals, gradient(first + i, microbatch))

        return jax.lax.fori_loop(0, bucket["count"], add, totals)

    one = jax.tree.map(lambda x_Mxm: x_Mxm[0], batch[0]["rows"])
    shapes = jax.eval_shape(gradient, 0, one)
    totals, first = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes), 0
    for b, bucket in enumerate(batch):
        with jax.named_scope(bucket_scope(b)):
            totals = add_bucket(totals, bucket, first)
        first += len(jax.tree.leaves(bucket["rows"])[0])
    return totals


def batch_shardings(batch: Batch, mesh: jax.sharding.Mesh) -> Any:
    """Returns the sharding of each array of a batch.

    The rows of each microbatch are split over the mesh axes `data` and `fsdp`; counts are
    replicated.
    """
    rows_Mxm, replicated = mesh_lib.rows(mesh, axis=1), mesh_lib.replicated(mesh)
    return jax.tree.map(lambda x: rows_Mxm if np.ndim(x) else replicated, batch)


def compile_train_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    abstract_state: State,
    mesh: jax.sharding.Mesh,
    abstract_base: Any = None,
) -> Callable[..., tuple[State, dict[str, Any]]]:
    """Compiles the train step for the shapes of `stage.empty_batch`. The step donates its state.

    Args:
      stage: the stage; gives the loss, the teacher and the shapes.
      optimizer: the stage's optimizer.
      abstract_state: shapes, dtypes and shardings of the state.
      mesh: the mesh of the state.
      abstract_base: shapes, dtypes and shardings of the parameters of the base model; None for a
        stage that trains no adapter.

    Returns:
      The compiled `(state, batch, base=None) -> (state, metrics)` of `make_train_step`. `base` is
      left out if `abstract_base` is None.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    shardings = batch_shardings(stage.empty_batch, mesh)
    abstract: Any = (abstract_state, mesh_lib.abstract_of(stage.empty_batch, shardings))
    if abstract_base is not None:
        abstract = (*abstract, abstract_base)
    step = jax.jit(
        make_train_step(stage.loss, optimizer, stage.teacher, stage.joined),
        donate_argnums=0,
        in_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        out_shardings=(state_shardings, None),
    )
    with jax.set_mesh(mesh), without_debug_checks():
        return aot.compiled(
            ProgramKey(ProgramKind.TRAIN_STEP),
            step.lower(*abstract),
        )
