"""Reads and writes tensors in safetensors files, one range of elements at a time.

A file consists of the length of its header in eight bytes, the header as JSON, and the bytes of the
tensors (https://huggingface.co/docs/safetensors). The package `safetensors` maps files into memory,
so that every page it has read counts as memory of the process. This module reads with `pread`.
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

from opsd_jax.storage.foreign import (
    DOCUMENT_BYTES,
    check_file_name,
    listed,
    parse_json,
    read_document,
    shown,
)

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_NAME = 1000  # Largest number of characters in the name of a tensor.
LONGEST_SHAPE = 16  # Largest number of dimensions of a tensor.
SHARD_BYTES = 5 * 10**9  # A larger model is split into several files of at most this size.
# Name of a dtype -> its code in safetensors files, and code -> NumPy dtype. Weights of any other
# dtype are not supported.
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


class WeightsError(ValueError):
    """Raised if weights are missing or damaged, do not match the model, or cannot be written."""


class StoredTensor(NamedTuple):
    """The location, dtype and shape of a tensor in a safetensors file.

    Attributes:
      file: The safetensors file.
      code: The code of its dtype. Only tensors with a code in DTYPES can be read.
      shape: Its shape in the file.
      offset: Position of its first byte in the file.
    """

    file: pathlib.Path
    code: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype of the tensor."""
        return DTYPES[self.code]

    def read(self, start: int, count: int) -> np.ndarray:
        """Reads `count` elements of the flattened tensor, starting at element `start`.

        Raises:
          WeightsError: The file cannot be read or is too short. The message names it.
        """
        values = np.empty(count, self.dtype)
        remaining = values.view(np.uint8).data
        position = self.offset + start * values.itemsize
        try:
            with self.file.open("rb", buffering=0) as file:
                while remaining:
                    got = os.preadv(file.fileno(), [remaining], position)
                    if got == 0:
                        raise WeightsError(
                            f"{self.file} ends at byte {position}, in the middle of a tensor, so "
                            "the file is truncated. Download it again."
                        )
                    remaining, position = remaining[got:], position + got
        except OSError as error:
            raise WeightsError(f"{self.file} cannot be read: {error.strerror}.") from error
        return values


