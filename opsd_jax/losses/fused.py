"""Computes losses from hidden states, keeping the logits of only one chunk of tokens in memory.

With a vocabulary of 151,936 entries, the float32 logits of 8,192 tokens take 5 GB, and a divergence
with its gradient needs several arrays of this size. This module takes a loss that is written as
a function of logits, and runs it in a loop over chunks of tokens.

The weight of each token in the loss is known before the loop. The gradients of a chunk can
therefore be computed in the same pass as its loss, while its logits exist. The logits are computed
once, and the loop keeps only the sum of the head's gradients, in float32, and the gradients of the
hidden states. Tokens with a weight of 0 (padding, rows that the gate drops) are not computed.

Shape suffixes:
  B rows, T tokens of a row, N = B T tokens of one device, M: N rounded up to whole chunks,
  C tokens of a chunk, D width of the hidden states, V vocabulary size.
A pytree has the suffix of the axes that its arrays share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opsd_jax.losses.checks import check_mask, is_known
from opsd_jax.losses.head import (
    Head,
    LogitsOrHead,
    check_sources,
    hoist,
    logits_of,
    stop_gradient,
    trim,
    vocabulary_size,
)
from opsd_jax.losses.reduction import weighted_sum

LOSS_CHUNKS = "loss_chunks"  # named scope of the loop over chunks of tokens

# A loss of each token on its own: `(student logits [..., V], teacher logits [..., V] or None,
# inputs [..., ...]) -> (values [...], diagnostics)`. Logits and values are float32. Inputs are a
# pytree of arrays. Diagnostics are a dict of arrays [...], which may be nested.
TokenLoss = Callable[[jax.Array, Any, Any], tuple[jax.Array, dict[str, Any]]]


def weighted_loss(
    loss: TokenLoss,
    weights: jax.Array,
    inputs: Any = (),
    *,
    student: LogitsOrHead,
    teacher: LogitsOrHead | None = None,
    chunk: int | None = None,
    partition: P | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Computes the weighted sum of a per-token loss. The loss is a function of the logits.

    The sum is sum_t weights_t loss_t. With a `Head`, it is computed one chunk of tokens at a time.

    Gradients flow only to the student: to its logits, or to the `params` and `hidden` of its
    `Head`. They are available in reverse mode. Logits and heads give equal values and gradients, up
    to float32 rounding.

    On a mesh, set `partition`. Each device then loops over its own tokens. The head is gathered
    once, before the loop, over the mesh axes in `partition`, and its gradient is reduced once,
    after the loop. The head stays split over other axes, for example its vocabulary over "tensor".
    Without `partition`, the compiler may put a collective of the head's size into every iteration.

    Args:
      loss: `(student_logits, teacher_logits, inputs) -> (values, diagnostics)`, for each token on
        its own. It gets float32 logits [n, V] and inputs [n, ...] of any number of tokens, and
        returns float32 values [n] and a dict of arrays [n]. `teacher_logits` is None without a
        teacher.
      weights: float [B, T]. Where a weight is 0, logits, hidden states and inputs may have any
        value, including NaN.
      inputs: a pytree of arrays [B, T, ...] for `loss`.
      student: logits [B, T, V], or a `Head` that computes them.
      teacher: the same over the same vocabulary, or None.
      chunk: tokens that a device computes at once, with a `Head`. None or 0 chooses half the width
        of the hidden states, within 128 to 512, or 2^24 / V if that is more.
      partition: how the axes [B, T] are split over the mesh in context (`jax.set_mesh`), with a
        `Head`, such as `PartitionSpec(("data", "fsdp"))`. The mesh axes must be Auto.

    Returns:
      `(sum, diagnostics)`: a float32 scalar, and arrays [B, T] with the diagnostics of `loss` and
      its values under "loss". Diagnostics have no gradients and are 0 where the weight is 0.

    Raises:
      ValueError: the shapes or vocabularies differ, or `partition` does not match the mesh.
    """
    weights, inputs, teacher = stop_gradient((jnp.asarray(weights), inputs, teacher))
    check_sources(weights, inputs, student, teacher)
    if not isinstance(student, Head) or not weights.size:
        active = weights != 0
        values, diagnostics = masked_values(
            loss, active, **_both_logits(student, teacher), inputs=inputs
        )
        return weighted_sum(values, weights), jax.lax.stop_gradient(diagnostics)

    loop, trained, fixed = _prepare(loss, student, teacher, inputs, chunk, partition)

    @jax.custom_vjp
    def run(trained, fixed, weights):
        return _run(loop, trained, fixed, weights, differentiated=False)[0]

    def forward(trained, fixed, weights):
        return _run(loop, trained, fixed, weights, differentiated=True)

    def backward(gradients, cotangents):
        scaled = jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)
        return scaled, None, None

    run.defvjp(forward, backward)
    total, diagnostics = run(trained, fixed, weights)
    return total, jax.lax.stop_gradient(diagnostics)


