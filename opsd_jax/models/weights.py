"""Loads decoder parameters from safetensors files, and saves them as a Hugging Face directory.

Both work on one piece at a time: a few rows of one stored tensor, for all of its shards at once. A
piece is in host memory only while it is moved. A process therefore never holds the model, or even a
whole tensor, in addition to the arrays on its devices, and it reads only the rows that these hold.
All processes of a run take part. The first one writes the files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax.models import safetensors
from opsd_jax.models.safetensors import StoredTensor, WeightsError
from opsd_jax.parallel.mesh import path_name
from opsd_jax.policy import Params

PIECE = 32 * 2**20  # Size of a piece in bytes.
SUMS = "SHA256SUMS"  # The digests of the files of an export, as `sha256sum --check` reads them.

# The path of a parameter -> the name of its stored tensor, the dimensions of the stored tensor, and
# the dimensions of the parameter. A letter stands for one dimension: "hc" is a stored dimension in
# which heads (h) and their components (c) are flattened together.
LAYOUT = {
    "embedding": ("model.embed_tokens.weight", ("v", "d"), "vd"),
    "norm": ("model.norm.weight", ("d",), "d"),
    "head": ("lm_head.weight", ("v", "d"), "dv"),
}
# The same for the parameters of layers, without "layers/" and "model.layers.N." in front.
LAYER_LAYOUT = {
    "attention_norm": ("input_layernorm.weight", ("d",), "d"),
    "attention_post_norm": ("", ("d",), "d"),  # named by the architectures that have it
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
    "mlp_post_norm": ("", ("d",), "d"),
    "gate": ("mlp.gate_proj.weight", ("f", "d"), "df"),
    "up": ("mlp.up_proj.weight", ("f", "d"), "df"),
    "down": ("mlp.down_proj.weight", ("d", "f"), "fd"),
}


NO_NAMES: Mapping[str, str] = types.MappingProxyType({})


class TensorLayout(NamedTuple):
    """Maps a tensor in a safetensors file to a parameter, or to one layer of a stacked parameter.

    Attributes:
      name: The name of the tensor in the file.
      shape: Its shape in the file.
      view: The shape with heads and their components in separate dimensions.
      order: The permutation of axes such that `view.transpose(order)` is the parameter.
      layer: The layer; None for a parameter that is not stacked.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...]
    layer: int | None


def layouts_of(
    path: str, shape: tuple[int, ...], renamed: Mapping[str, str] = NO_NAMES
) -> list[TensorLayout]:
    """Returns the `TensorLayout`s of a parameter: one per layer for a stacked parameter.

    Args:
      path: The path of the parameter, such as "layers/q".
      shape: The shape of the parameter.
      renamed: Names of the tensors of a layer that differ from those in LAYER_LAYOUT.
    """
    if path in LAYOUT:
        name, stored, ours = LAYOUT[path]
        names: dict[int | None, str] = {None: name}
    else:
        name = path.removeprefix("layers/")
        suffix, stored, ours = LAYER_LAYOUT[name]
        suffix = renamed.get(name, suffix)
        names = {i: f"model.layers.{i}.{suffix}" for i in range(shape[0])}
        shape = shape[1:]
    return layouts_from(names, stored, ours, shape)


def layouts_from(
    names: Mapping[int | None, str], stored: tuple[str, ...], ours: str, shape: tuple[int, ...]
) -> list[TensorLayout]:
    """Returns the `TensorLayout`s of stored tensors.

    Args:
      names: The layer, or None -> the name of the tensor.
      stored, ours: The dimensions of the stored tensor and of the parameter, as in LAYOUT.
      shape: The shape of the parameter, or of one layer of it.
    """
    size = dict(zip(ours, shape, strict=True))
    letters = "".join(stored)
    return [
        TensorLayout(
            name,
            tuple(math.prod(size[letter] for letter in dimension) for dimension in stored),
            tuple(size[letter] for letter in letters),
            tuple(letters.index(letter) for letter in ours),
            layer,
        )
        for layer, name in names.items()
    ]


def renamed(names: Mapping[str, str]) -> Layouts:
    """Returns `layouts_of` for other names of tensors."""
    return functools.partial(layouts_of, renamed=names) if names else layouts_of


Layouts = Callable[[str, tuple[int, ...]], list[TensorLayout]]  # such as `layouts_of`


def all_layouts(params: Params, layouts: Layouts = layouts_of) -> dict[str, TensorLayout]:
    """Returns the layout of every tensor that a saved model contains, by tensor name.

    `params` can be a tree of shapes.
    """
    return {
        layout.name: layout
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        for layout in layouts(path_name(path), leaf.shape)
    }


