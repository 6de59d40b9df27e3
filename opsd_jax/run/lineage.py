"""Begins a run with what another run has made: a checkpoint (`--fork`) or a result (`init_from`).

A finished run is never changed. More steps, or other options from some step on, are a new run in
another work directory, which `fork` fills with copies. `lineage.json` there lists what the run was
made from, the oldest ancestor first:

    {"checkpoint": "runs/a/rlvr@200", "changes": {"rlvr.steps": [200, 400]}, "config": {...}}
    {"result": "runs/a/rlvr", "sha256": "..."}
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any, NamedTuple

from etils import epath

from opsd_jax.config import loading
from opsd_jax.config.run_options import RunOptions
from opsd_jax.options import ConfigError, names_from, package_of
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.storage import files
from opsd_jax.storage.files import Path
from opsd_jax.storage.names import CHECKPOINTS, PARAMS, UNTRAINED
from opsd_jax.training import checkpoint
from opsd_jax.training import metrics as metrics_lib

LINEAGE = "lineage.json"
COPYING = "copying"  # in an entry whose files are not complete yet
LEFT_OUT = (CHECKPOINTS, "damaged")  # directories that a finished stage does not need

logger = logging.getLogger(__name__)


class Origin(NamedTuple):
    """A checkpoint of another run.

    Attributes:
      workdir: the work directory of that run.
      stage: the stage that made it.
      step: number of completed steps; None for the newest checkpoint.
    """

    workdir: Path
    stage: str
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.workdir / self.stage}{'' if self.step is None else f'@{self.step}'}"


def read(workdir: Path) -> list[dict[str, Any]]:
    """Returns the entries of a run's `lineage.json`; [] if the run has no ancestor."""
    path = workdir / LINEAGE
    return files.read_json(path) if path.exists() else []


def _write(workdir: Path, entries: list[dict[str, Any]]) -> None:
    files.write_atomically(workdir / LINEAGE, files.to_json(entries, indent=1) + "\n")


def begin(config: RunOptions, workdir: Path, origin: Origin | None) -> None:
    """Copies the checkpoint `origin` into a new work directory, and records the run's ancestors.

    Does nothing if that has been done, so a forked run resumes like any other, with or without
    `--fork`.

    Args:
      config: the options of the run.
      workdir: its work directory.
      origin: the checkpoint to go on from; None for none.

    Raises:
      ConfigError: `origin` or `config.init_from` cannot be used, or the run began in another way.
    """
    if origin is not None:
        _fork(config, workdir, origin)
    elif interrupted := [entry["checkpoint"] for entry in read(workdir) if entry.get(COPYING)]:
        raise ConfigError(
            f"--workdir {workdir}: the copy of {interrupted[0]} was interrupted; expected "
            f"--fork {interrupted[0]} again, or another --workdir."
        )
    if config.init_from:
        _check_result(config.init_from, workdir)


def identities(workdir: Path) -> list[dict[str, Any]]:
    """Returns the configs of the runs that this run's checkpoints may come from."""
    return [entry["config"] for entry in read(workdir) if "config" in entry]


def text(workdir: Path) -> str:
    """Returns a paragraph about the run's ancestors for the report; "" if it has none."""
    lines = []
    for entry in read(workdir):
        if "result" in entry:
            lines.append(f"The initial parameters are a result of another run: {entry['result']}.")
            continue
        changes = "; ".join(
            f"{field}: {before!r} there, {now!r} from then on"
            for field, (before, now) in entry["changes"].items()
        )
        lines.append(f"Forked from {entry['checkpoint']} ({changes or 'same config'}).")
    return "\n".join(lines)


def _check_result(result: str, workdir: Path) -> None:
    """Checks that `config.init_from` is a finished stage, and that it has not changed."""
    path = epath.Path(result) / PARAMS
    entries = read(workdir)
    recorded = next((entry for entry in entries if "result" in entry), None)
    if not checkpoint.has_params(path):
        if recorded is not None and (workdir / UNTRAINED).exists():
            return  # a run that has begun may not need it again
        raise ConfigError(
            f"config.init_from is {result!r}; expected the directory of a finished stage, such as "
            f"'runs/first/rlvr', but {path} does not exist."
        )
    sums = checkpoint.checksums_of(path)
    digest = hashlib.sha256(sums.read_bytes()).hexdigest() if sums.exists() else ""
    if recorded is None:
        _write(workdir, [*entries, {"result": result, "sha256": digest}])
    elif recorded["sha256"] != digest:
        raise ConfigError(
            f"config.init_from is {result!r}, which has changed since the run in {workdir} began; "
            "expected the same parameters. Pass another --workdir."
        )


def _fork(config: RunOptions, workdir: Path, origin: Origin) -> None:
    """Copies a checkpoint and the results of the stages before it, unless that has been done."""
    entries = read(workdir)
    forked = next((entry for entry in reversed(entries) if "checkpoint" in entry), None)
    if forked is not None and not forked.get(COPYING):
        if not _is_from(origin, forked["checkpoint"]):
            raise ConfigError(
                f"--fork is {origin}, but the run in --workdir {workdir} was forked from "
                f"{forked['checkpoint']}; expected the same checkpoint, or another --workdir."
            )
        return
    if forked is None and any((workdir / name).exists() for name in (UNTRAINED, *config.stages)):
        raise ConfigError(
            f"--fork {origin}: --workdir {workdir} holds a run already; expected a new directory."
        )
    before, changes, identity = _compare(config, origin)
    origin = origin._replace(step=_step(config, origin))
    entry = {"checkpoint": str(origin), "changes": changes, "config": identity}
    ancestors = read(origin.workdir)
    _write(workdir, [*ancestors, entry | {COPYING: True}])
    logger.info("copying %s to %s", origin, workdir)
    for name in (UNTRAINED, *before, workdir_lib.DATA):
        if (source := origin.workdir / name).exists():
            _copy(source, workdir / name)
    source, target = origin.workdir / origin.stage, workdir / origin.stage
    if (target / CHECKPOINTS).exists():  # of a copy that was interrupted
        epath.Path(target / CHECKPOINTS).rmtree()
    _copy(source / CHECKPOINTS / str(origin.step), target / CHECKPOINTS / str(origin.step))
    for file in (metrics_lib.FILE, metrics_lib.GROUPS):
        rows = [row for row in metrics_lib.read(source, file) if row["step"] < origin.step]
        files.write_atomically(target / file, metrics_lib.lines(rows))
    _write(workdir, [*ancestors, entry])


