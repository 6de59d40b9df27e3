"""Saves and restores a stage's training state with Orbax. Saves are asynchronous and atomic."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.errors import JaxRuntimeError

from opsd_jax.options import option
from opsd_jax.parallel import hosts
from opsd_jax.parallel.watchdog import Wait, waiting
from opsd_jax.policy import Params
from opsd_jax.storage import files
from opsd_jax.storage.files import Path, RecordError, writing
from opsd_jax.storage.foreign import listed
from opsd_jax.training.base_model import BaseModel
from opsd_jax.training.checksum import changed, checksums, paths
from opsd_jax.training.state import State

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """The options that select which checkpoints of a stage to keep."""

    last: int = option(2, "Number of newest checkpoints to keep.", at_least=1)
    period: int = option(
        0, "Also keep checkpoints at steps that are multiples of this; 0 for none.", at_least=0
    )
    best: str = option(
        "",
        "Also keep the checkpoint with the largest value of this metric, such as 'reward', or with "
        "the smallest of '-length'; '' for none.",
    )

    def policy(self) -> tuple[Any, Any]:
        """Returns Orbax's preservation policy, and the function that ranks checkpoints by `best`.

        The function is None if `best` is empty.
        """
        manager = ocp.checkpoint_managers
        policies: list[Any] = [manager.LatestN(self.last)]
        if self.period:
            policies.append(manager.EveryNSteps(self.period))
        if not self.best:
            return manager.AnyPreservationPolicy(policies), None
        rank = lambda metrics: metrics[self.best_metric]
        policies.append(
            manager.BestN(
                get_metric_fn=rank,
                reverse=self.best.startswith("-"),
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
        return manager.AnyPreservationPolicy(policies), rank

    @property
    def best_metric(self) -> str:
        """The name of the metric in `best`, without a minus sign; "" if `best` is empty."""
        return self.best.removeprefix("-")


DEFAULT_OPTIONS = CheckpointOptions()


class Checkpoints:
    """Saves and restores the checkpoints of one stage, in `directory/<step>/`.

    Orbax writes a checkpoint under a temporary name and renames it when it is complete, so a
    half-written checkpoint is never restored. A context manager: leaving it waits for the save in
    progress.
    """

    def __init__(
        self,
        directory: Path,
        identity: Mapping[str, Any] | None = None,
        options: CheckpointOptions = DEFAULT_OPTIONS,
        ancestors: Sequence[Mapping[str, Any]] = (),
        base: BaseModel | None = None,
    ):
        """Opens the checkpoint directory, and creates it if it is missing.

        Args:
          directory: the directory.
          identity: JSON-ready values that identify the run, such as its config. They are saved with
            each checkpoint, and `restore` refuses a checkpoint with other values.
          options: which checkpoints to keep.
          ancestors: identities of other runs whose checkpoints are accepted too.
          base: the base model of the adapter in the checkpoints; it is saved with each checkpoint,
            and `restore` refuses a checkpoint with an adapter of another model.
        """
        self._base = base
        self._ancestors = [json.loads(files.to_json(ancestor)) for ancestor in ancestors]
        self._identity, self._best_metric = files.to_json(identity or {}), options.best_metric
        preservation_policy, best_fn = options.policy()
        self._manager = ocp.CheckpointManager(
            files.absolute(directory),
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy, best_fn=best_fn, create=True
            ),
        )

    @property
    def latest(self) -> int | None:
        """The number of completed steps at the newest checkpoint; None if no checkpoint exists."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving a checkpoint, and returns once its arrays have been copied to the host.

        Does nothing if the newest checkpoint is of this step.

        Args:
          step: number of completed steps.
          state: the stage's state after them.
          metrics: the metrics of the last completed step.

        Raises:
          RecordError: this save, or the one before it, cannot be written.
        """
        if step == self.latest:
            return
        value = (metrics or {}).get(self._best_metric)
        about = {"about": self._identity, "metrics": step, "checksums": checksums(state)}
        if self._base is not None:
            about["base"] = self._base._asdict()
        # Orbax copies the arrays by implicit transfers.
        allowed = jax.transfer_guard("allow")
        with waiting(Wait.CHECKPOINT), writing(self._manager.directory), allowed:
            self._manager.save(
                step,
                args=ocp.args.StandardSave(state),
                metrics=None if value is None else {self._best_metric: value},
                custom_metadata=about,
            )

    def restore(self, abstract: State) -> tuple[int, State | None]:
        """Restores the newest intact checkpoint.

        Damaged checkpoints that are newer are moved to `damaged/`, next to the directory, and
        logged. A checkpoint is damaged if it cannot be read, or if its arrays do not have the
        checksums that were saved with them.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Returns:
          The number of completed steps, and the state; 0 and None if there is no checkpoint.

        Raises:
          RecordError: every checkpoint is damaged, one belongs to another run or has other arrays,
            or an intact one cannot be read at the moment. Names the directory.
        """
        directory = self._manager.directory
        damaged: list[tuple[int, Damaged]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, saved = hosts.together(functools.partial(self._read, step, abstract))
                _check_values(directory / str(step), saved, state, _RESTARTS)
            except Damaged as error:
                damaged.append((step, error))
                continue
            for number, cause in damaged:
                hosts.from_first(functools.partial(_set_aside, directory, number, cause))
            if damaged:
                self._manager.reload()
            return step, state
        if damaged:
            raise damaged[0][1]
        return 0, None

    def _read(self, step: int, abstract: State) -> tuple[State, dict[str, str]]:
        """Restores the training state from the checkpoint of `step`, with its saved checksums."""
        path = self._manager.directory / str(step)
        with _restoring(path, _RESTARTS):
            saved = self._check_identity(step, path)
            _check_arrays(path, saved, abstract)
            return _restore(path / "default", abstract), saved

    def _check_identity(self, step: int, path: Path) -> dict[str, str]:
        """Returns the checksums in a checkpoint. Raises Foreign if another run saved it.

        There are none in a checkpoint of version 0.1.0.
        """
        metadata = self._manager.metadata(step).custom_metadata
        if not metadata:
            raise ValueError("the checkpoint does not identify the run that saved it")
        saved, mine = json.loads(metadata["about"]), json.loads(self._identity)
        # Earlier versions also saved the config of stages that do not run.
        differing = lambda other: sorted(n for n in other if saved.get(n) != other[n])
        different = differing(mine)
        if different and all(map(differing, self._ancestors)):
            listed = "\n".join(
                f"  {n}: {saved.get(n, 'absent')!r} there, {mine[n]!r} now" for n in different
            )
            raise Foreign(
                f"{path} is a checkpoint of another run, with different values:\n{listed}\n"
                "Expected the checkpoint's values. Use them, or choose another --workdir."
            )
        if self._base is not None and "base" in metadata:
            self._base.check(metadata["base"], path)
        return metadata.get("checksums", {})

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: Any, *traceback: Any) -> None:
        if hosts.is_loss(error):
            return  # the save in progress waits for the lost host, without end
        with writing(self._manager.directory):
            self._manager.close()


class Foreign(RecordError):
    """A checkpoint was saved by another run, or with options that need other arrays."""


class Damaged(RecordError):
    """A checkpoint is incomplete or corrupt."""


# Parts of error messages of a storage service that is unavailable or refuses access at the moment.
_TEMPORARY = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
)
_IF_DAMAGED = " If it is damaged, delete that directory: "
_RESTARTS = "the stage then restarts without it"
_MADE_AGAIN = "it is then made again from the stage's last checkpoint"


def _is_damage(error: Exception) -> bool:
    """Returns whether an exception shows that a checkpoint is damaged, not just unavailable."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError)
    other = isinstance(error, MemoryError | JaxRuntimeError) or files.is_bucket_error(error)
    return not other and not any(text in str(error) for text in _TEMPORARY)


