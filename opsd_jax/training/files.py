"""Records on disk: files that are whole or not there, whenever the run dies."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any


class RecordError(RuntimeError):
    """A file of a run is there and cannot be used."""


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


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


def read_json_lines(path: pathlib.Path, mend: str) -> list[Any]:
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


def read_json(path: pathlib.Path) -> Any:
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