def _is_from(origin: Origin, recorded: str) -> bool:
    """Returns whether a recorded checkpoint is `origin`, of any step if `origin` has none."""
    return str(origin) == (recorded if origin.step is not None else recorded.rpartition("@")[0])


def _compare(
    config: RunOptions, origin: Origin
) -> tuple[tuple[str, ...], dict[str, list[Any]], dict[str, Any]]:
    """Compares the config with that of the run to fork.

    Returns:
      The stages before the forked one; field -> [value there, value now] of the fields that differ;
      and the identity of the other run's config.

    Raises:
      ConfigError: another field differs than those of the forked stage and later ones, or a stage
        before it has not finished.
    """
    packages = [package_of(options.algorithm) for options in config.sections.values()]
    with names_from(origin.workdir / workdir_lib.CONFIG, packages):
        saved = workdir_lib.config_of(origin.workdir)
    for stages, where in ((saved.stages, origin.workdir), (config.stages, "the config")):
        if origin.stage not in stages:
            raise ConfigError(
                f"--fork {origin}: {where} has no stage {origin.stage!r}; expected RUN/STAGE or "
                f"RUN/STAGE@STEP with one of its stages, {', '.join(stages)}."
            )
    earlier = lambda stages: tuple(stages)[: list(stages).index(origin.stage)]
    before = earlier(config.stages)
    there, now = loading.identity(saved), loading.identity(config)
    of_one = tuple(f"{name}." for name in {*saved.stages} ^ {*config.stages})
    changes = {
        field: [there.get(field, "absent"), now.get(field, "absent")]
        for field in sorted(there.keys() | now.keys())
        if there.get(field) != now.get(field) and not field.startswith(of_one)
    }
    free = tuple(f"{name}." for name in {*saved.stages, *config.stages} - {*before})
    fixed = [
        f"  {field}: {old!r} there, {new!r} now"
        for field, (old, new) in changes.items()
        if field != "stages" and not field.startswith(free)
    ]
    if (old := earlier(saved.stages)) != before:
        fixed.append(f"  the stages before {origin.stage}: {old} there, {before} now")
    if fixed:
        raise ConfigError(
            f"--fork {origin}: that run has a different config:\n" + "\n".join(fixed) + "\nOnly "
            f"fields of the stage {origin.stage} and of later stages may change. Expected the "
            "same values in the others."
        )
    _check_carried(origin, there, now)
    for name in before:
        if not checkpoint.has_params(origin.workdir / name / PARAMS):
            raise ConfigError(
                f"--fork {origin}: the stage {name!r} of that run has not finished; expected the "
                f"results of all stages before {origin.stage}."
            )
    return before, changes, there


def _check_carried(origin: Origin, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError if a checkpoint's unfinished rollouts do not fit the config of the fork.

    Args:
      origin: the checkpoint.
      there, now: the identities of the two configs.
    """
    carry_over = f"{origin.stage}.carry_over"
    if not (there.get(carry_over) or now.get(carry_over)):
        return
    for name in ("carry_over", "prompts", "group_size", "response_tokens"):
        field = f"{origin.stage}.{name}"
        if (old := there.get(field, 0)) != (new := now.get(field, 0)):
            raise ConfigError(
                f"--fork {origin}: config.{field} is {new}; expected {old}, its value there. With "
                "carry_over, a checkpoint has unfinished rollouts. To change it, begin a stage "
                "with the result of that run (config.init_from)."
            )


def _step(config: RunOptions, origin: Origin) -> int:
    """Returns the step of the checkpoint to copy."""
    directory = origin.workdir / origin.stage / CHECKPOINTS
    found = sorted(
        int(path.name)
        for path in directory.glob("*")
        if path.name.isdigit() and checkpoint.is_complete(path)
    )
    step = origin.step if origin.step is not None else max(found, default=None)
    if step is None or step not in found:
        raise ConfigError(
            f"--fork {origin}: there is no such checkpoint; expected one of {found} in {directory}."
            " config.checkpoints.period keeps more of them."
        )
    if step >= (steps := config.sections[origin.stage].steps):
        raise ConfigError(
            f"--fork {origin}: the checkpoint is at step {step}, and config.{origin.stage}.steps "
            f"is {steps}; expected more steps, so that the run goes on."
        )
    return step


def _copy(source: Path, target: Path) -> None:
    """Copies a file, or a directory without LEFT_OUT. Files that exist are replaced."""
    if not source.is_dir():
        epath.Path(source).copy(target, overwrite=True)
        return
    target.mkdir(parents=True, exist_ok=True)
    for child in source.iterdir():
        if child.name not in LEFT_OUT:
            _copy(child, target / child.name)