def tensors_of(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Locates all tensors of a model by reading the headers of its safetensors files.

    The files are `model.safetensors` if it exists, otherwise the files that the index
    `model.safetensors.index.json` lists, otherwise all `*.safetensors`.

    Raises:
      WeightsError: There is no file, a file that the index lists is missing, a file cannot be read
        or is damaged, or two files have a tensor of the same name. The message names the file.
    """
    index = directory / INDEX
    if (directory / FILE).exists():
        files = [directory / FILE]
    elif index.exists():
        files = [directory / name for name in sorted(set(_weight_map(index).values()))]
        missing = [str(file.name) for file in files if not file.is_file()]
        if missing:
            raise WeightsError(
                f"{index} lists files that are missing from {directory}: {listed(missing)}. "
                "Complete the download."
            )
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightsError(
            f"{directory} contains no weights; expected {FILE}, {INDEX} or other *.safetensors "
            "files."
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in tensors_in(file).items():
            if name in tensors:
                raise WeightsError(
                    f"{tensors[name].file} and {file} both contain the tensor {name}; expected it "
                    "in only one file. Remove the file that does not belong to the model."
                )
            tensors[name] = stored
    return tensors


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Reads the mapping from tensor name to file name in a safetensors index.

    Raises:
      WeightsError: The index cannot be read or used. The message names it.
    """
    try:
        weight_map = parse_json(read_document(index))["weight_map"]
        return {name: check_file_name(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} cannot be used ({type(error).__name__}: {error}); expected a JSON object "
            "whose weight_map maps each tensor to a file name. Download it again."
        ) from error


def tensors_in(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Locates the tensors of a safetensors file by reading its header.

    Raises:
      WeightsError: The file cannot be read, or is damaged or cut off. The message names it.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\xff"))
            if 8 + length > size:
                raise ValueError(f"the header is longer than the file, which has {size} bytes")
            if length > DOCUMENT_BYTES:
                raise ValueError(f"the header has over {DOCUMENT_BYTES:,} bytes")
            entries = parse_json(opened.read(length), unique_keys=True)
            entries.pop("__metadata__", None)
            tensors, end = {}, 0
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                code, shape, last = _entry(name, entry, end)
                tensors[name] = StoredTensor(file, code, shape, 8 + length + end)
                end = last
            end += 8 + length
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{file} is damaged or is not a safetensors file ({type(error).__name__}: {error}). "
            "Download it again."
        ) from error
    if end != size:
        raise WeightsError(
            f"{file} has {size} bytes, but its header describes {end} bytes, so the file is "
            "truncated or damaged. Download it again."
        )
    return tensors


def _entry(name: str, entry: dict[str, Any], start: int) -> tuple[str, tuple[int, ...], int]:
    """Checks a tensor's entry in the header of a safetensors file.

    Args:
      name: The name of the tensor.
      entry: Its dtype, shape and data_offsets.
      start: The data offset at which the tensor must start, which is the end of the tensor before
        it. The format allows no gap, and no overlap.

    Returns:
      `(code, shape, end)`: the code of its dtype, its shape, and the data offset of its end.

    Raises:
      ValueError: The entry is not valid.
    """
    code, shape = entry["dtype"], entry["shape"]
    first, last = entry["data_offsets"]
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"{shown(name)} is not the name of a tensor")
    numbers = [first, last, *shape]
    if not isinstance(code, str) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(
            f"{name} has dtype {shown(code)}, shape {shown(shape)} and data_offsets "
            f"{shown(first)} and {shown(last)}; expected integers of at least 0"
        )
    if len(shape) > LONGEST_SHAPE:
        raise ValueError(f"{name} has {len(shape)} dimensions")
    expected = _bytes(code, tuple(shape)) if code in DTYPES else last - first
    if first != start or last < first or last - first != expected:
        raise ValueError(
            f"{name} has data_offsets {first} and {last}; expected {start} and {start + expected}, "
            f"because the tensor before it ends at {start}, and dtype {code} with shape {shape} "
            f"takes {expected} bytes"
        )
    return code, tuple(shape), last


def _bytes(code: str, shape: tuple[int, ...]) -> int:
    """Returns the size in bytes of a tensor with the given dtype code and shape."""
    return math.prod(shape) * DTYPES[code].itemsize


Put = Callable[[str, int, np.ndarray], None]


@contextlib.contextmanager
def writer(
    directory: pathlib.Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], single: str = FILE
) -> Iterator[Put]:
    """Context manager that creates safetensors files and yields a function to write tensors.

    A model larger than SHARD_BYTES is split into several files with an index.

    Args:
      directory: An existing directory.
      tensors: Name -> (dtype code, shape) of every tensor.
      single: The name of the file of a model that is not split.

    Yields:
      `put(name, start, values)`, which writes `values` to the flattened tensor, from element
      `start` on.
    """
    sizes = {name: _bytes(*entry) for name, entry in tensors.items()}
    shards = _shards(sizes)
    places: dict[str, tuple[Any, int]] = {}  # tensor -> (open file, position of its first byte)
    weight_map = {}
    with contextlib.ExitStack() as stack:
        for number, names in enumerate(shards, 1):
            part = f"model-{number:05}-of-{len(shards):05}.safetensors"
            path = directory / (part if len(shards) > 1 else single)
            file = stack.enter_context(path.open("wb"))
            # transformers requires this metadata.
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in names:
                code, shape = tensors[name]
                offsets = [end, end + sizes[name]]
                header[name] = {"dtype": code, "shape": list(shape), "data_offsets": offsets}
                end += sizes[name]
                weight_map[name] = part
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)  # The tensors must begin at a multiple of 8.
            file.write(struct.pack("<Q", len(text)) + text)
            data = file.tell()
            file.truncate(data + end)
            places |= {name: (file, data + header[name]["data_offsets"][0]) for name in names}

        def put(name: str, start: int, values: np.ndarray) -> None:
            file, first = places[name]
            file.seek(first + start * values.itemsize)
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

        yield put
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Groups tensors into files of at most SHARD_BYTES. A larger tensor gets its own file.

    Args:
      sizes: The size of each tensor in bytes.

    Returns:
      The names of the tensors in each file.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
