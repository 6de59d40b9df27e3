"""`Head`: logits that are computed from hidden states only when a loss needs them.

Shape suffixes: B rows, T tokens of a row, D width of the hidden states, V vocabulary size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from opsd_jax.losses.checks import is_known


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "hidden"], meta_fields=["unembed"]
)
@dataclasses.dataclass(frozen=True)
class Head:
    """Hidden states and the function that maps them to logits.

    Every loss accepts a `Head` in place of logits. It then computes the logits of one chunk of
    tokens at a time, and never an array [B, T, V].

    Attributes:
      unembed: `(params, hidden [n, D]) -> logits [n, V]`, for each token on its own. It may scale,
        soft-cap, add a bias or use the transposed embedding. Accumulate its matmul in float32
        (`preferred_element_type=jnp.float32`). It may close over constants. Arrays that need
        gradients must be in `params`.
      params: a pytree of arrays, float32 or bfloat16 where they are trained. It may be the
        parameters of the whole model: arrays that `unembed` does not read cost nothing.
      hidden: hidden states [B, T, D] after the final norm.
    """

    unembed: Callable[[Any, jax.Array], jax.Array]
    params: Any
    hidden: jax.Array


LogitsOrHead = jax.Array | Head  # logits [B, T, V], or the Head that computes them


def logits_of(source: LogitsOrHead | None) -> jax.Array | None:
    """Returns the logits of `source` as float32 [B, T, V], or None if `source` is None."""
    if source is None:
        return None
    if isinstance(source, Head):
        hidden_BxTxD = jnp.asarray(source.hidden)
        logits = source.unembed(source.params, hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1]))
        source = logits.reshape(*hidden_BxTxD.shape[:-1], logits.shape[-1])
    return jnp.asarray(source).astype(jnp.float32)


def trim(head: Head) -> tuple[Callable[..., jax.Array], dict[int, jax.Array], dict[int, jax.Array]]:
    """Selects the parameters that a head reads, and drops the model's other parameters.

    A loss that carried all parameters through its loop would gather the whole model on every device
    and carry gradients of zeros for it.

    Returns:
      `(unembed, trained, fixed)`. `trained` has the arrays of floating point that the head reads,
      and `fixed` the other arrays that it reads, both by index. `unembed(trained, fixed, hidden)`
      returns float32 logits.
    """
    unembed, arrays = _split(head)
    program = jax.make_jaxpr(unembed)(arrays, _one_token(head))
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True])
    read = {i: x for (i, x), is_used in zip(arrays.items(), used, strict=False) if is_used}
    trained = {i: x for i, x in read.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    fixed = {i: x for i, x in read.items() if i not in trained}
    shapes = {i: jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in arrays.items()}

    def unembed_read(trained, fixed, hidden):
        # Zeros take the place of an array that is not read; XLA drops them.
        zeros = {i: jnp.zeros(x.shape, x.dtype) for i, x in shapes.items() if i not in read}
        return unembed(zeros | trained | fixed, hidden).astype(jnp.float32)

    return unembed_read, trained, fixed


def stop_gradient(tree: Any) -> Any:
    """Like `jax.lax.stop_gradient`, for pytrees that may have other leaves than arrays."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if _is_array(x) else x, tree)


def _is_array(leaf: Any) -> bool:
    """Returns whether a leaf is an array of numbers. Python numbers are not: they may be flags."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSU"  # objects and strings
    return isinstance(leaf, jax.Array)


def hoist(
    function: Callable[..., Any], *arguments: Any
) -> tuple[Callable[..., Any], dict[int, jax.Array]]:
    """Makes the traced arrays that a function closes over an argument of the function.

    A function with a `custom_vjp` cannot close over them.

    Args:
      function: a function of pytrees of arrays.
      *arguments: its arguments, or their shapes and dtypes.

    Returns:
      `(hoisted, constants)`, so that `hoisted(constants, *arguments)` is `function(*arguments)`.
      The constants are the traced arrays, by index. If there are any, `hoisted` only accepts
      arguments of the given shapes.
    """
    program, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    constants = {i: x for i, x in enumerate(program.consts) if not is_known(x)}
    if not constants:
        return lambda _, *arguments: function(*arguments), {}

    def hoisted(constants, *arguments):
        given = [constants.get(i, x) for i, x in enumerate(program.consts)]
        values = jax.core.eval_jaxpr(program.jaxpr, given, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), values)

    return hoisted, constants


def _split(head: Head) -> tuple[Callable[..., jax.Array], dict[int, jax.Array]]:
    """Separates the arrays in `head.params` from other leaves, such as an activation function.

    Returns:
      `(unembed, arrays)`: the arrays by index, and `unembed(arrays, hidden) -> logits`.
    """
    leaves, tree = jax.tree.flatten(head.params)
    arrays = {i: jnp.asarray(x) for i, x in enumerate(leaves) if _is_array(x)}
    others = [None if i in arrays else x for i, x in enumerate(leaves)]

    def unembed(arrays, hidden):
        given = [arrays.get(i, x) for i, x in enumerate(others)]
        return head.unembed(jax.tree.unflatten(tree, given), hidden)

    return unembed, arrays


def _one_token(head: Head) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of the hidden states of one token, [1, D]."""
    return jax.ShapeDtypeStruct((1, head.hidden.shape[-1]), head.hidden.dtype)