def _check_arrays(path: Path, saved: Mapping[str, str], abstract: State) -> None:
    """Raises Foreign if a checkpoint does not have the arrays of `abstract`.

    A fork can change options that decide which arrays there are.

    Args:
      path: the directory of the checkpoint.
      saved: its checksums; none in a checkpoint of version 0.1.0.
      abstract: the state to restore.
    """
    needed = set(paths(abstract))
    missing, unused = sorted(needed - saved.keys()), sorted(saved.keys() - needed)
    if not saved or not (missing or unused):
        return
    raise Foreign(
        f"{path} {'lacks' if missing else 'has'} {listed(missing or unused, count=2)}, which this "
        f"config {'needs' if missing else 'does not use'}. Expected the options, and the versions "
        "of optax and opsd_jax, with which it was saved: some decide which arrays there are, such "
        "as teacher.kind and a KL penalty of 0, and a fork cannot change these. A new run can "
        "begin with the result of a stage instead (config.init_from)."
    )


def _restore(path: Path, abstract: Any) -> Any:
    """Restores the arrays that Orbax saved in `path`, with the shardings of `abstract`.

    `CheckpointManager.restore` has a barrier in the middle, so if one host cannot read its part,
    the other hosts wait without end. The handler has no barrier.
    """
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.restore(epath.Path(path), args=ocp.args.StandardRestore(abstract))


