"""A decoder's parameters from and to the tensors of a Hugging Face directory.

Both ways a piece at a time: some rows of one stored tensor, of every shard at once, in host memory
only as long as it takes to move them. So a process never holds a model, nor a whole tensor of it,
beside the arrays on its devices, and reads only the rows that these hold. All processes of a run
take part; the first of them writes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax.models import safetensors
from opsd_jax.models.safetensors import Stored, WeightsError
from opsd_jax.parallel.mesh import path_name
from opsd_jax.policy import Params

PIECE = 32 * 2**20  # bytes of a tensor that are in host memory at once

# A parameter's path -> the tensor's name, its dimensions there, in letters ("hc": heads and their
# components in one), and the order in which they are here. Of layers' tensors the ends of both.
LAYOUT = {
    "embedding": ("model.embed_tokens.weight", ("v", "d"), "vd"),
    "norm": ("model.norm.weight", ("d",), "d"),
    "head": ("lm_head.weight", ("v", "d"), "dv"),
}
LAYER_LAYOUT = {
    "attention_norm": ("input_layernorm.weight", ("d",), "d"),
    "q": ("self_attn.q_proj.weight", ("hc", "d"), "dhc"),
    "k": ("self_attn.k_proj.weight", ("hc", "d"), "dhc"),
    "v": ("self_attn.v_proj.weight", ("hc", "d"), "dhc"),
    "q_bias": ("self_attn.q_proj.bias", ("hc",), "hc"),
    "k_bias": ("self_attn.k_proj.bias", ("hc",), "hc"),
    "v_bias": ("self_attn.v_proj.bias", ("hc",), "hc"),
    "q_norm": ("self_attn.q_norm.weight", ("c",), "c"),
    "k_norm": ("self_attn.k_norm.weight", ("c",), "c"),
    "o": ("self_attn.o_proj.weight", ("d", "hc"), "hcd"),
    "mlp_norm": ("post_attention_layernorm.weight", ("d",), "d"),
    "gate": ("mlp.gate_proj.weight", ("f", "d"), "df"),
    "up": ("mlp.up_proj.weight", ("f", "d"), "df"),
    "down": ("mlp.down_proj.weight", ("d", "f"), "fd"),
}


class Tensor(NamedTuple):
    """A stored tensor: a parameter, or one layer of a stacked one."""

    name: str
    shape: tuple[int, ...]  # in the file
    view: tuple[int, ...]  # there too, with heads and their components apart
    order: tuple[int, ...]  # view.transpose(order) is the parameter
    layer: int | None


def tensors_of(path: str, shape: tuple[int, ...]) -> list[Tensor]:
    """The stored tensors of the parameter of this path and shape."""
    if path in LAYOUT:
        name, stored, ours = LAYOUT[path]
        names: dict[int | None, str] = {None: name}
    else:
        end, stored, ours = LAYER_LAYOUT[path.removeprefix("layers/")]
        names = {i: f"model.layers.{i}.{end}" for i in range(shape[0])}
        shape = shape[1:]
    size = dict(zip(ours, shape, strict=True))
    letters = "".join(stored)
    return [
        Tensor(
            name,
            tuple(math.prod(size[letter] for letter in dimension) for dimension in stored),
            tuple(size[letter] for letter in letters),
            tuple(letters.index(letter) for letter in ours),
            layer,
        )
        for layer, name in names.items()
    ]


def all_tensors(params: Params) -> dict[str, Tensor]:
    """Names -> the stored tensors of parameters or their shapes."""
    return {
        tensor.name: tensor
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        for tensor in tensors_of(path_name(path), leaf.shape)
    }


class Pieces(NamedTuple):
    """How a tensor goes in pieces: of each of its shards `rows` rows of the view, from `starts`."""

    mesh: Any
    spec: P  # of the parameter
    piece_spec: P  # of a piece, as it lies in the file
    shard_rows: int  # along the first dimension of the view
    rows: int
    starts: list[int]
    shape: tuple[int, ...]  # of a piece, all shards' rows together


def pieces_of(array: jax.Array, tensor: Tensor, itemsize: int) -> Pieces:
    """The pieces of a parameter's tensor; none has more than PIECE bytes, but for a single row."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        (device,) = sharding.device_set
        sharding = NamedSharding(Mesh(np.array([device]), "all"), P())
    lead = len(array.shape) - len(tensor.view)
    spec = tuple(sharding.spec) + (None,) * (len(array.shape) - len(sharding.spec))
    axis = lead + tensor.order.index(0)
    shard_rows = sharding.shard_shape(array.shape)[axis]
    shards = array.shape[axis] // shard_rows
    row_bytes = math.prod(tensor.view[1:]) * itemsize
    rows = min(shard_rows, max(1, PIECE // (row_bytes * shards)))
    return Pieces(
        sharding.mesh,
        P(*spec),
        P(*(spec[lead + tensor.order.index(i)] for i in range(len(tensor.view)))),
        shard_rows,
        rows,
        # The last piece overlaps with the one before it: all are of one shape.
        [min(start, shard_rows - rows) for start in range(0, shard_rows, rows)],
        (rows * shards, *tensor.view[1:]),
    )


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("order", "mesh", "specs"))
def _put(array, piece, layer, start, *, order, mesh, specs):
    """Writes a piece into its place, without a copy of the array."""

    def put(array, piece, layer, start):
        piece = piece.transpose(order).astype(array.dtype)
        lead = array.ndim - piece.ndim
        at = [layer] * lead + [start if axis == 0 else 0 for axis in order]
        return jax.lax.dynamic_update_slice(array, piece.reshape((1,) * lead + piece.shape), at)

    in_specs = (*specs, P(), P())
    return jax.shard_map(put, mesh=mesh, in_specs=in_specs, out_specs=specs[0])(
        array, piece, layer, start
    )


@functools.partial(jax.jit, static_argnames=("order", "mesh", "specs", "rows", "dtype"))
def _take(array, layer, start, *, order, mesh, specs, rows, dtype):
    """A piece of the array, as it lies in the file."""

    def take(array, layer, start):
        lead = array.ndim - len(order)
        at = [layer] * lead + [start if axis == 0 else 0 for axis in order]
        sizes = [
            rows if axis == 0 else size
            for axis, size in zip(order, array.shape[lead:], strict=True)
        ]
        piece = jax.lax.dynamic_slice(array, at, [1] * lead + sizes).reshape(sizes)
        return piece.transpose([order.index(i) for i in range(len(order))]).astype(dtype)

    in_specs = (specs[0], P(), P())
    return jax.shard_map(take, mesh=mesh, in_specs=in_specs, out_specs=specs[1])(
        array, layer, start
    )


def load(stored: Mapping[str, Stored], abstract: Params) -> Params:
    """Reads parameters straight to where they belong.

    Args:
      stored: tensors of a directory, checked against `abstract` before.
      abstract: the parameters' shapes and dtypes, each with a NamedSharding, or for one device.

    Raises:
      WeightsError: a file cannot be read; names it.
    """

    def read(path, leaf):
        zeros = functools.partial(jnp.zeros, leaf.shape, leaf.dtype)
        array = jax.jit(zeros, out_shardings=leaf.sharding)()
        for tensor in tensors_of(path_name(path), leaf.shape):
            array = _read(array, tensor, stored[tensor.name])
        return array

    return jax.tree_util.tree_map_with_path(read, abstract)


def _read(array: jax.Array, tensor: Tensor, stored: Stored) -> jax.Array:
    """The array with a stored tensor in its place; the one that was given is gone."""
    pieces = pieces_of(array, tensor, safetensors.DTYPES[stored.code].itemsize)
    row = math.prod(tensor.view[1:])
    for start in pieces.starts:
        blocks: dict[int, np.ndarray] = {}  # shards may have the same rows, of other columns

        def block(index, start=start, blocks=blocks):
            shard = index[0].indices(pieces.shape[0])[0] // pieces.rows
            first = shard * pieces.shard_rows + start
            if first not in blocks:
                flat = stored.read(first * row, pieces.rows * row)
                blocks[first] = flat.reshape(pieces.rows, *tensor.view[1:])
            return blocks[first][:, *index[1:]]

        piece = jax.make_array_from_callback(
            pieces.shape, NamedSharding(pieces.mesh, pieces.piece_spec), block
        )
        array = _put(
            array,
            piece,
            np.int32(tensor.layer or 0),
            np.int32(start),
            order=tensor.order,
            mesh=pieces.mesh,
            specs=(pieces.spec, pieces.piece_spec),
        )
        array.block_until_ready()  # else pieces wait in host memory
    return array


def save(
    params: Params, directory: pathlib.Path, codes: Mapping[str, str], files: Mapping[str, Any]
) -> None:
    """Writes a Hugging Face directory; it is whole, or not there.

    Args:
      params: a decoder's.
      directory: where; absent or empty.
      codes: tensors' names -> the dtypes in which they are stored, as safetensors has them.
      files: names -> what else is in it: a path to copy, or a value to write as JSON.

    Raises:
      WeightsError: the directory has files in it, or cannot be written.
    """
    writes = jax.process_index() == 0
    with new_directory(directory) if writes else contextlib.nullcontext(directory) as partial:
        table = {name: (codes[name], t.shape) for name, t in all_tensors(params).items()}
        nothing = contextlib.nullcontext(lambda name, start, values: None)
        with safetensors.writer(partial, table) if writes else nothing as put:
            for path, leaf in jax.tree_util.tree_leaves_with_path(params):
                for tensor in tensors_of(path_name(path), leaf.shape):
                    for start, values in _rows(leaf, tensor, codes[tensor.name]):
                        put(tensor.name, start, values)
        if writes:
            add_files(partial, files)


def _rows(array: jax.Array, tensor: Tensor, code: str) -> Iterator[tuple[int, np.ndarray]]:
    """The elements of a tensor: (number of the first, those that follow), in pieces."""
    dtype = safetensors.DTYPES[code]
    pieces = pieces_of(array, tensor, dtype.itemsize)
    for start in pieces.starts:
        piece = _take(
            array,
            np.int32(tensor.layer or 0),
            np.int32(start),
            order=tensor.order,
            mesh=pieces.mesh,
            specs=(pieces.spec, pieces.piece_spec),
            rows=pieces.rows,
            dtype=dtype,
        )
        if piece.is_fully_addressable:
            host = np.asarray(piece)
        else:
            host = multihost_utils.process_allgather(piece, tiled=True)
        for shard in range(len(host) // pieces.rows):
            first = (shard * pieces.shard_rows + start) * math.prod(tensor.view[1:])
            yield first, host[shard * pieces.rows : (shard + 1) * pieces.rows]


def check_new(directory: pathlib.Path) -> None:
    """Raises WeightsError if something would be overwritten."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise WeightsError(f"{directory} is not empty; expected a new or an empty directory.")


@contextlib.contextmanager
def new_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to fill, which is moved to its place when it is full.

    Raises:
      WeightsError: something is there already, or it cannot be written.
    """
    directory = directory.absolute()
    check_new(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(directory)
    except OSError as error:
        raise WeightsError(f"{directory} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def add_files(directory: pathlib.Path, files: Mapping[str, Any]) -> None:
    """Copies paths, and writes other values as JSON, under their names."""
    for name, what in files.items():
        if not isinstance(what, pathlib.Path):
            (directory / name).write_text(json.dumps(what, indent=2) + "\n")
        elif what.is_dir():
            shutil.copytree(what, directory / name)
        else:
            shutil.copyfile(what, directory / name)
