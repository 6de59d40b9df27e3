"""Locks a run's work directory, and checks that its config and data never change."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

from ml_collections import ConfigDict

from opsd_jax.config import loading
from opsd_jax.config.run_options import RunOptions
from opsd_jax.data.task import Task
from opsd_jax.options import ConfigError, names_from, package_of
from opsd_jax.parallel import hosts
from opsd_jax.storage import files, lease
from opsd_jax.storage.files import Path

CONFIG = "config.json"
DATA = "data.json"
ENCODED = 8  # number of prompts of each source that are compared as tokens
VISIBLE_SECONDS = 10.0  # time until every host must see a file that another host has written


@contextlib.contextmanager
def locked(directory: Path, flag: str) -> Iterator[None]:
    """Context manager that creates a directory if needed, and locks it against other processes.

    Args:
      directory: the directory.
      flag: the command-line flag that names the directory, for errors.

    Raises:
      ConfigError: the directory cannot be written, or another process uses it.
    """
    with contextlib.ExitStack() as stack:
        # The first host holds the lock for all hosts of the run.
        hosts.from_first(lambda: _lock(directory, flag, stack))
        yield


def _lock(directory: Path, flag: str, stack: contextlib.ExitStack) -> None:
    """Locks a directory until `stack` is closed."""
    in_use = ConfigError(
        f"{flag} {directory} is in use by another process; expected a free directory. Wait for "
        "that process or stop it."
    )
    if files.in_bucket(directory):
        try:
            stack.enter_context(lease.held(directory / "lock"))
        except lease.InUse as error:
            raise in_use from error
        except Exception as error:
            raise ConfigError(
                f"{flag} {directory} cannot be written ({files.reason(error)}); expected an "
                "existing bucket, and credentials that may write to it."
            ) from error
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
        lock = stack.enter_context((directory / "lock").open("w"))
    except OSError as error:
        raise ConfigError(
            f"{flag} {directory} cannot be written ({error.strerror or error}); "
            "expected a directory that you may write to, or a path where you may create one."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise in_use from error


@contextlib.contextmanager
def claimed(
    config: RunOptions, workdir: Path, begin: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Context manager that locks a work directory for a run with the given config.

    Args:
      config: the options of the run.
      workdir: the directory.
      begin: called on the first host before the config is written, so that a directory for which it
        raises an error does not yet hold a run.

    Raises:
      ConfigError: the directory cannot be written, another process uses it, it holds a run with a
        different config, the hosts have different configs, or the hosts do not share the directory.
    """

    def check() -> None:
        if (workdir / CONFIG).exists():
            algorithms = [options.algorithm for options in config.sections.values()]
            with names_from(workdir / CONFIG, [package_of(name) for name in algorithms]):
                loading.check_same(config, config_of(workdir), workdir)
        begin()
        files.write_atomically(workdir / CONFIG, loading.to_json(config))

    check_equal(loading.flatten(config), "config")
    with locked(workdir, "--workdir"):
        hosts.from_first(check)
        hosts.together(lambda: _check_shared(workdir))
        yield


def _check_shared(workdir: Path) -> None:
    """Raises ConfigError if this host cannot see the config file that the first host wrote."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (workdir / CONFIG).exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"host {hosts.number()} does not see the {CONFIG} that host 0 has written to "
                f"--workdir {workdir}; expected a directory that all hosts share. Use one such as "
                "gs://BUCKET/..."
            )
        time.sleep(0.1)


def check_equal(mine: dict[str, Any], what: str) -> None:
    """Raises ConfigError if the hosts have different values. The message lists these values.

    Args:
      mine: name -> value on this host.
      what: a prefix of the names, for the error.
    """
    first, *others = hosts.gathered(mine)
    for number, other in enumerate(others, 1):
        names = sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))
        if names:
            listed = "\n".join(
                f"  {what}.{n}: {first.get(n, 'absent')}, {other.get(n, 'absent')}" for n in names
            )
            raise ConfigError(
                f"hosts differ in these values (host 0, host {number}):\n{listed}\nExpected equal "
                "values. Give the same arguments and files to every host."
            )


def check_data(task: Task, workdir: Path) -> None:
    """Checks that the data are the same as at the start of the run, and the same on all hosts.

    The first call of a run records the number and a digest of the problems of each source, and a
    digest of some tokenized prompts. Later calls compare them. Generated problems are not checked.

    Raises:
      ConfigError: the data differ from the recorded data, or between hosts. The message names the
        sources.
    """
    if not task.in_memory:
        return
    digests: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    prompts = hashlib.sha256()  # changes with the tokenizer and the chat template
    for part, problems in (("heldout", task.heldout), ("train", task.train)):
        for i in range(len(problems)):
            problem = problems[i]
            name = f"{part}.{problem.source}"
            content = [problem.id, problem.question, problem.solution, problem.answer]
            content += [dict(problem.extra)] if problem.extra else []
            digests.setdefault(name, hashlib.sha256()).update(
                json.dumps(content, default=str).encode()
            )
            counts[name] += 1
            if counts[name] <= ENCODED:
                prompts.update(json.dumps([int(token) for token in task.prompt(problem)]).encode())
    now = {
        name: f"{counts[name]} problems, {digest.hexdigest()[:16]}"
        for name, digest in digests.items()
    }
    now["prompts"] = f"the first {ENCODED} of each source as tokens, {prompts.hexdigest()[:16]}"
    check_equal(now, "config.data")
    hosts.from_first(lambda: _check_data(now, workdir))


def _check_data(now: dict[str, str], workdir: Path) -> None:
    """Records the digests of the data on the first call, and compares them on later calls."""
    if not (workdir / DATA).exists():
        files.write_atomically(workdir / DATA, files.to_json(now, indent=1) + "\n")
        return
    recorded = files.read_json(workdir / DATA)
    different = [
        f"  config.data.{name}: {recorded.get(name, 'absent')} there, {now.get(name, 'absent')} now"
        for name in sorted(recorded.keys() | now.keys())
        if recorded.get(name) != now.get(name)
    ]
    if different:
        raise ConfigError(
            f"{workdir} holds a run with different data. These counts or digests differ:\n"
            + "\n".join(different)
            + "\nTo resume that run, use the same data files. To start a new run, pass another "
            "--workdir."
        )


def trusting(workdir: Path | None, packages: Collection[str]) -> AbstractContextManager[None]:
    """Context manager in which names in the config of a work directory are imported with care.

    Only names in opsd_jax and in `packages` are imported, because the directory may come from
    somebody else. Without a work directory, every name is the user's own.
    """
    return contextlib.nullcontext() if workdir is None else names_from(workdir / CONFIG, packages)


def config_of(workdir: Path) -> ConfigDict:
    """Reads the config of the run in a work directory.

    Raises:
      ConfigError: the directory holds no run, or a run of a version of opsd_jax with other fields.
      RecordError: the file is damaged.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"--workdir {workdir} holds no run: {path} is missing. Expected the --workdir of "
            "an earlier `opsd-jax train`."
        )
    config = loading.from_flat(files.read_json(path))
    if missing := loading.missing_fields(config):
        raise ConfigError(
            f"{path} comes from another version of opsd_jax: it lacks {', '.join(missing)}. Use "
            "the version that the run began with, or another --workdir."
        )
    return config
