"""Tensors in safetensors files, read and written a range at a time.

A file is the length of its header in eight bytes, the header in JSON, and the tensors' bytes
(https://huggingface.co/docs/safetensors). Ranges are read with `pread`: through a memory map, as
the package of that name has it, every page that was touched would count as this process's memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of a file, where a model takes several
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


class WeightsError(ValueError):
    """Weights that are not there, damaged, or not those of the model; or that cannot be written."""


class Stored(NamedTuple):
    """A tensor in a file."""

    file: pathlib.Path
    code: str  # of its dtype: a key of DTYPES, or of a dtype that no model of ours has
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def read(self, start: int, count: int) -> np.ndarray:
        """Elements `start` to `start + count` of the tensor laid out flat.

        Raises:
          WeightsError: the file cannot be read, or ends before; names it.
        """
        values = np.empty(count, DTYPES[self.code])
        left = values.view(np.uint8).data
        position = self.offset + start * values.itemsize
        try:
            with self.file.open("rb", buffering=0) as file:
                while left:
                    got = os.preadv(file.fileno(), [left], position)
                    if got == 0:
                        raise WeightsError(f"{self.file} ends at byte {position}: it is cut off.")
                    left, position = left[got:], position + got
        except OSError as error:
            raise WeightsError(f"{self.file} cannot be read: {error.strerror}.") from error
        return values


def tensors_of(directory: pathlib.Path) -> dict[str, Stored]:
    """The tensors in the safetensors files of a directory; only their headers are read.

    That is `model.safetensors`, or the files of `model.safetensors.index.json`, or, without both,
    all `*.safetensors`.

    Raises:
      WeightsError: there are none, one cannot be read, is cut off or damaged, is named by the
        index and absent, or has a tensor that another has; names the file.
    """
    index = directory / INDEX
    if (directory / FILE).exists():
        files = [directory / FILE]
    elif index.exists():
        files = [directory / name for name in sorted(set(_weight_map(index).values()))]
        missing = [str(file.name) for file in files if not file.is_file()]
        if missing:
            raise WeightsError(
                f"{index} names {', '.join(missing)}, absent from {directory}: the download is not "
                "complete."
            )
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{directory} has no {FILE}, no {INDEX} and no other *.safetensors.")
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in _header(file).items():
            if name in tensors:
                raise WeightsError(
                    f"{tensors[name].file} and {file} both have the tensor {name}; expected one."
                )
            tensors[name] = stored
    return tensors


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """The index's tensors -> files."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not all(pathlib.Path(name).name == name for name in weight_map.values()):
            raise ValueError("a file's name has a directory in it")
        return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} cannot be used ({type(error).__name__}: {error}).") from error


def _header(file: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a file, from its header.

    Raises:
      WeightsError: it is none, or not as long as it says; names the file.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\xff"))
            if 8 + length > size:
                raise ValueError(f"a header beyond its {size} bytes")
            entries = json.loads(opened.read(length))
            entries.pop("__metadata__", None)
            tensors, end = {}, 0
            for name, entry in entries.items():
                code, shape = entry["dtype"], tuple(entry["shape"])
                first, last = entry["data_offsets"]
                expected = _bytes(code, shape) if code in DTYPES else last - first
                if first < 0 or last - first != expected:
                    raise ValueError(f"{name} {code}{list(shape)} in bytes {first} to {last}")
                tensors[name] = Stored(file, code, shape, 8 + length + first)
                end = max(end, 8 + length + last)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{file} is damaged or no safetensors file ({type(error).__name__}: {error})."
        ) from error
    if end != size:
        raise WeightsError(
            f"{file} has {size} bytes; its header says {end}: it is cut off or damaged. Fetch it "
            "again."
        )
    return tensors


def _bytes(code: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[code].itemsize


Put = Callable[[str, int, np.ndarray], None]


@contextlib.contextmanager
def writer(
    directory: pathlib.Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterator[Put]:
    """Makes the files of a model, and their index if they are several, and lets them be filled.

    Args:
      directory: where, an existing one.
      tensors: names -> (dtype's code, shape).

    Yields:
      `put(name, start, values)`, which writes elements of a tensor from number `start` on, flat.
    """
    sizes = {name: _bytes(*entry) for name, entry in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    several = len(shards) > 1
    places: dict[str, tuple[Any, int]] = {}  # the open file, and the tensor's first byte
    weight_map = {}
    with contextlib.ExitStack() as stack:
        for number, names in enumerate(shards, 1):
            part = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = stack.enter_context((directory / (part if several else FILE)).open("wb"))
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
            end = 0
            for name in names:
                code, shape = tensors[name]
                offsets = [end, end + sizes[name]]
                header[name] = {"dtype": code, "shape": list(shape), "data_offsets": offsets}
                end += sizes[name]
                weight_map[name] = part
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
            file.write(struct.pack("<Q", len(text)) + text)
            data = file.tell()
            file.truncate(data + end)
            places |= {name: (file, data + header[name]["data_offsets"][0]) for name in names}

        def put(name: str, start: int, values: np.ndarray) -> None:
            file, first = places[name]
            file.seek(first + start * values.itemsize)
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

        yield put
    if several:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