def check_sources(weights_BxT, inputs, student: LogitsOrHead, teacher: LogitsOrHead | None) -> None:
    """Raises ValueError if the shapes or vocabulary sizes of the arguments do not match.

    Args:
      weights_BxT: the array that sets the rows and tokens.
      inputs: a pytree of arrays [B, T, ...].
      student, teacher: logits or heads; the teacher may be None.
    """
    if jnp.ndim(weights_BxT) != 2:
        raise ValueError(
            f"weights has shape {list(jnp.shape(weights_BxT))}; expected [rows, tokens]."
        )
    sources = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    sizes = {name: vocabulary_size(name, source) for name, source in sources.items()}
    arrays = {
        f"inputs{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(inputs)
    } | {
        f"{name}.hidden" if isinstance(source, Head) else name: _array(source)
        for name, source in sources.items()
    }
    for name, array in arrays.items():
        if jnp.shape(array)[:2] != weights_BxT.shape:
            raise ValueError(
                f"{name} has shape {list(jnp.shape(array))}; expected {list(weights_BxT.shape)} as "
                "its first two axes [rows, tokens], the shape of mask or weights."
            )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"student has a vocabulary of {sizes['student']} entries, and teacher has "
            f"{sizes['teacher']}; expected the same number. If one vocabulary is padded, pad the "
            "other logits with -inf."
        )


def _array(source: LogitsOrHead) -> jax.Array:
    return source.hidden if isinstance(source, Head) else source


def vocabulary_size(name: str, source: LogitsOrHead) -> int:
    """Returns the vocabulary size of logits or of a `Head`.

    Args:
      name: the argument's name, for errors.
      source: logits or a head.

    Raises:
      ValueError: the logits or hidden states are not of rank 3, or `unembed` does not return
        [n, V].
    """
    array = _array(source)
    what = f"{name}.hidden" if isinstance(source, Head) else name
    if not hasattr(array, "shape"):
        raise ValueError(
            f"{what} is a {type(array).__name__}; expected an array: logits [rows, tokens, V], or "
            "the hidden states of a Head. If the model returns a tuple, such as (logits, cache), "
            "pass only its first element."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{what} has dtype {array.dtype}; expected floating point.")
    if jnp.ndim(array) != 3:
        raise ValueError(
            f"{name} has shape {list(jnp.shape(array))}; expected logits [rows, tokens, V], or a "
            "Head with hidden states [rows, tokens, D]."
        )
    if not isinstance(source, Head):
        return array.shape[-1]
    hidden = _one_token(source)
    unembed, arrays = _split(source)
    given = f"{name}.unembed, for hidden states of shape {list(hidden.shape)},"
    try:
        logits = jax.eval_shape(unembed, arrays, hidden)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"{given} raises {type(error).__name__} ({reason}); expected logits of shape [1, V]. "
            "If the function takes hidden states [rows, tokens, D], add an axis: "
            "lambda params, hidden: function(params, hidden[None])[0]."
        ) from error
    if not hasattr(logits, "shape"):
        raise ValueError(
            f"{given} returns a {type(logits).__name__}; expected only the logits, [1, V]."
        )
    if logits.ndim != 2 or logits.shape[0] != 1:
        raise ValueError(
            f"{name}.unembed maps hidden states of shape {list(hidden.shape)} to shape "
            f"{list(logits.shape)}; expected logits of shape [1, V]."
        )
    return logits.shape[-1]
