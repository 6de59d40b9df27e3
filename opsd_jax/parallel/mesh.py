"""The device mesh and the sharding of arrays over its axes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax.policy import ROWS, Rules

AXES = ("data", "fsdp", "tensor")
SHAPE = (
    f"sizes of {', '.join(AXES)}, each above 0. One of them may be -1, for the remaining devices"
)


Entry = str | tuple[str, ...] | None  # of a PartitionSpec


def is_shape(shape: Sequence[int]) -> bool:
    """Returns whether `shape` is a valid mesh shape, as described by `SHAPE`."""
    positive = all(size > 0 or size == -1 for size in shape)
    return len(shape) == len(AXES) and shape.count(-1) <= 1 and positive


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates a mesh with the axes `data`, `fsdp` and `tensor`, all of type Auto.

    If the devices belong to several TPU slices, `data` is the axis that spans the slices. The
    collectives over `fsdp` and `tensor` then stay within the fast network of a slice.

    Args:
      shape: The sizes of the axes. At most one of them may be -1, for all remaining devices.
      devices: The devices; by default all devices of the run.

    Raises:
      ValueError: The product of the sizes is not the number of devices, or the size of `data` is
        not a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, types = _sizes(shape, len(devices)), (AxisType.Auto,) * len(AXES)
    slices = len({_slice(device) for device in devices})
    if slices == 1:
        ordered = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(ordered, AXES, axis_types=types)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh {tuple(shape)} has data = {sizes[0]}; expected a multiple of {slices}, the "
            "number of slices, so that fsdp and tensor stay within a slice."
        )
    within = sizes[0] // slices, *sizes[1:]
    ordered = mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(ordered, AXES, axis_types=types)


def reshaped(mesh: Mesh, shape: Sequence[int]) -> Mesh:
    """Returns a mesh of another shape that has the same devices in the same order.

    Args:
      mesh: The mesh.
      shape: The sizes of the new axes; see `make_mesh`. () keeps the sizes of `mesh`.

    Raises:
      ValueError: The product of the sizes is not the number of devices, or `tensor` would span
        several slices. It must not, because every decoding step communicates over `tensor`.
    """
    sizes = _sizes(shape, mesh.size) if shape else mesh.devices.shape
    devices = mesh.devices.reshape(sizes)
    if any(len({_slice(device) for device in row}) > 1 for row in devices.reshape(-1, sizes[-1])):
        raise ValueError(
            f"mesh {tuple(shape)} has tensor = {sizes[-1]}, which spans several slices; expected a "
            "size that stays within one slice."
        )
    return Mesh(devices, AXES, axis_types=mesh.axis_types)


def _slice(device: jax.Device) -> int:
    """Returns the index of the TPU slice that a device belongs to; 0 if it has no index."""
    return getattr(device, "slice_index", 0)


def _sizes(shape: Sequence[int], devices: int) -> list[int]:
    """Validates the axis sizes of a mesh, and computes the size that is given as -1.

    Args:
      shape: The sizes of the axes; see `make_mesh`.
      devices: The number of devices.

    Raises:
      ValueError: The product of the sizes is not the number of devices.
    """
    sizes = list(shape)
    if not is_shape(sizes):
        raise ValueError(f"mesh is {tuple(shape)}; expected {SHAPE}.")
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ValueError(
            f"mesh {tuple(shape)} over {AXES} needs {known} devices"
            f"{' or a multiple of that' if -1 in shape else ''}, but there are {devices}. "
            "Change the sizes of the mesh to match the number of devices."
        )
    return sizes


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a pytree path, such as "layers/q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_shardings(mesh: Mesh, rules: Rules, tree: Any, what: str = "parameter") -> Any:
    """Returns the `NamedSharding` that the sharding rules give each leaf of a tree.

    A leaf takes the first rule whose regular expression matches its whole path.

    Args:
      mesh: The mesh.
      rules: Pairs of a regular expression and a PartitionSpec; see `opsd_jax.policy.Model.rules`.
      tree: Parameters, a cache, or their shapes.
      what: The word for a leaf in error messages.

    Raises:
      ValueError: No rule matches a leaf, or its rule does not fit the leaf or the mesh. The message
        names the leaf.
    """

    def sharding(path, leaf):
        name = path_name(path)
        leaf_text = f"{what} {name}{list(leaf.shape)}"
        spec = next((s for pattern, s in rules if re.fullmatch(pattern, name)), None)
        if spec is None:
            raise ValueError(f"no sharding rule matches the {leaf_text}. Add a rule to the model.")
        _check_spec(spec, leaf.shape, mesh, leaf_text)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _check_spec(spec: P, shape: Sequence[int], mesh: Mesh, leaf: str) -> None:
    """Raises ValueError if a sharding rule does not fit the shape of an array or the mesh.

    Args:
      spec: The rule.
      shape: The shape of the array.
      mesh: The mesh.
      leaf: The name of the array, for the error message.
    """
    used = [axis for entry in spec for axis in axes_of(entry)]
    if len(spec) > len(shape):
        raise ValueError(
            f"{leaf} has {len(shape)} dimensions, but its sharding rule {spec} has {len(spec)} "
            f"entries; expected at most {len(shape)}."
        )
    if unknown := sorted({*used} - {*mesh.shape}):
        raise ValueError(
            f"{leaf} has the sharding rule {spec} with the axes {unknown}, which the mesh does not "
            f"have; expected axes from {list(mesh.shape)}."
        )
    if len({*used}) < len(used):
        raise ValueError(
            f"{leaf} has the sharding rule {spec}, which uses a mesh axis twice; expected each "
            "axis at most once."
        )
    for size, entry in zip(shape, spec, strict=False):
        parts = shards(mesh, entry)
        if size % parts:
            axes = " x ".join(map(repr, axes_of(entry)))
            raise ValueError(
                f"{leaf} has a dimension of size {size}, split over the mesh axis {axes} of size "
                f"{parts}, which does not divide {size}. Change the mesh or the sharding rule."
            )


def shards(mesh: Mesh, entry: Entry) -> int:
    """Returns the number of shards into which one entry of a PartitionSpec splits a dimension."""
    return math.prod(mesh.shape[axis] for axis in axes_of(entry))


def axes_of(entry: Entry) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a PartitionSpec, as a tuple."""
    return (entry,) if isinstance(entry, str) else entry or ()