def token_values(
    loss: TokenLoss,
    mask: jax.Array,
    inputs: Any = (),
    *,
    student: LogitsOrHead,
    teacher: LogitsOrHead | None = None,
    chunk: int | None = None,
    partition: P | None = None,
) -> jax.Array:
    """Computes `loss` for each token in the mask, without summing over tokens.

    Use it for objectives that are not a weighted sum of these values. With a `Head`, the loss is
    computed one chunk of tokens at a time.

    Any function of the result can be differentiated. The backward pass therefore computes the
    chunks of a `Head` a second time. `weighted_loss` computes them once.

    Args:
      loss: `(student_logits, teacher_logits, inputs) -> (values, diagnostics)`, as for
        `weighted_loss`. The diagnostics are not used.
      mask: bool [B, T]. Where it is false, logits, hidden states and inputs may have any value.
      inputs: a pytree of arrays [B, T, ...] for `loss`.
      student: logits [B, T, V], or a `Head` that computes them. Only the student gets gradients.
      teacher: the same over the same vocabulary, or None.
      chunk: tokens that a device computes at once, with a `Head`. None or 0 chooses it.
      partition: how [B, T] is split over the mesh in context, with a `Head`; see `weighted_loss`.

    Returns:
      float32 [B, T], 0 where the mask is false.

    Raises:
      ValueError: the shapes or vocabularies differ, or `partition` does not match the mesh.
    """
    inputs, teacher = stop_gradient((inputs, teacher))
    mask = check_mask(mask)
    check_sources(mask, inputs, student, teacher)
    if not isinstance(student, Head) or not mask.size:
        return masked_values(loss, mask, **_both_logits(student, teacher), inputs=inputs)[0]

    loop, trained, fixed = _prepare(loss, student, teacher, inputs, chunk, partition)

    @jax.custom_vjp
    def run(trained, fixed, mask):
        weights = mask.astype(jnp.float32)
        (_, diagnostics), _ = _run(loop, trained, fixed, weights, differentiated=False)
        return diagnostics["loss"]

    def forward(trained, fixed, mask):
        return run(trained, fixed, mask), (trained, fixed, mask)

    def backward(arguments, cotangent):
        trained, fixed, mask = arguments
        weights = jnp.where(mask, cotangent, 0.0)
        _, gradients = _run(loop, trained, fixed, weights, differentiated=True)
        return gradients, None, None

    run.defvjp(forward, backward)
    return run(trained, fixed, mask)


def _both_logits(student: LogitsOrHead, teacher: LogitsOrHead | None) -> dict[str, Any]:
    """Returns the logits of both sides. Those of the teacher have no gradients."""
    return {
        "student_logits": logits_of(student),
        "teacher_logits": stop_gradient(logits_of(teacher)),
    }


