"""The working directory of a run: whose it is, and that one process at a time uses it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.config import loading as config_files
from opsd_jax.data.task import Task
from opsd_jax.parallel import hosts
from opsd_jax.storage import files, lease
from opsd_jax.storage.files import Path

CONFIG = "config.json"
DATA = "data.json"
ENCODED = 8  # prompts of each source that are compared as tokens
SEEN_SECONDS = 10.0  # until what one host writes is there for the others


@contextlib.contextmanager
def locked(directory: Path, flag: str) -> Iterator[None]:
    """Holds a directory, made if need be, against other runs. `flag`: what names it.

    Raises:
      ConfigError: it cannot be written, or is in use.
    """
    with contextlib.ExitStack() as stack:
        # A run's other hosts use it with the first.
        hosts.from_first(lambda: _lock(directory, flag, stack))
        yield


def _lock(directory: Path, flag: str, stack: contextlib.ExitStack) -> None:
    """As `locked`, until the stack is left."""
    in_use = config_lib.ConfigError(
        f"{flag} {directory} is in use by another process; wait for it or stop it."
    )
    if files.in_bucket(directory):
        try:
            stack.enter_context(lease.held(directory / "lock"))
        except lease.InUse as error:
            raise in_use from error
        except Exception as error:
            raise config_lib.ConfigError(
                f"{flag} {directory} cannot be written ({files.reason(error)}); expected a bucket "
                "that is there, and credentials that may write to it."
            ) from error
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
        lock = stack.enter_context((directory / "lock").open("w"))
    except OSError as error:
        raise config_lib.ConfigError(
            f"{flag} {directory} cannot be written ({error.strerror or error}); "
            "expected a directory of yours, or a path where one can be made."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise in_use from error


@contextlib.contextmanager
def claimed(config: ConfigDict, workdir: Path) -> Iterator[None]:
    """Holds the directory for a run of this config.

    Raises:
      ConfigError: it cannot be written, is in use, or holds a run of another config; or the hosts
        have been given different ones, or do not share it.
    """

    def check() -> None:
        if (workdir / CONFIG).exists():
            config_files.check_same(config, config_of(workdir), workdir)
        files.write_atomically(workdir / CONFIG, config_files.to_json(config))

    check_equal(config_files.flatten(config), "config")
    with locked(workdir, "--workdir"):
        hosts.from_first(check)
        hosts.together(lambda: _check_shared(workdir))
        yield


def _check_shared(workdir: Path) -> None:
    """Raises ConfigError where what the first host has written is not seen, after a while."""
    ends = time.monotonic() + SEEN_SECONDS
    while not (workdir / CONFIG).exists():
        if time.monotonic() > ends:
            raise config_lib.ConfigError(
                f"host {hosts.number()} does not see the {CONFIG} that host 0 has written to "
                f"--workdir {workdir}; expected a directory that all hosts share, such as "
                "gs://BUCKET/..."
            )
        time.sleep(0.1)


def check_equal(mine: dict[str, Any], what: str) -> None:
    """Raises ConfigError where another host has other values than the first; names those."""
    first, *others = hosts.gathered(mine)
    for number, other in enumerate(others, 1):
        names = sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))
        if names:
            listed = "\n".join(
                f"  {what}.{n}: {first.get(n, 'absent')}, {other.get(n, 'absent')}" for n in names
            )
            raise config_lib.ConfigError(
                "hosts differ; expected the same arguments and files on all. On host 0, and on "
                f"host {number}:\n{listed}"
            )


def check_data(task: Task, workdir: Path) -> None:
    """Writes down which problems the run has and what the tokenizer makes of them, where they come
    from files; a later call compares.

    Raises:
      ConfigError: they are others than those that the run began with, or on another host; names the
        sources.
    """
    if not task.in_memory:
        return
    digests: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    prompts = hashlib.sha256()  # which another tokenizer or chat template changes
    for part, problems in (("heldout", task.heldout), ("train", task.train)):
        for i in range(len(problems)):
            problem = problems[i]
            name = f"{part}.{problem.source}"
            what = [problem.id, problem.question, problem.solution, problem.answer]
            what += [dict(problem.extra)] if problem.extra else []
            digests.setdefault(name, hashlib.sha256()).update(
                json.dumps(what, default=str).encode()
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
    """Writes down what each source holds, or compares; raises as `check_data`."""
    if not (workdir / DATA).exists():
        files.write_atomically(workdir / DATA, files.to_json(now, indent=1) + "\n")
        return
    there = files.read_json(workdir / DATA)
    different = [
        f"  config.data.{name}: {there.get(name, 'absent')} there, {now.get(name, 'absent')} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    ]
    if different:
        raise config_lib.ConfigError(
            f"{workdir} holds a run on other data (number and digest of what is kept):\n"
            + "\n".join(different)
            + "\nGive the same files to go on with it, or another --workdir."
        )


def config_of(workdir: Path) -> ConfigDict:
    """The config of the run in a working directory.

    Raises:
      ConfigError: there is none, or it is of a version with other fields; names those it lacks.
      RecordError: it cannot be read.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise config_lib.ConfigError(f"--workdir {workdir} holds no run: there is no {path}.")
    flat = files.read_json(path)
    config = config_files.from_flat(flat)
    there = {"evaluation", *config.stages}  # sections that have the default's fields in any run
    lacks = [
        field
        for field in config_files.flatten(config_lib.default())
        if field not in flat and ("." not in field or field.split(".")[0] in there)
    ]
    if lacks:
        raise config_lib.ConfigError(
            f"{path} is of another version of opsd_jax: it has no {', '.join(lacks)}. Use the "
            "version that the run began with, or another --workdir."
        )
    return config
