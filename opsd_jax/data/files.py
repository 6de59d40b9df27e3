"""Reads rows, each with its location, from JSON, CSV, Parquet, Arrow and Hugging Face datasets.

A directory with a dataset is one of
- the output of `datasets.Dataset.save_to_disk`: `state.json` and the Arrow files that it lists;
- the output of `datasets.DatasetDict.save_to_disk`: `dataset_dict.json` and one such directory per
  split;
- a snapshot of a dataset on the Hugging Face Hub, or a similar directory: data files in it or in
  its subdirectory `data`, named after their split (`train.jsonl`,
  `train-00000-of-00002.parquet`).
"""

from __future__ import annotations

import csv
import gzip
import pathlib
import re
import sys
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, TextIO, TypeVar

from opsd_jax.options import ConfigError
from opsd_jax.problem import DataError
from opsd_jax.storage import hub
from opsd_jax.storage.foreign import (
    check_file_name,
    escape,
    parse_json,
    read_document,
    read_object,
)

T = TypeVar("T")

# Limits on a file. They are far above those of any dataset; a file beyond them is damaged or meant
# to exhaust the machine.
LINE_BYTES = 16 * 2**20  # longest line of a JSON Lines or CSV file
BLANK_LINES = 100_000  # consecutive blank lines
WRONG_LINES = 10_000  # lines that are not JSON objects
ROWS = 100_000_000
# A compressed file may inflate to INFLATED_FREE bytes plus INFLATED_RATIO times its size.
INFLATED_FREE, INFLATED_RATIO = 64 * 2**20, 100


class Row(NamedTuple):
    """A row of a data file: its location, and its values or the reason why it cannot be read.

    Attributes:
      location: "file:number", where the number of the line or row starts at 1.
      columns: column -> value; None if the row cannot be read.
      error: why the row cannot be read; "" if it can.
      all_columns: names of all columns of the file, if only some of them were read; else ().
    """

    location: str
    columns: dict[str, Any] | None
    error: str = ""
    all_columns: Sequence[str] = ()


def rows(
    path: str, split: str = "", field: str = "data", columns: Collection[str] | None = None
) -> Iterator[Row]:
    """Yields the rows of a data file, or of a directory with data files, in order.

    A line that is not a JSON object is yielded as a row with an error.

    Args:
      path: path of the file or directory, or a name on the Hugging Face Hub (storage/hub.py).
      split: split to read from a directory that has several.
      field: config field of the section with `path` and `split`, for errors.
      columns: names of the columns to read, which may be dotted; None for all columns. Parquet and
        Arrow files may have other columns of types that cannot be read.

    Raises:
      ConfigError: the dataset cannot be downloaded from the hub.
      DataError: the file, directory or split does not exist or cannot be read.
    """
    directory = hub.local(path, hub.DATASET, f"config.{field}.path")
    try:
        for file in _files(directory, split, field):
            yield from _READERS[_suffix(file)](file, columns)
    except ImportError as error:
        raise DataError(f"config.{field}.path is {path!r}: {error}.") from error
    except DataError:
        raise
    except Exception as error:
        if not isinstance(error, _DAMAGED) and not _is_arrow_error(error):
            raise
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        reason = f"{kind}{escape(str(error))}"
        raise DataError(
            f"config.{field}.path is {path!r}, which cannot be read: {reason}."
        ) from error


# Exceptions that damaged files cause: zlib.error and EOFError come from gzip, the others from
# CSV, Parquet, Arrow and state.json, and from values without a Python type.
_DAMAGED = (
    OSError, EOFError, zlib.error, csv.Error, ValueError, KeyError, TypeError, NotImplementedError,
    OverflowError, RecursionError,
)  # fmt: skip


def _is_arrow_error(error: Exception) -> bool:
    """Returns whether `error` is a pyarrow exception, without importing pyarrow."""
    pyarrow = sys.modules.get("pyarrow")
    return pyarrow is not None and isinstance(error, pyarrow.ArrowException)


