"""Checkpoints of a stage's state, with Orbax: asynchronous, and complete or not there at all."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp

from opsd_jax.parallel import hosts
from opsd_jax.policy import Params
from opsd_jax.training.files import RecordError
from opsd_jax.training.state import State


class Checkpoints:
    """The checkpoints of one stage, `directory/<step>/`; the last two are kept.

    A save is written beside its place and moved there when it is whole, so a half-written one is
    never seen. A context manager; leaving it waits for the save under way.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint: how many steps it has behind it."""
        return self._manager.latest_step()

    def save(self, step: int, state: State) -> None:
        """Saves in the background; returns when the arrays have been copied. Once a step."""
        if step != self.latest:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, abstract: State) -> State:
        """The newest state, on the shardings of `abstract`.

        Raises:
          RecordError: it cannot be read, or is not of these shapes; names the directory.
        """
        step = self.latest
        with explained(
            pathlib.Path(self._manager.directory) / str(step),
            "the run then goes on from the checkpoint before it, or starts the stage anew",
        ):
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        if not hosts.is_loss(kind):  # else a save would wait for the lost host to have written
            self._manager.close()


@contextlib.contextmanager
def explained(path: pathlib.Path, then: str) -> Iterator[None]:
    """Turns whatever Orbax, tensorstore or the file system raise within into a RecordError.

    Args:
      path: what is being restored.
      then: what happens when it has been deleted.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise RecordError(
            f"{path} cannot be restored ({type(error).__name__}: {reason}). If it is damaged, "
            f"delete that directory: {then}."
        ) from error


def save_params(path: pathlib.Path, params: Params) -> None:
    """Keeps parameters, the result of a stage, at `path`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params, force=True)


def restore_params(path: pathlib.Path, abstract: Params) -> Params:
    """What `save_params` saved, on the shardings of `abstract`.

    Raises:
      RecordError: it cannot be read; names the directory.
    """
    then = "it is made again from the stage's last checkpoint"
    with explained(path, then), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), abstract)
