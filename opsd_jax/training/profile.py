"""Traces of a training step, for XProf and TensorBoard."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import jax

from opsd_jax.parallel.watchdog import Wait, waiting
from opsd_jax.storage.files import Path, copy_into

DIRECTORY = "profile"


@contextlib.contextmanager
def trace(directory: Path, step: int, wanted: int | None) -> Iterator[None]:
    """Context manager that writes a trace of what it contains, if `step` is the wanted one.

    The trace begins and ends with idle devices, so it has all of the step's work and no other.
    `xprof --logdir DIRECTORY` shows it, with the named scopes of the library. Every host writes
    its own file.

    Args:
      directory: the directory of the stage; the trace is written to `profile/` in it.
      step: number of the step.
      wanted: number of the step to trace; None for none.
    """
    if step != wanted:
        yield
        return
    with tempfile.TemporaryDirectory() as local:
        _wait_for_devices()
        jax.profiler.start_trace(local)
        try:
            yield
            _wait_for_devices()
        finally:
            jax.profiler.stop_trace()
            copy_into(pathlib.Path(local), directory / DIRECTORY)


def _wait_for_devices() -> None:
    """Waits until this host's devices have computed everything that was dispatched."""
    with waiting(Wait.TRAIN_STEP):
        jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])