def _files(path: pathlib.Path, split: str, field: str) -> list[pathlib.Path]:
    """Returns the data files at `path`, in order: the file itself, or the files of one split."""

    def choose(splits: dict[str, T]) -> T:
        if not split and len(splits) == 1:
            return next(iter(splits.values()))
        if split not in splits:
            raise DataError(
                f"config.{field}.split is {split!r}; expected one of {', '.join(map(repr, splits))}"
                f", the splits of {path}."
            )
        return splits[split]

    if path.is_file():
        if _suffix(path) not in _READERS:
            raise DataError(
                f"config.{field}.path is {str(path)!r}; expected a file that ends in "
                f"{', '.join(_READERS)}, or a directory with such files."
            )
        return choose({"": [path]})
    if not path.is_dir():
        raise DataError(
            f"config.{field}.path is {str(path)!r}; there is no such file or directory. Relative "
            "paths start in the current directory."
        )
    if (path / "dataset_dict.json").exists():
        splits = read_object(path / "dataset_dict.json")["splits"]
        return _files(choose({name: path / check_file_name(name) for name in splits}), "", field)
    if (path / "state.json").exists():
        state = read_object(path / "state.json")
        files = [path / check_file_name(file["filename"]) for file in state["_data_files"]]
        return choose({str(state.get("_split") or ""): files})
    by_split = _files_by_split(path)
    if not by_split:
        raise DataError(
            f"config.{field}.path is {str(path)!r}, a directory without data; expected state.json, "
            f"dataset_dict.json, or files that end in {', '.join(_READERS)}."
        )
    chosen = choose(by_split)
    if len({_suffix(file) for file in chosen}) > 1:
        raise DataError(
            f"config.{field}.path is {str(path)!r}, where one split has files of several formats: "
            f"{', '.join(file.name for file in chosen)}; expected one format. Set the path to one "
            "of these files."
        )
    return chosen