def _set_aside(directory: Path, step: int, error: Damaged) -> None:
    """Moves a damaged checkpoint to `damaged/`, and writes the reason to a text file there."""
    aside = directory.parent / "damaged"
    aside.mkdir(exist_ok=True)
    place = next(p for i in itertools.count() if not (p := aside / f"{step}.{i}").exists())
    reason = str(error).partition(_IF_DAMAGED)[0]
    # This file comes first: in a bucket, it is what creates the directory.
    (aside / f"{place.name}.txt").write_text(f"{reason}\n")
    (directory / str(step)).rename(place)
    logger.warning(
        "opsd-jax: %s It has been moved to %s, and the run resumes from an older checkpoint.",
        reason,
        place,
    )


@contextlib.contextmanager
def _restoring(path: Path, then: str) -> Iterator[None]:
    """Context manager that converts exceptions from its block to RecordError or Damaged.

    Damaged means that the checkpoint is damaged. Orbax, tensorstore and the file system raise
    exceptions of many types. The loss of another host is raised unchanged.

    Args:
      path: the directory that is being restored.
      then: what happens after the user has deleted it, as a clause for the message.
    """
    try:
        yield
    except RecordError:
        raise
    except Exception as error:
        if hosts.is_loss(error):
            raise
        raise (Damaged if _is_damage(error) else RecordError)(
            f"{path} cannot be restored ({files.reason(error)}).{_IF_DAMAGED}{then}."
        ) from error


def _check_values(path: Path, saved: Mapping[str, str], state: Any, then: str) -> None:
    """Raises Damaged if restored arrays do not have the checksums that were saved with them.

    Args:
      path: the directory that the arrays come from.
      saved: the saved checksums.
      state: the restored arrays.
      then: what happens after the user has deleted the directory, as a clause for the message.
    """
    if saved and (different := changed(saved, checksums(state))):
        raise Damaged(
            f"{path} cannot be restored (the values of {', '.join(different[:3])} differ from the "
            f"saved values).{_IF_DAMAGED}{then}."
        )


def checksums_of(path: Path) -> Path:
    """Returns the file with the checksums of the parameters in `path`."""
    return path.with_name(f"{path.name}.checksums.json")


def base_of(path: Path) -> Path:
    """Returns the file that identifies the base model of an adapter in `path`."""
    return path.with_name(f"{path.name}.base.json")


def is_adapter(path: Path) -> bool:
    """Returns whether the parameters in `path` are an adapter."""
    return base_of(path).exists()


def save_params(path: Path, params: Params, base: BaseModel | None = None) -> None:
    """Saves the final parameters of a stage in the directory `path`, and their checksums beside it.

    Args:
      path: the directory.
      params: the parameters, or an adapter.
      base: the base model of an adapter, which is saved in a file beside the directory.

    Raises:
      RecordError: the directory cannot be written.
    """
    sums = checksums(params)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = {checksums_of(path): sums}
        if base is not None:
            beside[base_of(path)] = base._asdict()
        for file, content in beside.items():
            files.write_atomically(file, files.to_json(content, indent=1) + "\n")

    with writing(path):
        hosts.from_first(write)
    with writing(path), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(files.absolute(path), params, force=True)


def has_params(path: Path) -> bool:
    """Returns whether `path` holds parameters from a completed call of `save_params`."""
    return path.exists() and is_complete(path)


def is_complete(path: Path) -> bool:
    """Returns whether a directory of parameters or of a checkpoint has all of its files.

    In a bucket, the directory exists before all of its files do.
    """
    return bool(ocp.utils.is_checkpoint_finalized(files.absolute(path)))


def restore_params(path: Path, abstract: Params, base: BaseModel | None = None) -> Params:
    """Restores the parameters that `save_params` saved in `path`.

    Args:
      path: the directory.
      abstract: shapes, dtypes and shardings of the parameters.
      base: the base model, if the parameters are an adapter.

    Raises:
      RecordError: the directory cannot be read or is damaged, or its adapter is of another base
        model. Names it.
    """

    def read() -> tuple[Params, dict[str, str]]:
        if base is not None:
            base.check(files.read_json(base_of(path)), path)
        with _restoring(path, _MADE_AGAIN):
            beside = checksums_of(path)
            saved = files.read_json(beside) if beside.exists() else {}  # none in version 0.1.0
            return _restore(files.absolute(path), abstract), saved

    params, saved = hosts.together(read)
    _check_values(path, saved, params, _MADE_AGAIN)
    return params
