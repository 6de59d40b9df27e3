"""Compiles all programs of a run ahead of time, or passes them to `opsd-jax plan`.

The rollout engine, the train step and the other parts of a run don't leave compilation to the first
call of a jitted function. They lower each of their programs when they are created, and pass it to
`compiled`. There are two reasons:

1. Compilation happens once, at a known time. A compiled program refuses arguments of other shapes,
   so a change of shape is an error and never a silent recompilation in the middle of a run.
2. `opsd-jax plan` can run the same code for a TPU that is not attached, on a machine with only a
   CPU. Within `planning`, `compiled` passes each program to the plan, which compiles it for the TPU
   and reads off its memory, operations and collectives. The plan therefore contains what a run
   compiles.

A program that is compiled in any other way is missing from the plan. Within `loading`, programs
that were compiled before are read instead.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

from opsd_jax.parallel.program import ProgramKey
from opsd_jax.parallel.watchdog import Wait, waiting

Compile = Callable[[ProgramKey, jax.stages.Lowered], Any]

_load: contextvars.ContextVar[Compile | None] = contextvars.ContextVar("load", default=None)
_compile: contextvars.ContextVar[Compile | None] = contextvars.ContextVar("compile", default=None)


def compiled(key: ProgramKey, lowered: jax.stages.Lowered) -> Any:
    """Compiles a lowered program, reads it, or, within `planning`, passes it to the plan.

    Args:
      key: which program it is.
      lowered: the program, from `jax.jit(function).lower(*abstract_arguments)`.

    Returns:
      The `jax.stages.Compiled` program. Within `planning`, the result of the plan's function: the
      program, which can't be executed here, or None if it doesn't fit into the memory.
    """
    if (plan := _compile.get()) is not None:
        return plan(key, lowered)
    load = _load.get()
    with waiting(Wait.COMPILING):
        return (load and load(key, lowered)) or lowered.compile()


@contextlib.contextmanager
def loading(load: Compile) -> Iterator[None]:
    """Context manager in which programs are loaded where possible.

    Args:
      load: `(key, lowered) -> compiled`, or None for a program that has to be compiled.
    """
    token = _load.set(load)
    try:
        yield
    finally:
        _load.reset(token)


@contextlib.contextmanager
def planning(compile: Compile) -> Iterator[None]:
    """Context manager in which programs are compiled for TPUs and inspected, but never executed.

    In this context, `on_tpu` is True, so models choose their TPU kernels, and `compiled` calls the
    given function. The devices of the mesh are those of a topology
    (`jax.experimental.topologies`), so nothing can be executed and no array can be created on them.

    Args:
      compile: `(key, lowered) -> compiled or None`; see `compiled`.
    """
    token = _compile.set(compile)
    try:
        yield
    finally:
        _compile.reset(token)


def is_planned() -> bool:
    """Returns True within `planning`, where programs are compiled but never executed."""
    return _compile.get() is not None


def on_tpu() -> bool:
    """Returns True if programs are compiled for attached TPUs or for the TPUs of a plan."""
    return is_planned() or jax.default_backend() == "tpu"
