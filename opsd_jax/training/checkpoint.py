"""Checkpoints of a stage's state, with Orbax: asynchronous, and complete or not there at all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from jax.errors import JaxRuntimeError

from opsd_jax.options import option
from opsd_jax.parallel import hosts
from opsd_jax.parallel.watchdog import waiting
from opsd_jax.policy import Params
from opsd_jax.storage import files
from opsd_jax.storage.files import Path, RecordError, written
from opsd_jax.training.state import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """The section `checkpoints` of the config: which checkpoints of a stage to keep."""

    last: int = option(2, "Number of newest checkpoints to keep.", at_least=1)
    period: int = option(
        0, "Also keep checkpoints at steps that are multiples of this; 0 for none.", at_least=0
    )
    best: str = option(
        "",
        "Also keep the checkpoint with the largest value of this metric, such as 'reward', or with "
        "the smallest of '-length'; '' for none.",
    )


LAST_TWO = CheckpointOptions()


class Checkpoints:
    """The checkpoints of one stage, `directory/<step>/`.

    A save is written beside its place and moved there when it is whole, so a half-written one is
    never seen. A context manager; leaving it waits for the save under way.
    """

    def __init__(
        self,
        directory: Path,
        about: Mapping[str, Any] | None = None,
        keep: CheckpointOptions = LAST_TWO,
    ):
        """`about`: what a state belongs to, such as the config, JSON-ready; it is written down with
        each, and one of another kind is refused.
        """
        self._about, self._best = files.to_json(about or {}), keep.best.removeprefix("-")
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep.last)]
        if keep.period:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep.period))
        best_fn = (lambda metrics: metrics[self._best]) if keep.best else None
        if best_fn:
            policies.append(
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=best_fn,
                    reverse=keep.best.startswith("-"),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            files.absolute(directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=best_fn,
                create=True,
            ),
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint: how many steps it has behind it."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, metrics: Mapping[str, float] | None = None) -> None:
        """Saves in the background; returns when the arrays have been copied. Once a step.

        Args:
          step: how many steps the state has behind it, and rows the metrics.
          state: of the stage.
          metrics: of the last of them.

        Raises:
          RecordError: this save or the one before it cannot be written.
        """
        if step == self.latest:
            return
        value = (metrics or {}).get(self._best)
        with waiting("a checkpoint"), written(self._manager.directory):
            self._manager.save(
                step,
                args=ocp.args.StandardSave(state),
                metrics=None if value is None else {self._best: value},
                custom_metadata={"about": self._about, "metrics": step},
            )

    def restore(self, abstract: State) -> tuple[int, State | None]:
        """The newest state that can be read, on the shardings of `abstract`, and its step; 0 and
        None where there is no checkpoint. Newer ones that are damaged are moved to `damaged/`,
        beside the directory, and named on standard error.

        Raises:
          RecordError: none can be read, one belongs to something else, or one that may be whole
            cannot be read now; names the directory.
        """
        directory = self._manager.directory
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[tuple[int, RecordError]] = []
        for step in steps:
            path = directory / str(step)

            def read(step: int = step, path: Path = path) -> State:
                with explained(path, "the stage starts anew without it"):
                    self._check_about(step, path)
                    return _read(path / "default", abstract)

            try:
                state = hosts.together(read)
            except Damaged as error:
                damaged.append((step, error))
                continue
            for number, why in damaged:
                hosts.from_first(functools.partial(_set_aside, directory, number, why))
            if damaged:
                self._manager.reload()
            return step, state
        if damaged:
            raise damaged[0][1]
        return 0, None

    def _check_about(self, step: int, path: Path) -> None:
        """Raises Foreign if a checkpoint belongs to something else."""
        written = self._manager.metadata(step).custom_metadata
        if not written:
            raise ValueError("it does not say what it belongs to")
        there = json.loads(written["about"])
        now = json.loads(self._about)
        different = sorted(n for n in there.keys() | now.keys() if there.get(n) != now.get(n))
        if different:
            listed = "\n".join(
                f"  {n}: {there.get(n, 'absent')!r} there, {now.get(n, 'absent')!r} now"
                for n in different
            )
            raise Foreign(f"{path} is a checkpoint of another run:\n{listed}")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: Any, *traceback: Any) -> None:
        if hosts.is_loss(error):
            return  # a save would wait for the lost host to have written
        with written(self._manager.directory):
            self._manager.close()


class Foreign(RecordError):
    """A checkpoint is of another model or config."""


class Damaged(RecordError):
    """What is saved is not whole."""


# What is said of a store that does not answer, or not to this machine.
_NOT_NOW = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
)


def _is_damage(error: Exception) -> bool:
    """Whether what cannot be read is not whole, rather than out of reach."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError)
    elsewhere = isinstance(error, MemoryError | JaxRuntimeError) or files.is_of_bucket(error)
    return not elsewhere and not any(word in str(error) for word in _NOT_NOW)


def _read(path: Path, abstract: Any) -> Any:
    """What Orbax saved there. Its own `restore` waits for all hosts in the middle, and for ever if
    one of them cannot read its part.
    """
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.restore(epath.Path(path), args=ocp.args.StandardRestore(abstract))


def _set_aside(directory: Path, step: int, error: RecordError) -> None:
    """Moves a damaged checkpoint out of the way, and says so."""
    aside = directory.parent / "damaged"
    aside.mkdir(exist_ok=True)
    place = next(p for i in itertools.count() if not (p := aside / f"{step}.{i}").exists())
    reason = str(error).split(". If it is damaged")[0]
    # In a bucket this makes the directory, too.
    (aside / f"{place.name}.txt").write_text(f"{reason}\n")
    (directory / str(step)).rename(place)
    print(f"opsd-jax: {reason}. It is in {place} now; an older one is used.", file=sys.stderr)


@contextlib.contextmanager
def explained(path: Path, then: str) -> Iterator[None]:
    """Turns whatever Orbax, tensorstore or the file system raise within into a RecordError, and
    into Damaged where what is there is not whole.

    Args:
      path: what is being restored.
      then: what happens when it has been deleted.
    """
    try:
        yield
    except RecordError:
        raise
    except Exception as error:
        if hosts.is_loss(error):
            raise
        raise (Damaged if _is_damage(error) else RecordError)(
            f"{path} cannot be restored ({files.reason(error)}). If it is damaged, delete that "
            f"directory: {then}."
        ) from error


def save_params(path: Path, params: Params) -> None:
    """Keeps parameters, the result of a stage, at `path`.

    Raises:
      RecordError: they cannot be written.
    """
    with written(path), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(files.absolute(path), params, force=True)


def has_params(path: Path) -> bool:
    """Whether `save_params` has ended there: in a bucket its files come one by one."""
    return path.exists() and bool(ocp.utils.is_checkpoint_finalized(files.absolute(path)))


def restore_params(path: Path, abstract: Params) -> Params:
    """What `save_params` saved, on the shardings of `abstract`.

    Raises:
      RecordError: it cannot be read; names the directory.
    """
    then = "it is made again from the stage's last checkpoint"

    def read() -> Params:
        with explained(path, then):
            return _read(files.absolute(path), abstract)

    return hosts.together(read)
