"""Rows of files, each with where it stands: JSON lines, Parquet, Arrow, folders of Hugging Face.

A folder is one of
- what `datasets.Dataset.save_to_disk` leaves: `state.json` and the Arrow files that it lists;
- what `datasets.DatasetDict.save_to_disk` leaves: `dataset_dict.json` and such a folder a split;
- a snapshot of a data set on the hub, or any folder like one: data files of a split, in it or in
  its folder `data`, named after the split: `train.jsonl`, `train-00000-of-00002.parquet`.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import re
import sys
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from opsd_jax.problem import DataError

T = TypeVar("T")


class Row(NamedTuple):
    """A row of a file.

    Attributes:
      where: "file:number", the line's or row's, counted from 1.
      columns: column -> value; None where the row is none, for what `error` says.
      error: "" for none.
      there: the names of all columns that the file has, where not all of them were read.
    """

    where: str
    columns: dict[str, Any] | None
    error: str = ""
    there: Sequence[str] = ()


def rows(
    path: str, split: str = "", field: str = "data", columns: Collection[str] | None = None
) -> Iterator[Row]:
    """The rows of a file or folder, in order; a line without a JSON object is one with an error.

    Args:
      path: of the file or folder.
      split: of a folder that has several.
      field: of the config, for messages: the section that `path` and `split` come from.
      columns: names, maybe dotted, of those that are needed; None for all. Of Parquet and Arrow no
        others are read, which then may be of any type.

    Raises:
      DataError: there is no such file, folder or split, or it cannot be read at all.
    """
    try:
        for file in _files(pathlib.Path(path), split, field):
            yield from _READERS[_suffix(file)](file, columns)
    except ImportError as error:
        raise DataError(f"config.{field}.path is {path!r}: {error}.") from error
    except DataError:
        raise
    except Exception as error:
        if not isinstance(error, _DAMAGED) and not _is_arrow_s(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"config.{field}.path is {path!r}, which cannot be read: {reason}."
        ) from error


# zlib.error and EOFError: damaged gzip. The others: damaged Parquet, Arrow and state.json, and
# values that Python has no type for.
_DAMAGED = (
    OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, NotImplementedError,
    OverflowError, RecursionError,
)  # fmt: skip


def _is_arrow_s(error: Exception) -> bool:
    """Whether pyarrow raised it, which is there then: it is not imported for JSON lines."""
    pyarrow = sys.modules.get("pyarrow")
    return pyarrow is not None and isinstance(error, pyarrow.ArrowException)


def _files(path: pathlib.Path, split: str, field: str) -> list[pathlib.Path]:
    """The data files of a file or folder, in order."""

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
                f"{', '.join(_READERS)}, or a folder of such."
            )
        return choose({"": [path]})
    if not path.is_dir():
        raise DataError(f"config.{field}.path is {str(path)!r}; there is no such file or folder.")
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        return _files(choose({name: path / name for name in splits}), "", field)
    if (path / "state.json").exists():
        state = json.loads((path / "state.json").read_bytes())
        files = [path / file["filename"] for file in state["_data_files"]]
        return choose({state.get("_split") or "": files})
    by_split: dict[str, list[pathlib.Path]] = {}
    for file in sorted([*path.glob("*"), *path.glob("data/*")]):
        if _suffix(file) in _READERS and not file.name.startswith("."):
            stem = file.name.removesuffix(_suffix(file))
            # The hub puts a hash behind some: train-00000-of-00002-a09b74b3ef9c3b56.parquet.
            name = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", stem)
            by_split.setdefault(name, []).append(file)
    if not by_split:
        raise DataError(
            f"config.{field}.path is {str(path)!r}, a folder without data: expected state.json, "
            f"dataset_dict.json, or files that end in {', '.join(_READERS)}."
        )
    chosen = choose(by_split)
    if len({_suffix(file) for file in chosen}) > 1:
        raise DataError(
            f"config.{field}.path is {str(path)!r}, where a split is there in several formats: "
            f"{', '.join(file.name for file in chosen)}; expected one. Name the file itself."
        )
    return chosen


def _suffix(path: pathlib.Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _json_lines(path: pathlib.Path, columns: Collection[str] | None) -> Iterator[Row]:
    del columns  # a line is read whole
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                value = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                yield Row(where, None, f"not JSON: {error}")
                continue
            except _RepeatedKey as error:
                yield Row(where, None, f"the key {error} stands in it twice; expected it once")
                continue
            if isinstance(value, dict):
                yield Row(where, value)
            else:
                kind = type(value).__name__
                yield Row(where, None, f"a JSON {kind}; expected an object, column -> value")


class _RepeatedKey(Exception):
    """An object has a key twice: which value is meant, nobody knows."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(repr(next(key for key in keys if keys.count(key) > 1)))
    return columns


def _parquet(path: pathlib.Path, columns: Collection[str] | None) -> Iterator[Row]:
    _pyarrow()
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        there = file.schema_arrow.names
        yield from _numbered(path, file.iter_batches(columns=_needed(there, columns)), there)


def _arrow(path: pathlib.Path, columns: Collection[str] | None) -> Iterator[Row]:
    """The stream format, which `datasets` writes."""
    pyarrow = _pyarrow()
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as batches:
        there = batches.schema.names
        needed = _needed(there, columns)
        yield from _numbered(path, (batch.select(needed) for batch in batches), there)


def _needed(there: Sequence[str], columns: Collection[str] | None) -> list[str]:
    """The columns to read: those of these names, and those into which a dotted name leads."""
    if columns is None:
        return list(there)
    names = {*columns, *(column.split(".")[0] for column in columns)}
    return [name for name in there if name in names]


def _numbered(path: pathlib.Path, batches: Any, there: Sequence[str]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # what is damaged ends the process in to_pylist
        values = batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
        for columns in values:
            number += 1
            yield Row(f"{path}:{number}", columns, there=there)


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ImportError("reading it takes pyarrow: pip install 'opsd-jax[data]'") from None
    return pyarrow


_READERS = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
