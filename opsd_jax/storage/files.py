"""Records on disk or in a bucket: files that are whole or not there, whenever the run dies."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

from etils import epath

from opsd_jax.parallel import hosts

Path: TypeAlias = pathlib.Path | epath.Path  # of a run: a local one, or gs://BUCKET/...

SYNC_SECONDS = 60.0  # between two writes of a growing file in a bucket


class RecordError(RuntimeError):
    """A file of a run is there and cannot be used."""


def in_bucket(path: Path) -> bool:
    """Whether it is no file of this machine: it cannot be appended to, locked, or moved."""
    return "://" in str(path)


def absolute(path: Path) -> Path:
    """The path from the root; one in a bucket is one already."""
    return path if in_bucket(path) else path.absolute()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one.

    Raises:
      RecordError: the bucket does not take it.
      OSError: the disk does not.
    """
    if in_bucket(path):
        with written(path):
            path.write_text(text)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


class Lines:
    """A file that grows by lines. A context manager.

    In a bucket, where nothing can be appended, it is written anew: by `sync`, at the end, and at
    the first `write` a minute after the last time. What a lost machine has not written belongs to
    steps and problems that are then done again.
    """

    def __init__(self, path: Path, begin: str = ""):
        """`begin`: its lines so far. There is no file before there is a line."""
        self._path, self._text = path, [begin]
        self._synced, self._due = True, time.monotonic() + SYNC_SECONDS
        if begin or path.exists():
            self.rewrite(begin)

    def write(self, lines: str) -> None:
        """Adds lines."""
        if not in_bucket(self._path):
            with self._path.open("a") as file:
                file.write(lines)
            return
        self._text.append(lines)
        self._synced = False
        if time.monotonic() >= self._due:
            self.sync()

    def rewrite(self, lines: str) -> None:
        """Has these lines in place of all others."""
        write_atomically(self._path, lines)
        self._text = [lines]
        self._synced, self._due = True, time.monotonic() + SYNC_SECONDS

    def sync(self) -> None:
        """Writes what is not yet written."""
        if not self._synced:
            self.rewrite("".join(self._text))

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc) -> None:
        self.sync()


def is_of_bucket(error: BaseException) -> bool:
    """Whether an error comes from the way to a bucket: from its service, or from the network."""
    return type(error).__module__.split(".")[0] in ("gcsfs", "aiohttp", "google", "requests")


def reason(error: Exception) -> str:
    """What an error says, on a line."""
    return f"{type(error).__name__}: {str(error).strip()[:300].partition(chr(10))[0]}"


@contextlib.contextmanager
def written(path: Any) -> Iterator[None]:
    """Turns whatever Orbax, tensorstore or a bucket raise within into a RecordError: something
    cannot be written at `path`.
    """
    try:
        yield
    except Exception as error:
        if hosts.is_loss(error):
            raise
        raise RecordError(
            f"{path} cannot be written ({reason(error)}). What is there stays: once it can be, "
            "the same command goes on from the last checkpoint."
        ) from error


def to_json(value: Any, **options: Any) -> str:
    """Strict JSON, with null for what is not a finite number."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def read_json_lines(path: Path, mend: str) -> list[Any]:
    """The values of a file with one a line; a last line without its end, cut off, is left out.

    Raises:
      RecordError: it is not there, or a line is not JSON; names the file and `mend`, what to do.
    """
    try:
        lines = path.read_text().split("\n")[:-1]
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}). {mend}") from error
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RecordError(f"{path}, line {number}, is not JSON: {error}. {mend}") from error
    return values


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
      RecordError: it is not JSON; names the file.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path} is damaged: {error}. Delete it to have it made again."
        ) from error
