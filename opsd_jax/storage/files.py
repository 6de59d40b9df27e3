"""Reads and writes the files of a run, on a local disk or in a Cloud Storage bucket.

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
from opsd_jax.storage.foreign import parse_json

Path: TypeAlias = pathlib.Path | epath.Path  # a local path, or gs://BUCKET/...

SYNC_SECONDS = 60.0  # shortest time between two automatic uploads of a growing file to a bucket


class RecordError(RuntimeError):
    """Raised if a file of a run cannot be read or written. The message names the file."""


def in_bucket(path: Path) -> bool:
    """Returns whether a path is in a bucket, where files cannot be appended to, locked or moved."""
    return "://" in str(path)


def absolute(path: Path) -> Path:
    """Returns the absolute form of a path. A path in a bucket is already absolute."""
    return path if in_bucket(path) else path.absolute()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that readers see either the whole old content or the whole new content.

    Raises:
      RecordError: the bucket rejects the file.
      OSError: the disk rejects the file.
    """
    content = text.encode("utf-8", "backslashreplace")  # of half of a surrogate pair: \ud800
    if in_bucket(path):
        with writing(path):
            path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


class Lines:
    """A text file that you append lines to, on a local disk or in a bucket.

    It is a context manager. A file in a bucket cannot be appended to, so the whole file is uploaded
    again: by `sync`, on exit, and by a `write` that comes SYNC_SECONDS or more after the last
    upload. If the machine is lost before that, the resumed run repeats the steps or problems of the
    missing lines.
    """

    def __init__(self, path: Path, initial: str = ""):
        """Replaces the content of the file with `initial`. If `initial` is empty, creates no file.

        Args:
          path: the file.
          initial: the lines to start with, each ending in a newline.
        """
        self._path, self._text = path, [initial]
        self._synced, self._due = True, time.monotonic() + SYNC_SECONDS
        if initial or path.exists():
            self.rewrite(initial)

    def write(self, lines: str) -> None:
        """Appends `lines` to the file. Each line must end with a newline."""
        if not in_bucket(self._path):
            with self._path.open("a") as file:
                file.write(lines)
            return
        self._text.append(lines)
        self._synced = False
        if time.monotonic() >= self._due:
            self.sync()

    def rewrite(self, lines: str) -> None:
        """Replaces the content of the file with `lines`."""
        write_atomically(self._path, lines)
        self._text = [lines]
        self._synced, self._due = True, time.monotonic() + SYNC_SECONDS

    def sync(self) -> None:
        """Uploads the file if it has lines that are not in the bucket yet."""
        if not self._synced:
            self.rewrite("".join(self._text))

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc) -> None:
        self.sync()


def is_bucket_error(error: BaseException) -> bool:
    """Returns whether an exception comes from the Cloud Storage client or a network library."""
    return type(error).__module__.split(".")[0] in ("gcsfs", "aiohttp", "google", "requests")


def reason(error: Exception) -> str:
    """Returns an exception's type and the first line of its message, as one line of text."""
    return f"{type(error).__name__}: {str(error).strip()[:300].partition(chr(10))[0]}"


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
    """Context manager that turns exceptions in its block into a `RecordError` that names `path`.

    Orbax, tensorstore and the Cloud Storage client each raise exceptions of many types. The loss of
    another host is raised unchanged.
    """
    try:
        yield
    except Exception as error:
        if hosts.is_loss(error):
            raise
        raise RecordError(
            f"{path} cannot be written ({reason(error)}). The existing files are intact. "
            "Fix the cause, then run the same command to resume from the last checkpoint."
        ) from error


def copy_into(source: pathlib.Path, directory: Path) -> None:
    """Copies a local directory's files and subdirectories into one that may be in a bucket.

    Raises:
      RecordError: a file cannot be written.
    """
    for path in source.rglob("*"):
        if path.is_file():
            with writing(directory):
                to = directory / path.relative_to(source)
                if to.parent != directory:
                    to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(path.read_bytes())


def to_json(value: Any, **options: Any) -> str:
    """Returns a value as strict JSON, with null for NaN and infinity.

    Args:
      value: made of dicts, lists, tuples, strings, numbers, booleans and None.
      **options: further arguments of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    """Returns a copy of `value` with None in place of every NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def read_json_lines(path: Path, fix: str) -> list[Any]:
    """Returns the values in a JSON Lines file. Skips the last line if it is incomplete.

    Args:
      path: the file.
      fix: what the user can do about a damaged line, as a sentence for the error message.

    Raises:
      RecordError: the file cannot be read, or a line is not JSON. Names the file and the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(parse_json(line))
        except ValueError as error:
            raise RecordError(
                f"line {number} of {path} is not valid JSON: {error}. {fix}"
            ) from error
    return values


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file.

    Raises:
      RecordError: the file is not JSON. Names the file.
    """
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise RecordError(
            f"{path} is damaged: it is not valid JSON ({error}). Delete it and run the same "
            "command again to create a new one."
        ) from error
