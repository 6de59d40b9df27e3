"""Any loss of logits, from hidden states, without the logits of more than one chunk of tokens.

At a vocabulary of 151,936 the float32 logits of 8,192 tokens take 5 GB, and a divergence with its
gradient wants several such arrays. Here a loss that is written on logits runs over chunks of tokens
instead. When it is differentiated, the gradients of a chunk are made in the pass that makes its
loss, while its logits are there: the head is multiplied once, and what stays is the gradient of the
head, summed in float32, and those of the hidden states. That can be because each token's loss
enters the sum with a weight that is known beforehand.

Tokens of weight 0 (padding, rows behind the gate) are not computed at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec as P

from opsd_jax.losses.checks import check_mask
from opsd_jax.losses.reduction import weighted_sum

LOSS_CHUNKS = "loss_chunks"  # named scope of the loop over chunks of tokens


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "hidden"], meta_fields=["unembed"]
)
@dataclasses.dataclass(frozen=True)
class Head:
    """Logits not computed yet, `unembed(params, hidden)`; stands where a loss takes logits.

    Attributes:
      unembed: `(params, hidden [n, D]) -> logits [n, V]`, each token by itself. It may scale,
        soft-cap, add a bias or use the transposed embedding: it is run, and differentiated, as it
        is. Let its product come out in float32 (`preferred_element_type`). It may close over
        constants, but over nothing that is differentiated: that goes through `params`.
      params: a pytree of arrays, of float32 or bfloat16 where they are trained; those that
        `unembed` does not read (give it the whole model's) cost nothing.
      hidden: [B, T, D], after the final norm.
    """

    unembed: Callable[[Any, jax.Array], jax.Array]
    params: Any
    hidden: jax.Array


Scores = jax.Array | Head  # logits [B, T, V], or what they are computed from

# (student logits [..., V], teacher logits [..., V] or None, inputs [..., ...])
#   -> (float32 values [...], diagnostics, arrays [...] in a dict, nested or not): token by token
TokenLoss = Callable[[jax.Array, Any, Any], tuple[jax.Array, dict[str, Any]]]


def weighted_loss(
    loss: TokenLoss,
    weights: jax.Array,
    inputs: Any = (),
    *,
    student: Scores,
    teacher: Scores | None = None,
    chunk: int | None = None,
    partition: P | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """sum_t weights_t loss_t, and what the loss says of each token.

    Gradients flow into the student alone, in reverse mode: into its logits, or its `params` and
    `hidden`. Logits and heads give equal values and gradients, to float32 rounding.

    Under a mesh, `partition` says how the tokens lie on it. Each device then runs the loop over its
    own, with the head's gradient summed in place and reduced once, after the loop; the head is
    gathered over the mesh axes of `partition` before it, and stays split over others (its
    vocabulary over "tensor", say). Without it, the partitioner may put a collective of the head's
    size into every chunk.

    Args:
      loss: written on logits, which come in float32; see `TokenLoss`.
      weights: [B, T]. Where 0, neither scores nor inputs are looked at, NaN and infinity included.
      inputs: a pytree of arrays [B, T, ...] for `loss`.
      student: logits [B, T, V] or a `Head`.
      teacher: the same, over the same vocabulary.
      chunk: of heads, tokens at once on a device. None or 0 takes half the width of the hidden
        states, but from 128 to 512, or more where the vocabulary is small (2^24 logits).
      partition: of heads, how [B, T] lies on the mesh in context (`jax.set_mesh`), whose axes must
        be Auto: `PartitionSpec(("data", "fsdp"))` for rows over two axes.

    Returns:
      `(sum, diagnostics)`: a float32 scalar, and [B, T] for each diagnostic of `loss` and its
      values as "loss"; all 0 where the weight is.

    Raises:
      ValueError: shapes or vocabularies differ, or `partition` does not go with the mesh.
    """
    weights, inputs, teacher = jax.lax.stop_gradient((jnp.asarray(weights), inputs, teacher))
    _check(weights, inputs, student, teacher)
    if not isinstance(student, Head) or not weights.size:
        live = weights != 0
        values, said = where_live(loss, live, _logits(student), _logits(teacher), inputs)
        return weighted_sum(values, weights), jax.lax.stop_gradient(said)

    trained, fixed, loop = _loop(loss, student, teacher, inputs, chunk, partition)

    @jax.custom_vjp
    def run(trained, fixed, weights):
        return loop(trained, fixed, weights, differentiated=False)[0]

    def forward(trained, fixed, weights):
        return loop(trained, fixed, weights, differentiated=True)

    def backward(gradients, cotangents):
        scaled = jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)
        return scaled, None, None

    run.defvjp(forward, backward)
    total, said = run(trained, fixed, weights)
    return total, jax.lax.stop_gradient(said)


def token_values(
    loss: TokenLoss,
    mask: jax.Array,
    inputs: Any = (),
    *,
    student: Scores,
    teacher: Scores | None = None,
    chunk: int | None = None,
    partition: P | None = None,
) -> jax.Array:
    """loss_t of each token of `mask`, 0 elsewhere: for objectives that are no weighted sum of them.

    As `weighted_loss`, but any function of the values may be differentiated. The chunks are then
    computed a second time in the backward pass; `weighted_loss` computes them once.

    Args:
      mask: bool [B, T].
      loss, inputs, student, teacher, chunk, partition: as in `weighted_loss`.

    Returns:
      float32 [B, T].
    """
    inputs, teacher = jax.lax.stop_gradient((inputs, teacher))
    live = check_mask(mask)
    _check(live, inputs, student, teacher)
    if not isinstance(student, Head) or not live.size:
        return where_live(loss, live, _logits(student), _logits(teacher), inputs)[0]

    trained, fixed, loop = _loop(loss, student, teacher, inputs, chunk, partition)

    @jax.custom_vjp
    def run(trained, fixed, live):
        (_, said), _ = loop(trained, fixed, live.astype(jnp.float32), differentiated=False)
        return said["loss"]

    def forward(trained, fixed, live):
        return run(trained, fixed, live), (trained, fixed, live)

    def backward(arguments, cotangent):
        trained, fixed, live = arguments
        _, gradients = loop(trained, fixed, jnp.where(live, cotangent, 0.0), differentiated=True)
        return gradients, None, None

    run.defvjp(forward, backward)
    return run(trained, fixed, live)


def where_live(loss: TokenLoss, live: jax.Array, student_logits, teacher_logits, inputs):
    """The loss of the live tokens, with 0 for whatever stands at others, on the way in and out.

    On the way in too, for the gradients' sake: 0 * NaN is NaN.
    """
    values, said = loss(*_filled(live, (student_logits, teacher_logits, inputs), 0))
    return _filled(live, (values, {**said, "loss": values}), 0)


def _filled(live: jax.Array, tree: Any, value: int) -> Any:
    """Arrays [..., ...] with `value` where `live` [...] is false."""

    def filled(x):
        x = jnp.asarray(x)
        there = live.reshape(live.shape + (1,) * (x.ndim - live.ndim))
        return jnp.where(there, x, jnp.array(value, x.dtype))

    return jax.tree.map(filled, tree)


def _logits(scores: Any) -> Any:
    """Logits in float32; of no teacher, None."""
    if isinstance(scores, Head):
        hidden = jnp.asarray(scores.hidden)
        logits = scores.unembed(scores.params, hidden.reshape(-1, hidden.shape[-1]))
        scores = logits.reshape(*hidden.shape[:-1], logits.shape[-1])
    return scores if scores is None else jnp.asarray(scores).astype(jnp.float32)


def _loop(loss, student: Head, teacher: Scores | None, inputs, chunk: int | None, partition):
    """The loop over chunks, and its arguments.

    Returns:
      `(trained, fixed, run)`, where `run(trained, fixed, weights, differentiated)` returns
      `((sum, diagnostics), gradients of trained, or None)`. Both `trained` and `fixed` are pairs of
      parameters, which a device holds whole, and arrays of tokens, of which it holds its part.
    """
    student_logits, head, student_fixed = _trimmed(student)
    teacher_params: Any = ()
    teacher_logits, teacher_tokens = (lambda params, x: _logits(x)), teacher
    if isinstance(teacher, Head):
        unembed, *teacher_params = _trimmed(teacher)
        teacher_logits, teacher_tokens = (lambda params, x: unembed(*params, x)), teacher.hidden
    trained = head, student.hidden
    fixed = (student_fixed, teacher_params), (teacher_tokens, inputs)

    if chunk is not None and (not isinstance(chunk, int) or chunk < 0):
        raise ValueError(f"chunk is {chunk!r}; expected a number of tokens, or None or 0.")
    varying = getattr(getattr(jax.typeof(student.hidden), "mat", None), "varying", ())
    if varying:
        raise ValueError(
            "a Head inside a shard_map that checks replication; expected `partition` in place of "
            "the shard_map, or check_vma=False and gradients that you reduce yourself."
        )
    vocab_size, width = _vocabulary("student", student), student.hidden.shape[-1]
    most = chunk_tokens(chunk, width, vocab_size)
    axes = _axes(partition, jnp.shape(student.hidden)[:2])

    def run(trained, fixed, weights, differentiated):
        body = functools.partial(on_device, differentiated=differentiated)
        if not axes:
            return body(trained, fixed, weights)

        # The gradient of the head comes as what each device found, and is summed out here: where
        # its parameters are cut, the partitioner leaves each device its piece of the sum.
        gradients = (P(axes), partition) if differentiated else None
        value, found = jax.shard_map(
            body,
            in_specs=((P(), partition), (P(), partition), partition),
            out_specs=((P(), partition), gradients),
            axis_names=set(axes),
            check_vma=False,
        )(trained, fixed, weights)
        if not differentiated:
            return value, None
        of_head, of_hidden = found
        of_head = jax.tree.map(lambda g, x: g.sum(0).astype(x.dtype), of_head, trained[0])
        # Summed before anything goes on with the hidden states: what each device found is as large
        # as the head, and would stay beside all of the backward pass.
        return value, jax.lax.optimization_barrier((of_head, of_hidden))

    def on_device(trained, fixed, weights, differentiated):
        """The loop over the tokens that one device has."""
        shape, n = weights.shape, weights.size
        size = min(most, n)
        steps = -(-n // size)
        (head, hidden), (params, tokens) = trained, fixed
        flat = lambda x: jnp.asarray(x).reshape(n, *jnp.shape(x)[2:])
        hidden, weights, tokens = jax.tree.map(flat, (hidden, weights, tokens))

        # The live tokens first; after the last, indices past the end: of weight 0, not written to.
        order = jnp.concatenate([jnp.argsort(weights == 0), jnp.arange(n, steps * size)])
        live = jnp.sum(weights != 0)
        live_steps = -(-live // size)
        if axes:  # the same for all: `unembed` may be split over other axes of the mesh
            live_steps = jax.lax.pmax(live_steps, axes)

        def chunk_loss(head, hidden, weights, tokens):
            teacher, inputs = tokens
            student = student_logits(head, params[0], hidden)
            values, said = loss(student, teacher_logits(params[1], teacher), inputs)
            said = _filled(weights != 0, {**said, "loss": values}, 0)
            return weighted_sum(values, weights), said

        def step(i, carry):
            total, said, gradients = carry
            at = jax.lax.dynamic_slice(order, (i * size,), (size,))
            write = lambda out, x: out.at[at].set(x, mode="drop", unique_indices=True)
            weights_c = weights.at[at].get(mode="fill", fill_value=0)
            # A live token stands in for dead ones, with a weight of 0: its loss is defined, and so
            # are its gradients, whatever `unembed` and `loss` do. Where all are dead, ones do.
            stand_in = jnp.where(weights_c != 0, at, order[0])
            present = jnp.broadcast_to(live > 0, at.shape)
            hidden_c, tokens_c = _filled(
                present,
                jax.tree.map(lambda x: x.at[stand_in].get(mode="clip"), (hidden, tokens)),
                1,
            )
            if differentiated:
                (value, said_c), (of_head, of_hidden) = jax.value_and_grad(
                    chunk_loss, argnums=(0, 1), has_aux=True
                )(head, hidden_c, weights_c, tokens_c)
                add = lambda total, g: total + g.astype(jnp.float32)
                of_head = jax.tree.map(add, gradients[0], of_head)
                gradients = of_head, write(gradients[1], of_hidden)
            else:
                value, said_c = chunk_loss(head, hidden_c, weights_c, tokens_c)
            return total + value, jax.tree.map(write, said, said_c), gradients

        first = jax.tree.map(lambda x: x[:size], (hidden, weights, tokens))
        _, said = jax.eval_shape(chunk_loss, head, *first)
        gradients = None
        if differentiated:
            float32 = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
            gradients = float32, jnp.zeros_like(hidden)
        said = jax.tree.map(lambda x: jnp.zeros((n, *x.shape[1:]), x.dtype), said)
        with jax.named_scope(LOSS_CHUNKS):
            carry = jnp.zeros((), jnp.float32), said, gradients
            total, said, gradients = jax.lax.fori_loop(0, live_steps, step, carry)

        whole = lambda x: x.reshape(*shape, *x.shape[1:])
        if differentiated:
            of_head, of_hidden = gradients
            of_head = jax.tree.map(
                (lambda g, x: g[None]) if axes else (lambda g, x: g.astype(x.dtype)), of_head, head
            )
            gradients = of_head, whole(of_hidden)
        total = jax.lax.psum(total, axes) if axes else total
        return (total, jax.tree.map(whole, said)), gradients

    return trained, fixed, run


def _trimmed(head: Head):
    """The head and the leaves that it reads: `(unembed(trained, fixed, hidden), trained, fixed)`.

    `trained` are those of floating point. Where others stood `unembed` gets zeros, which XLA drops:
    the rest of the model must not be gathered, nor have a gradient of zeros carried in the loop.
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, head.params))

    def unembed(leaves, hidden):
        params = jax.tree.unflatten(tree, leaves)
        return head.unembed(params, hidden).astype(jnp.float32)

    hidden = jax.ShapeDtypeStruct((1, head.hidden.shape[-1]), head.hidden.dtype)
    program = jax.make_jaxpr(unembed)(leaves, hidden)
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True])
    read = {i: x for i, x in enumerate(leaves) if used[i]}
    trained = {i: x for i, x in read.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    fixed = {i: x for i, x in read.items() if i not in trained}
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]

    def of_leaves_read(trained, fixed, hidden):
        given = trained | fixed
        zeros = lambda x: jnp.zeros(x.shape, x.dtype)
        return unembed([given[i] if i in given else zeros(x) for i, x in enumerate(shapes)], hidden)

    return of_leaves_read, trained, fixed