def abstract_of(tree: Any, shardings: Any) -> Any:
    """Returns the shape, dtype and sharding of each leaf, as a tree of `jax.ShapeDtypeStruct`.

    Args:
      tree: Arrays, or their shapes.
      shardings: A tree of shardings of the same structure.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def placed(tree: Any, shardings: Any) -> Any:
    """Creates sharded arrays from NumPy arrays that are equal on all hosts.

    Unlike `jax.device_put`, this does not communicate in order to check that the arrays are equal.

    Args:
      tree: NumPy arrays.
      shardings: A tree of shardings of the same structure; it may include devices of other hosts.
    """
    with jax.transfer_guard("allow"):  # JAX takes make_array_from_callback for an implicit transfer
        return jax.tree.map(
            lambda x, sharding: jax.make_array_from_callback(
                np.shape(x), sharding, lambda index: np.asarray(x)[index]
            ),
            tree,
            shardings,
        )


def shard_bytes(tree: Any) -> int:
    """Computes the memory that a tree of sharded arrays takes on each device, in bytes.

    Leaves can be shapes with shardings.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that gives every device of the mesh a full copy of an array."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding that splits the batch axis of an array over `data` and `fsdp`."""
    return NamedSharding(mesh, P(*(None,) * axis, ROWS))


def rows_in_context() -> P | None:
    """Returns the PartitionSpec that shards a batch by row; None if no mesh is in context."""
    return None if jax.sharding.get_abstract_mesh().empty else _automatic(P(ROWS))


def _automatic(spec: P) -> P:
    """Leaves out the axes over which the surrounding `jax.shard_map` has split all arrays."""
    manual = {*jax.sharding.get_abstract_mesh().manual_axes}
    if not manual:
        return spec
    automatic = lambda entry: tuple(a for a in axes_of(entry) if a not in manual) or None
    return P(*(entry if entry is P.UNCONSTRAINED else automatic(entry) for entry in spec))


def over_data(function: Callable, batch: Any) -> Callable:
    """Splits a batch over the mesh axis `data`, and sums the results of `function` over its parts.

    The sum is taken once, after all of `function`. Left to the compiler, it would be taken where
    the results first depend on the rows, such as in every iteration of a loop over microbatches.
    Within `function`, `data` is not an axis that a PartitionSpec may name; `constrain` and
    `on_each_device` leave it out.

    Args:
      function: `(replicated, batch) -> results`, whose float32 results are sums over rows.
      batch: the structure of its second argument. Its arrays [M, m, ...] have rows along the second
        axis; its scalars are the same for all rows.

    Returns:
      `(replicated, batch) -> results`; `function` itself if `data` has one part, or no mesh is in
      context.
    """
    if jax.sharding.get_abstract_mesh().shape.get("data", 1) == 1:
        return function
    specs = jax.tree.map(lambda x: P(None, "data") if np.ndim(x) else P(), batch)
    return jax.shard_map(
        lambda *arguments: jax.lax.psum(function(*arguments), "data"),
        in_specs=(P(), specs),
        out_specs=P(),
        axis_names={"data"},
        check_vma=False,
    )


def part_of_data() -> jax.Array | int:
    """Returns the number of the part of the batch that `over_data` gave to the function."""
    split = "data" in jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.axis_index("data") if split else 0


def on_each_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Wraps a function so that each device applies it to its own shard of the arguments.

    The wrapper is `jax.shard_map` over the mesh in context (`jax.set_mesh`). Without a mesh, the
    result is `function` itself.

    Args:
      function: A function of arrays.
      in_specs, out_specs: The PartitionSpecs of its arguments and results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    is_spec = lambda x: isinstance(x, P)
    in_specs, out_specs = jax.tree.map(_automatic, (in_specs, out_specs), is_leaf=is_spec)
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={*mesh.axis_names} - {*mesh.manual_axes},
        check_vma=False,
    )


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Constrains an array within jit to the sharding `spec`, if a mesh is in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, _automatic(spec))


def row_shards(mesh: Mesh) -> int:
    """Returns the number of shards into which the mesh splits a batch: `data` x `fsdp`."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
