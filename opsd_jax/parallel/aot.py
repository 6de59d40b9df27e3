"""Ahead-of-time compilation: every program of a run is compiled here, and a plan looks on."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

from opsd_jax.parallel.program import ProgramKey

Compile = Callable[[ProgramKey, jax.stages.Lowered], Any]

_compile: contextvars.ContextVar[Compile | None] = contextvars.ContextVar("compile", default=None)


def compiled(key: ProgramKey, lowered: jax.stages.Lowered) -> Any:
    """Compiles a program; while planning, returns None if the program does not fit in memory."""
    plan = _compile.get()
    return lowered.compile() if plan is None else plan(key, lowered)


@contextlib.contextmanager
def planning(compile: Compile) -> Iterator[None]:
    """Within it programs are made as for TPUs, though there may be none, and compiled by `compile`,
    which is given the key of each.
    """
    token = _compile.set(compile)
    try:
        yield
    finally:
        _compile.reset(token)


def is_planned() -> bool:
    """Whether programs are made to be looked at."""
    return _compile.get() is not None


def on_tpu() -> bool:
    """Whether programs are made for TPUs."""
    return is_planned() or jax.default_backend() == "tpu"