def chunk_tokens(chunk: int | None, width: int, vocab_size: int) -> int:
    """The tokens of a chunk, of hidden states of this width (see `weighted_loss`)."""
    return chunk or max(128, min(width // 2, 512), 2**24 // vocab_size)


def _axes(partition: P | None, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The mesh axes of a partition of [B, T], once it is known to go with the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = list(mesh.explicit_axes)
    if explicit:
        raise ValueError(
            f"the mesh in context has Explicit axes {explicit}; expected Auto ones, as of "
            "jax.make_mesh(shape, names, (jax.sharding.AxisType.Auto,) * len(names))."
        )
    axes: list[str] = []
    for size, names in zip(shape, partition or (), strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        parts = 1
        for name in names:
            if name not in mesh.shape:
                raise ValueError(
                    f"partition {partition} names the axis {name!r}; the mesh in context has "
                    f"{list(mesh.shape) or 'none (see jax.set_mesh)'}."
                )
            parts *= mesh.shape[name]
        if size % parts:
            raise ValueError(
                f"hidden has [rows, tokens] {list(shape)}, of which partition {partition} splits "
                f"{size} over {parts} devices; expected a multiple."
            )
        axes += names
    return tuple(axes)


def _check(weights, inputs, student, teacher) -> None:
    """Raises ValueError for what does not fit together, by name, shape and expectation."""
    if jnp.ndim(weights) != 2:
        raise ValueError(f"weights has shape {list(jnp.shape(weights))}; expected [rows, tokens].")
    scores = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    words = {name: _vocabulary(name, each) for name, each in scores.items()}
    arrays = {
        f"inputs{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(inputs)
    } | {
        f"{name}.hidden" if isinstance(each, Head) else name: _array(each)
        for name, each in scores.items()
    }
    for name, array in arrays.items():
        if jnp.shape(array)[:2] != weights.shape:
            raise ValueError(
                f"{name} has shape {list(jnp.shape(array))}; expected [rows, tokens] "
                f"{list(weights.shape)} first, as mask or weights have them."
            )
    if len(set(words.values())) > 1:
        raise ValueError(
            f"student and teacher have {words['student']} and {words['teacher']} words; expected "
            "one vocabulary. Where one is padded to more words, pad the other with -inf."
        )


def _array(scores: Scores) -> jax.Array:
    return scores.hidden if isinstance(scores, Head) else scores


def _vocabulary(name: str, scores: Scores) -> int:
    """V, of scores of rank 3."""
    array = _array(scores)
    if jnp.ndim(array) != 3:
        raise ValueError(
            f"{name} has shape {list(jnp.shape(array))}; expected logits [rows, tokens, V], or a "
            "Head with hidden states [rows, tokens, D]."
        )
    if not isinstance(scores, Head):
        return array.shape[-1]
    hidden = jax.ShapeDtypeStruct((1, array.shape[-1]), array.dtype)
    logits = jax.eval_shape(scores.unembed, scores.params, hidden)
    if logits.ndim != 2 or logits.shape[0] != 1:
        raise ValueError(
            f"{name}.unembed maps hidden states {list(hidden.shape)} to {list(logits.shape)}; "
            "expected logits [1, V]."
        )
    return logits.shape[-1]
