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
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from opsd_jax.data.problem import DataError

T = TypeVar("T")


class Row(NamedTuple):
    """A row of a file.

    Attributes:
      where: "file:number", the line's or row's, counted from 1.
      columns: column -> value; None where the row is none, for what `error` says.
      error: "" for none.
    """

    where: str
    columns: dict[str, Any] | None
    error: str = ""


def rows(path: str, split: str = "", field: str = "data") -> Iterator[Row]:
    """The rows of a file or folder, in order; a line without a JSON object is one with an error.

    Args:
      path: of the file or folder.
      split: of a folder that has several.
      field: of the config, for messages: the section that `path` and `split` come from.

    Raises:
      DataError: there is no such file, folder or split, or it cannot be read at all.
    """
    try:
        for file in _files(pathlib.Path(path), split, field):
            yield from _READERS[_suffix(file)](file)
    except ImportError as error:
        raise DataError(f"config.{field}.path is {path!r}: {error}.") from error
    except DataError:
        raise
    # zlib.error and EOFError: damaged gzip. The others: damaged Parquet, Arrow and state.json.
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"config.{field}.path is {path!r}, which cannot be read: {reason}."
        ) from error


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
        if _suffix(file) in _READERS:
            stem = file.name.removesuffix(_suffix(file))
            by_split.setdefault(re.sub(r"-\d+-of-\d+$", "", stem), []).append(file)
    if not by_split:
        raise DataError(
            f"config.{field}.path is {str(path)!r}, a folder without data: expected state.json, "
            f"dataset_dict.json, or files that end in {', '.join(_READERS)}."
        )
    return choose(by_split)


def _suffix(path: pathlib.Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _json_lines(path: pathlib.Path) -> Iterator[Row]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                columns = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                yield Row(where, None, f"not JSON: {error}")
                continue
            except _RepeatedKey as error:
                yield Row(where, None, f"the key {error} stands in it twice; expected it once")
                continue
            if isinstance(columns, dict):
                yield Row(where, columns)
            else:
                kind = type(columns).__name__
                yield Row(where, None, f"a JSON {kind}; expected an object, column -> value")


class _RepeatedKey(Exception):
    """An object has a key twice: which value is meant, nobody knows."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(repr(next(key for key in keys if keys.count(key) > 1)))
    return columns


def _parquet(path: pathlib.Path) -> Iterator[Row]:
    _pyarrow()
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _numbered(path, file.iter_batches())


def _arrow(path: pathlib.Path) -> Iterator[Row]:
    """The stream format, which `datasets` writes."""
    pyarrow = _pyarrow()
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as batches:
        yield from _numbered(path, batches)


def _numbered(path: pathlib.Path, batches: Any) -> Iterator[Row]:
    rows = (row for batch in batches for row in batch.to_pylist())
    return (Row(f"{path}:{number}", row) for number, row in enumerate(rows, 1))


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
