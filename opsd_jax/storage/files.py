"""Reads and writes a run's files, on a local disk or in a Cloud Storage bucket.

`write_atomically` replaces a whole file, so a process that dies leaves the old content or the new
one. `Lines` appends to a file, so it can leave an incomplete last line, which readers skip.
"""

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

Path: TypeAlias = pathlib.Path | epath.Path  # a local path, or gs://BUCKET/...

SYNC_SECONDS = 60.0  # shortest time between two automatic uploads of a growing file to a bucket


class RecordError(RuntimeError):
    """A file of a run cannot be read or written. The message names the file."""


def in_bucket(path: Path) -> bool:
    """Returns whether a path is in a bucket, where no file can be appended to, locked or moved."""
    return "://" in str(path)


def absolute(path: Path) -> Path:
    """Returns the absolute form of a path; a path in a bucket already is absolute."""
    return path if in_bucket(path) else path.absolute()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that readers see either all of its old content or all of the new.

    Raises:
      RecordError: the bucket rejects the file.
      OSError: the disk rejects the file.
    """
    if in_bucket(path):
        with writing(path):
            path.write_text(text)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


class Lines:
    """A text file that grows line by line. A context manager.

    A file in a bucket cannot be appended to, so the whole file is uploaded again: by `sync`, on
    exit, and by a `write` that comes SYNC_SECONDS or more after the last upload. If the machine is
    lost before that, the resumed run repeats the steps or problems of the missing lines.
    """

    def __init__(self, path: Path, initial: str = ""):
        """Replaces the content of an existing file; without lines, creates no file.

        Args:
          path: the file.
          initial: the lines to start with, each ending in a newline.
        """
        self._path, self._text = path, [initial]
        self._synced, self._due = True, time.monotonic() + SYNC_SECONDS
        if initial or path.exists():
            self.rewrite(initial)

    def write(self, lines: str) -> None:
        """Appends lines, each ending in a newline."""
        if not in_bucket(self._path):
            with self._path.open("a") as file:
                file.write(lines)
            return
        self._text.append(lines)
        self._synced = False
        if time.monotonic() >= self._due:
            self.sync()

    def rewrite(self, lines: str) -> None:
        """Replaces all lines of the file."""
        write_atomically(self._path, lines)
        self._text = [lines]
        self._synced, self._due = True, time.monotonic() + SYNC_SECONDS

    def sync(self) -> None:
        """Uploads the lines that are not in the bucket yet."""
        if not self._synced:
            self.rewrite("".join(self._text))

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc) -> None:
        self.sync()


def is_bucket_error(error: BaseException) -> bool:
    """Returns whether an exception comes from the Cloud Storage client or its connection."""
    return type(error).__module__.split(".")[0] in ("gcsfs", "aiohttp", "google", "requests")


def reason(error: Exception) -> str:
    """Returns the type of an exception and the first line of its message, as one line."""
    return f"{type(error).__name__}: {str(error).strip()[:300].partition(chr(10))[0]}"


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
    """Context manager that turns exceptions of its block into a RecordError about `path`.

    Orbax, tensorstore and the Cloud Storage client each raise exceptions of many types. The loss of
    another host is raised unchanged.
    """
    try:
        yield
    except Exception as error:
        if hosts.is_loss(error):
            raise
        raise RecordError(
            f"{path} cannot be written ({reason(error)}). The files that are already there are "
            "intact. Fix the cause, then run the same command to resume from the last checkpoint."
        ) from error


def to_json(value: Any, **options: Any) -> str:
    """Returns a value as strict JSON, with null for NaN and infinity.

    Args:
      value: made of dicts, lists, tuples, strings, numbers, booleans and None.
      **options: further arguments of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    """Returns a JSON-ready value with None in place of every number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def read_json_lines(path: Path, fix: str) -> list[Any]:
    """Returns the values of a JSON Lines file, without an incomplete last line.

    Args:
      path: the file.
      fix: what the user can do about a damaged file, as a sentence for the error message.

    Raises:
      RecordError: the file cannot be read, or a line is not JSON. Names the file and the line.
    """
    try:
        lines = path.read_text().split("\n")[:-1]
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}). {fix}") from error
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RecordError(f"{path}, line {number}, is not JSON: {error}. {fix}") from error
    return values


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file.

    Raises:
      RecordError: the file is not JSON. Names the file.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path} is damaged: it is not JSON ({error}). Delete it and run the same command "
            "again, which creates a new one."
        ) from error