class Pieces(NamedTuple):
    """Describes how a stored tensor is divided into pieces of equal shape.

    Piece i consists of `rows` rows of every shard, from row `starts[i]` of the shard on. A row is
    an entry along the first dimension of `TensorLayout.view`.

    Attributes:
      mesh: The mesh over which the parameter is sharded.
      spec: The sharding of the parameter.
      piece_spec: The sharding of a piece, whose dimensions are those of the view.
      shard_rows: The number of rows of a shard.
      rows: The number of rows that a piece has of each shard.
      starts: The first row of each piece, within a shard. The last two pieces may overlap.
      shape: The shape of a piece, with the rows of all shards.
    """

    mesh: Any
    spec: P
    piece_spec: P
    shard_rows: int
    rows: int
    starts: list[int]
    shape: tuple[int, ...]


def pieces_of(array: jax.Array, layout: TensorLayout, itemsize: int) -> Pieces:
    """Divides a stored tensor into pieces of at most PIECE bytes.

    A piece has at least one row of each shard, even if that takes more bytes.

    Args:
      array: The parameter, or its shape with a sharding.
      layout: The stored tensor.
      itemsize: The number of bytes of a stored element.
    """
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        (device,) = sharding.device_set
        sharding = NamedSharding(Mesh(np.array([device]), "all"), P())
    lead = len(array.shape) - len(layout.view)  # 1 for a stacked parameter, otherwise 0
    spec = tuple(sharding.spec) + (None,) * (len(array.shape) - len(sharding.spec))
    axis = lead + layout.order.index(0)
    shard_rows = sharding.shard_shape(array.shape)[axis]
    shards = array.shape[axis] // shard_rows
    row_bytes = math.prod(layout.view[1:]) * itemsize
    rows = min(shard_rows, max(1, PIECE // (row_bytes * shards)))
    return Pieces(
        sharding.mesh,
        P(*spec),
        P(*(spec[lead + layout.order.index(i)] for i in range(len(layout.view)))),
        shard_rows,
        rows,
        [min(start, shard_rows - rows) for start in range(0, shard_rows, rows)],
        (rows * shards, *layout.view[1:]),
    )


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("order", "mesh", "specs"))
def put_piece(array, piece, layer, start, *, order, mesh, specs):
    """Copies one piece of a stored tensor into the parameter `array`, in place.

    Args:
      array: The parameter; donated.
      piece: The piece, of the shape `Pieces.shape`.
      layer: int32, the layer of a stacked parameter.
      start: int32, the first row of the piece within each shard.
      order, mesh: `TensorLayout.order` and `Pieces.mesh`.
      specs: `Pieces.spec` and `Pieces.piece_spec`.
    """

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
def take_piece(array, layer, start, *, order, mesh, specs, rows, dtype):
    """Slices a piece out of the parameter `array`, in the axis order of the stored tensor.

    This is the inverse of `put_piece`.

    Args:
      array, layer, start, order, mesh, specs: See `put_piece`. The array is not donated.
      rows: `Pieces.rows`.
      dtype: The dtype of the piece.
    """

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


def load(
    stored: Mapping[str, StoredTensor], abstract: Params, layouts: Layouts = layouts_of
) -> Params:
    """Reads the parameters of a decoder from safetensors files into sharded arrays.

    Args:
      stored: The tensors of a directory, by name. Their shapes must have been checked.
      abstract: The shape, dtype and sharding of each parameter. A sharding is a NamedSharding, or
        places the whole array on one device.
      layouts: The tensors in which a parameter is stored.

    Returns:
      The parameters, in the structure of `abstract`.

    Raises:
      WeightsError: A file cannot be read. The message names it.
    """

    def read(path, leaf):
        zeros = functools.partial(jnp.zeros, leaf.shape, leaf.dtype)
        array = jax.jit(zeros, out_shardings=leaf.sharding)()
        for layout in layouts(path_name(path), leaf.shape):
            array = _read(array, layout, stored[layout.name])
        return array

    return jax.tree_util.tree_map_with_path(read, abstract)


def _read(array: jax.Array, layout: TensorLayout, stored: StoredTensor) -> jax.Array:
    """Reads one stored tensor into a parameter, and returns the updated parameter.

    The argument `array` is donated.
    """
    pieces = pieces_of(array, layout, stored.dtype.itemsize)
    row = math.prod(layout.view[1:])
    for start in pieces.starts:
        # Several shards can hold different columns of the same rows, which are read once.
        blocks: dict[int, np.ndarray] = {}

        def block(index, start=start, blocks=blocks):
            shard = index[0].indices(pieces.shape[0])[0] // pieces.rows
            first = shard * pieces.shard_rows + start
            if first not in blocks:
                flat = stored.read(first * row, pieces.rows * row)
                blocks[first] = flat.reshape(pieces.rows, *layout.view[1:])
            return blocks[first][:, *index[1:]]

        piece = jax.make_array_from_callback(
            pieces.shape, NamedSharding(pieces.mesh, pieces.piece_spec), block
        )
        array = put_piece(
            array,
            piece,
            np.int32(layout.layer or 0),
            np.int32(start),
            order=layout.order,
            mesh=pieces.mesh,
            specs=(pieces.spec, pieces.piece_spec),
        )
        # Without this wait, pieces would accumulate in host memory.
        array.block_until_ready()
    return array


def save(
    params: Params,
    directory: pathlib.Path,
    codes: Mapping[str, str],
    files: Mapping[str, Any],
    layouts: Layouts = layouts_of,
    file: str = safetensors.FILE,
) -> None:
    """Writes the parameters of a decoder to a new Hugging Face directory, atomically.

    Args:
      params: The parameters of a decoder.
      directory: The directory to write. It must be new or empty.
      codes: The name of each stored tensor -> the code of the dtype in which it is stored.
      files: Path in the directory -> a regular file to copy, or a value to write as JSON.
      layouts: The tensors in which a parameter is stored.
      file: The name of the safetensors file.

    Raises:
      WeightsError: The directory is not empty, or cannot be written.
    """
    writes = jax.process_index() == 0
    with new_directory(directory) if writes else contextlib.nullcontext(directory) as partial:
        expected = all_layouts(params, layouts)
        table = {name: (codes[name], layout.shape) for name, layout in expected.items()}
        nothing = contextlib.nullcontext(lambda name, start, values: None)
        with safetensors.writer(partial, table, file) if writes else nothing as put:
            for path, leaf in jax.tree_util.tree_leaves_with_path(params):
                for layout in layouts(path_name(path), leaf.shape):
                    for start, values in _ranges(leaf, layout, codes[layout.name]):
                        put(layout.name, start, values)
        if writes:
            add_files(partial, files)


def _ranges(array: jax.Array, layout: TensorLayout, code: str) -> Iterator[tuple[int, np.ndarray]]:
    """Extracts a stored tensor from the parameter `array`, and yields it one range at a time.

    Args:
      array: The parameter.
      layout: The stored tensor.
      code: The code of the dtype to store.

    Yields:
      `(start, values)`: consecutive elements of the flattened tensor, and the index of the first.
    """
    dtype = safetensors.DTYPES[code]
    pieces = pieces_of(array, layout, dtype.itemsize)
    for start in pieces.starts:
        piece = take_piece(
            array,
            np.int32(layout.layer or 0),
            np.int32(start),
            order=layout.order,
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
            first = (shard * pieces.shard_rows + start) * math.prod(layout.view[1:])
            yield first, host[shard * pieces.rows : (shard + 1) * pieces.rows]


def check_new(directory: pathlib.Path) -> None:
    """Raises WeightsError if `directory` already exists and is not an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise WeightsError(f"{directory} is not empty; expected a new or an empty directory.")


@contextlib.contextmanager
def new_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Context manager that yields a temporary directory, and renames it to `directory` on success.

    It adds the file SUMS with the digests of the other files.

    Raises:
      WeightsError: The directory is not empty, or cannot be written.
    """
    directory = directory.absolute()
    check_new(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        names = sorted(path.name for path in partial.iterdir() if path.is_file())
        lines = [f"{digest(partial / name)}  {name}\n" for name in names]
        (partial / SUMS).write_text("".join(lines))
        partial.replace(directory)
    except OSError as error:
        raise WeightsError(f"{directory} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sums(directory: pathlib.Path) -> None:
    """Checks the safetensors files in a directory against its SUMS, if it has this file.

    Raises:
      WeightsError: A file differs from the one that was exported. The message names it.
    """
    path = directory / SUMS
    lines = path.read_text().splitlines() if path.is_file() else []
    digests = {name: saved for saved, _, name in (line.partition("  ") for line in lines)}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name in digests and digests[file.name] != digest(file):
            raise WeightsError(
                f"{file} is damaged: it differs from the file that {path} lists. Export or copy "
                f"the model again. If you changed the file yourself, delete {path}."
            )


def add_files(directory: pathlib.Path, files: Mapping[str, Any]) -> None:
    """Adds files to a directory, each copied from a path or written as JSON.

    Args:
      directory: The directory.
      files: Path in the directory -> a regular file to copy, or a value to write as JSON.
    """
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if isinstance(content, pathlib.Path):
            shutil.copyfile(content, path, follow_symlinks=False)
        else:
            path.write_text(json.dumps(content, indent=2) + "\n")
