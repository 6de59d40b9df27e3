"""Ahead-of-time compilation: every program of a run is compiled here, and a plan looks on."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

Compile = Callable[[str, jax.stages.Lowered], Any]

_compile: contextvars.ContextVar[Compile | None] = contextvars.ContextVar("compile", default=None)


def compiled(name: str, lowered: jax.stages.Lowered) -> Any:
    """The program; `name` is what a plan calls it. In a plan, None if it does not fit."""
    plan = _compile.get()
    return lowered.compile() if plan is None else plan(name, lowered)


@contextlib.contextmanager
def planning(compile: Compile) -> Iterator[None]:
    """Within it programs are made as for TPUs, though there may be none, and compiled by `compile`,
    which is given the name of each.
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