def masked_values(
    loss: TokenLoss, mask: jax.Array, *, student_logits, teacher_logits, inputs
) -> tuple[jax.Array, dict[str, Any]]:
    """Computes the values and diagnostics of a loss, and sets them to 0 outside the mask.

    The logits and inputs of these tokens are replaced by 0 as well. Otherwise a NaN among them
    would make their gradients NaN, because 0 * NaN is NaN.

    Returns:
      `(values, diagnostics)`; the diagnostics include the values under "loss".
    """
    values, diagnostics = loss(*_fill_masked(mask, (student_logits, teacher_logits, inputs), 0))
    return _fill_masked(mask, (values, {**diagnostics, "loss": values}), 0)


def _fill_masked(mask: jax.Array, tree: Any, value: int) -> Any:
    """Replaces the entries of each array in `tree` with `value` where `mask` is false."""

    def fill(x):
        x = jnp.asarray(x)
        keep = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        return jnp.where(keep, x, jnp.array(value, x.dtype))

    return jax.tree.map(fill, tree)


def chunk_tokens(chunk: int | None, width: int, vocab_size: int) -> int:
    """Returns the chunk size: the number of tokens whose logits a device computes at once.

    Args:
      chunk: the requested number; None or 0 for the default.
      width: width of the hidden states.
      vocab_size: number of vocabulary entries.
    """
    return chunk or max(128, min(width // 2, 512), 2**24 // vocab_size)


class _Loop(NamedTuple):
    """The static arguments of the loop over chunks of tokens: functions, sizes and mesh axes.

    The first argument of each function holds the traced arrays that it closes over (see `hoist`).

    Attributes:
      loss: the loss of each token, written on logits: `(closed, *arguments of a TokenLoss)`.
      student_logits: `(closed, trained, fixed, hidden_CxD) -> logits_CxV`.
      teacher_logits: `(closed, params, x_C) -> logits_CxV`, where x are hidden states or logits;
        None without a teacher.
      chunk_size: C.
      axes: mesh axes that the tokens are split over; () without a partition.
      partition: how [B, T] is split over these axes.
    """

    loss: Callable[..., tuple[jax.Array, dict[str, Any]]]
    student_logits: Callable[..., jax.Array]
    teacher_logits: Callable[..., Any]
    chunk_size: int
    axes: tuple[str, ...]
    partition: P | None


def _prepare(
    loss: TokenLoss,
    student: Head,
    teacher: LogitsOrHead | None,
    inputs: Any,
    chunk: int | None,
    partition: P | None,
) -> tuple[_Loop, Any, Any]:
    """Creates the `_Loop` of a loss, and separates arrays that need gradients from the others.

    Returns:
      `(loop, trained, fixed)`. `trained` and `fixed` are pairs `(parameters, arrays of tokens)`.
      Each device holds all of the parameters, and its own rows of the arrays [B, T, ...].
    """
    student_logits, head, student_fixed = trim(student)
    teacher_params: Any = ()
    teacher_logits, teacher_BxT = (lambda params, x: logits_of(x)), teacher
    if isinstance(teacher, Head):
        unembed, *teacher_params = trim(teacher)
        teacher_logits, teacher_BxT = (lambda params, x: unembed(*params, x)), teacher.hidden
    if chunk is not None and (not isinstance(chunk, int) or chunk < 0):
        raise ValueError(
            f"chunk is {chunk!r}; expected an int, in tokens, or None or 0 for the default size."
        )
    # In a shard_map with check_vma=True, the type of an array has the axes that it varies over.
    if getattr(getattr(jax.typeof(student.hidden), "mat", None), "varying", ()):
        raise ValueError(
            "student is a Head inside a shard_map with check_vma=True. Use the argument "
            "`partition` instead of the shard_map, or set check_vma=False in the shard_map and sum "
            "the gradients over its devices yourself."
        )
    vocab_size, width = vocabulary_size("student", student), student.hidden.shape[-1]
    _check_mesh((head, student_fixed, teacher_params, student.hidden, teacher_BxT, inputs))
    shape = jnp.shape(student.hidden)[:2]
    axes = _mesh_axes(partition, shape)
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    size = min(chunk_tokens(chunk, width, vocab_size), math.prod(shape) // parts)

    def of_chunk(x):
        dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(x))
        return jax.ShapeDtypeStruct((size, *jnp.shape(x)[2:]), dtype)

    hidden_C, teacher_C, inputs_C = jax.tree.map(of_chunk, (student.hidden, teacher_BxT, inputs))
    logits_CxV = jax.ShapeDtypeStruct((size, vocab_size), jnp.float32)
    both = logits_CxV, None if teacher is None else logits_CxV
    manual = dict.fromkeys(axes, jax.sharding.AxisType.Manual)  # as within the shard_map
    mesh = jax.sharding.get_abstract_mesh()
    of_head, of_fixed, of_params = jax.tree.map(_shape_of, (head, student_fixed, teacher_params))
    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(manual) if axes else mesh):
        student_logits, of_student = hoist(student_logits, of_head, of_fixed, hidden_C)
        teacher_logits, of_teacher = hoist(teacher_logits, of_params, teacher_C)
        loss, of_loss = hoist(loss, *both, inputs_C)
    differentiable = {i for i, x in of_student.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    trained_closed = {i: of_student.pop(i) for i in differentiable}

    trained = (trained_closed, head), student.hidden
    closed = stop_gradient((of_student, of_teacher, of_loss))
    fixed = (closed, student_fixed, teacher_params), (teacher_BxT, inputs)
    return _Loop(loss, student_logits, teacher_logits, size, axes, partition), trained, fixed


def _shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype, without the type's mesh, which a shard_map may change."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _run(loop: _Loop, trained, fixed, weights_BxT, *, differentiated: bool):
    """Runs the loop over chunks on every device of the mesh. Each device processes its own tokens.

    Args:
      loop, trained, fixed: from `_prepare`.
      weights_BxT: weights of the tokens.
      differentiated: whether to compute gradients.

    Returns:
      `((sum, diagnostics), gradients)`. The gradients have the structure of `trained`, or are None.
    """
    body = functools.partial(_run_on_device, loop, differentiated=differentiated)
    if not loop.axes:
        return body(trained, fixed, weights_BxT)

    # Each device returns its own gradient of the head, stacked along a new axis, and the sum over
    # the devices is taken outside of the shard_map. There the compiler can leave each device only
    # its part of the sum if the parameters are sharded.
    partition = loop.partition
    gradient_specs = (P(loop.axes), partition) if differentiated else None
    mapped: Callable[..., Any] = jax.shard_map(
        body,
        in_specs=((P(), partition), (P(), partition), partition),
        out_specs=((P(), partition), gradient_specs),
        axis_names=set(loop.axes),
        check_vma=False,
    )
    if is_known(weights_BxT):  # outside jit, a shard_map must name all axes of the mesh
        mapped = jax.jit(mapped)
    value, gradients = mapped(trained, fixed, weights_BxT)
    if not differentiated:
        return value, None
    head_gradient, hidden_gradient = gradients
    head_gradient = jax.tree.map(lambda g, x: g.sum(0).astype(x.dtype), head_gradient, trained[0])
    # The barrier makes the sum happen before the backward pass of the rest of the model. Without
    # it, the stacked gradient, as large as the head on each device, would stay in memory during
    # that pass.
    return value, jax.lax.optimization_barrier((head_gradient, hidden_gradient))


def _run_on_device(loop: _Loop, trained, fixed, weights_BxT, *, differentiated: bool):
    """Runs the loop over chunks for the tokens of one device. The arguments are as in `_run`."""
    (head, hidden_BxTxD), (params, arrays_BxT) = trained, fixed
    shape, n = weights_BxT.shape, weights_BxT.size
    size = loop.chunk_size
    flatten = lambda x: jnp.asarray(x).reshape(n, *jnp.shape(x)[2:])
    hidden_NxD, weights_N, arrays_N = jax.tree.map(flatten, (hidden_BxTxD, weights_BxT, arrays_BxT))
    order_M, active, trip_count = _chunk_order(weights_N, size, loop.axes)
    chunk_loss = functools.partial(_chunk_loss, loop, params)

    def step(i, carry):
        total, diagnostics_N, gradients = carry
        index_C = jax.lax.dynamic_slice(order_M, (i * size,), (size,))
        write = lambda out, x: out.at[index_C].set(x, mode="drop", unique_indices=True)
        weights_C, (hidden_CxD, arrays_C) = _take_chunk(
            index_C, weights_N, (hidden_NxD, arrays_N), order_M=order_M, active=active
        )
        if differentiated:
            (value, diagnostics_C), (head_gradient, hidden_gradient_CxD) = jax.value_and_grad(
                chunk_loss, argnums=(0, 1), has_aux=True
            )(head, hidden_CxD, weights_C, arrays_C)
            add = lambda total, g: total + g.astype(jnp.float32)
            head_gradient = jax.tree.map(add, gradients[0], head_gradient)
            gradients = head_gradient, write(gradients[1], hidden_gradient_CxD)
        else:
            value, diagnostics_C = chunk_loss(head, hidden_CxD, weights_C, arrays_C)
        return total + value, jax.tree.map(write, diagnostics_N, diagnostics_C), gradients

    first_chunk = jax.tree.map(lambda x: x[:size], (hidden_NxD, weights_N, arrays_N))
    _, diagnostics_C = jax.eval_shape(chunk_loss, head, *first_chunk)
    gradients = None
    if differentiated:
        float32 = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
        gradients = float32, jnp.zeros_like(hidden_NxD)
    diagnostics_N = jax.tree.map(lambda x: jnp.zeros((n, *x.shape[1:]), x.dtype), diagnostics_C)
    with jax.named_scope(LOSS_CHUNKS):
        carry = jnp.zeros((), jnp.float32), diagnostics_N, gradients
        total, diagnostics_N, gradients = jax.lax.fori_loop(0, trip_count, step, carry)

    unflatten = lambda x: x.reshape(*shape, *x.shape[1:])
    if differentiated:
        head_gradient, hidden_gradient_NxD = gradients
        finish = (lambda g, x: g[None]) if loop.axes else (lambda g, x: g.astype(x.dtype))
        head_gradient = jax.tree.map(finish, head_gradient, head)
        gradients = head_gradient, unflatten(hidden_gradient_NxD)
    total = jax.lax.psum(total, loop.axes) if loop.axes else total
    return (total, jax.tree.map(unflatten, diagnostics_N)), gradients


def _chunk_order(weights_N: jax.Array, size: int, axes: tuple[str, ...]):
    """Orders a device's tokens so that the tokens with a non-zero weight fill the first chunks.

    Args:
      weights_N: weights of the tokens. A token is active if its weight is not 0.
      size: tokens in a chunk.
      axes: mesh axes that the tokens are split over.

    Returns:
      `(order_M, active, trip_count)`: indices of tokens, the number of active tokens, and the
      number of chunks to compute.
    """
    n = weights_N.size
    # The last chunk is filled up with indices past the end. They read a weight of 0 and write
    # nothing.
    order_M = jnp.argsort(jnp.pad(weights_N == 0, (0, -n % size), constant_values=True))
    active = jnp.sum(weights_N != 0)
    trip_count = -(-active // size)
    if axes:
        # All devices run the same number of iterations, because `unembed` may contain collectives
        # over the other axes of the mesh.
        trip_count = jax.lax.pmax(trip_count, axes)
    return order_M, active, trip_count


def _take_chunk(index_C, weights_N, arrays_N, *, order_M, active):
    """Gathers the weights and the other arrays for the tokens of one chunk.

    A masked token in the chunk gets the arrays of an active token, with a weight of 0. `unembed`
    and the loss then see only valid inputs, so that their gradients are finite. If the device has
    no active token, the arrays are filled with ones.

    Args:
      index_C: indices of the chunk's tokens; an index past the end has a weight of 0.
      weights_N: weights of the device's tokens.
      arrays_N: a pytree of arrays of the device's tokens.
      order_M, active: from `_chunk_order`.

    Returns:
      `(weights_C, arrays_C)`.
    """
    weights_C = weights_N.at[index_C].get(mode="fill", fill_value=0)
    source_C = jnp.where(weights_C != 0, index_C, order_M[0])
    any_active_C = jnp.broadcast_to(active > 0, index_C.shape)
    arrays_C = jax.tree.map(lambda x: x.at[source_C].get(mode="clip"), arrays_N)
    return weights_C, _fill_masked(any_active_C, arrays_C, 1)


def _chunk_loss(loop: _Loop, params, head, hidden_CxD, weights_C, arrays_C):
    """Returns the weighted sum of the losses in one chunk, and the diagnostics of each token."""
    (trained_closed, head), (teacher_C, inputs_C) = head, arrays_C
    (of_student, of_teacher, of_loss), student_fixed, teacher_params = params
    closed = trained_closed | of_student
    student_logits = loop.student_logits(closed, head, student_fixed, hidden_CxD)
    teacher_logits = loop.teacher_logits(of_teacher, teacher_params, teacher_C)
    values_C, diagnostics_C = loop.loss(of_loss, student_logits, teacher_logits, inputs_C)
    diagnostics_C = _fill_masked(weights_C != 0, {**diagnostics_C, "loss": values_C}, 0)
    return weighted_sum(values_C, weights_C), diagnostics_C


def _check_mesh(arrays: Any) -> None:
    """Raises ValueError if the mesh in context has Explicit axes, or arrays are split over some."""
    explicit = {*jax.sharding.get_abstract_mesh().explicit_axes}
    for array in jax.tree.leaves(arrays):
        sharding = jax.typeof(array).sharding
        split = jax.tree.leaves(tuple(sharding.spec))  # names of axes
        explicit |= {*split} & {*sharding.mesh.explicit_axes}
    if explicit:
        raise ValueError(
            f"student is a Head, but the mesh has Explicit axes {sorted(explicit)}; expected Auto "
            "axes. Make the mesh with jax.make_mesh(shape, names, "
            "(jax.sharding.AxisType.Auto,) * len(names)), or call the function that computes the "
            "loss as jax.sharding.auto_axes(function, out_sharding=jax.P())(...) inside "
            "jax.set_mesh(mesh)."
        )


def _mesh_axes(partition: P | None, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Checks a partition against the mesh in context, and returns the mesh axes that it names.

    Args:
      partition: how [B, T] is split.
      shape: the sizes [B, T].

    Raises:
      ValueError: the mesh does not have a named axis, the axis is Manual, or a size is not
        divisible.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes: list[str] = []
    for size, names in zip(shape, partition or (), strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        parts = 1
        for name in names:
            if name not in mesh.shape:
                expected = (
                    f"expected one of the axes of the current mesh, {list(mesh.shape)}"
                    if mesh.shape
                    else "expected a mesh with this axis. Call the loss inside jax.set_mesh(mesh)"
                )
                raise ValueError(f"partition {partition} names the axis {name!r}; {expected}.")
            if name in mesh.manual_axes:
                raise ValueError(
                    f"partition {partition} names the axis {name!r}, over which a surrounding "
                    "jax.shard_map has split the rows already. Leave it out. In the loss of a "
                    "train step, use opsd_jax.parallel.mesh.rows_in_context()."
                )
            parts *= mesh.shape[name]
        if size % parts:
            raise ValueError(
                f"the hidden states have [rows, tokens] = {list(shape)}, but partition {partition} "
                f"splits an axis of size {size} over {parts} devices; expected a size divisible "
                f"by {parts}."
            )
        axes += names
    return tuple(axes)