def _files_by_split(directory: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Returns the data files in a directory, grouped by the split in their file names.

    JSON and CSV files count only if there are no others, because they often describe the dataset.
    """
    found = sorted([*directory.glob("*"), *directory.glob("data/*")])
    found = [file for file in found if not file.name.startswith(".") and file.is_file()]
    rest = [suffix for suffix in _READERS if suffix not in (".json", ".csv")]
    suffixes = rest if any(_suffix(file) in rest for file in found) else [*_READERS]
    by_split: dict[str, list[pathlib.Path]] = {}
    for file in found:
        if _suffix(file) in suffixes and not file.name.startswith("dataset_info"):
            stem = file.name.removesuffix(_suffix(file))
            # The hub appends a hash to some names: train-00000-of-00002-a09b74b3ef9c3b56.parquet.
            name = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", stem)
            by_split.setdefault(name, []).append(file)
    return by_split


def _suffix(path: pathlib.Path) -> str:
    """Returns the suffix of a file name, such as ".parquet" or ".jsonl.gz"."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _json_lines(path: pathlib.Path, columns: Collection[str] | None) -> Iterator[Row]:
    """Yields the rows of a JSON Lines file, with all columns."""
    del columns  # a line must be parsed as a whole
    wrong = 0
    for number, line in _lines(path):
        value, error = None, ""
        try:
            value = parse_json(line, unique_keys=True)
        except ValueError as reason:
            error = f"not JSON ({reason}); expected an object"
        else:
            if not isinstance(value, dict):
                error = f"a JSON value of type {type(value).__name__}; expected an object"
        wrong += bool(error)
        if wrong > WRONG_LINES:
            raise DataError(
                f"{path}:{number} is {error}. Over {WRONG_LINES:,} lines of the file are not JSON "
                "objects."
            )
        yield Row(f"{path}:{number}", None if error else value, error)


def _json(path: pathlib.Path, columns: Collection[str] | None) -> Iterator[Row]:
    """Yields the rows of a file with a JSON array of objects, or with JSON Lines."""
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    if not is_array:
        yield from _json_lines(path, columns)
        return
    for number, value in enumerate(parse_json(read_document(path), unique_keys=True), 1):
        good = isinstance(value, dict)
        error = f"a JSON value of type {type(value).__name__}; expected an object"
        yield Row(f"{path}:{number}", value if good else None, "" if good else error)


def _csv(path: pathlib.Path, columns: Collection[str] | None) -> Iterator[Row]:
    """Yields the rows of a CSV file, whose first row names the columns. Every value is a string."""
    del columns
    csv.field_size_limit(LINE_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.reader(_csv_lines(path, file), strict=True)
        names = next(table, [])
        if len({*names}) < len(names):
            raise DataError(
                f"{path} has the columns {', '.join(map(repr, names))}; expected each name once."
            )
        for number, values in enumerate(table, 2):
            location = f"{path}:{number}"
            if number > ROWS:
                raise DataError(f"{location} is after {ROWS:,} rows; expected fewer rows.")
            if not values:
                continue  # a blank line
            if len(values) != len(names):
                yield Row(location, None, f"{len(values)} values; expected {len(names)}")
            else:
                yield Row(location, dict(zip(names, values, strict=True)))


def _csv_lines(path: pathlib.Path, file: TextIO) -> Iterator[str]:
    """Yields the lines of a text file. Raises DataError for one of over LINE_BYTES characters."""
    while line := file.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise DataError(
                f"{path} has a line of over {LINE_BYTES:,} characters; expected shorter lines."
            )
        yield line


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number, line) for each line of a file that is not blank. The first number is 1.

    Raises:
      DataError: the file is beyond one of the limits.
    """
    compressed = path.suffix == ".gz"
    room = INFLATED_FREE + INFLATED_RATIO * path.stat().st_size
    rows = blank = number = 0
    with gzip.open(path) if compressed else path.open("rb") as file:
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            room -= len(line)
            is_blank = not line.strip()
            blank = blank + 1 if is_blank else 0
            rows += not is_blank
            if len(line) > LINE_BYTES:
                found = f"has over {LINE_BYTES:,} bytes; expected one row per line"
            elif compressed and room < 0:
                found = (
                    f"is after over {INFLATED_RATIO} times the bytes of the compressed file; "
                    "expected a file that compresses less. If it is not damaged, decompress it"
                )
            elif blank > BLANK_LINES:
                found = f"is after {BLANK_LINES:,} blank lines; expected a row on each line"
            elif rows > ROWS:
                found = f"is after {ROWS:,} rows; expected fewer rows. Split the file"
            else:
                if not is_blank:
                    yield number, line
                continue
            raise DataError(f"{path}:{number} {found}.")


def _parquet(path: pathlib.Path, columns: Collection[str] | None) -> Iterator[Row]:
    """Yields the rows of a Parquet file."""
    _pyarrow()
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if file.metadata.num_rows > ROWS:
            raise DataError(
                f"{path} has {file.metadata.num_rows:,} rows; expected at most {ROWS:,}."
            )
        yield from _numbered(path, file.iter_batches(columns=_needed(names, columns)), names)


def _arrow(path: pathlib.Path, columns: Collection[str] | None) -> Iterator[Row]:
    """Yields the rows of an Arrow file in the streaming format, which `datasets` writes."""
    pyarrow = _pyarrow()
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as batches:
        names = batches.schema.names
        needed = _needed(names, columns)
        yield from _numbered(path, (batch.select(needed) for batch in batches), names)


def _needed(names: Sequence[str], columns: Collection[str] | None) -> list[str]:
    """Returns the names of the columns to read, such as "a" if the column "a.b" is wanted.

    Args:
      names: all columns of the file.
      columns: the wanted columns; None for all.
    """
    if columns is None:
        return list(names)
    wanted = {*columns, *(column.split(".")[0] for column in columns)}
    return [name for name in names if name in wanted]


def _numbered(path: pathlib.Path, batches: Any, names: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of Arrow record batches, each with its row number in the file."""
    number = 0
    for batch in batches:
        batch.validate(full=True)  # with damaged data, to_pylist would end the process
        values = batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
        for columns in values:
            number += 1
            yield Row(f"{path}:{number}", columns, all_columns=names)


def _pyarrow() -> Any:
    """Imports and returns pyarrow, or raises an ImportError with the command that installs it."""
    try:
        import pyarrow
    except ImportError:
        raise ImportError(
            "Parquet and Arrow files need pyarrow; run pip install 'opsd-jax[data]'"
        ) from None
    return pyarrow


_READERS = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
