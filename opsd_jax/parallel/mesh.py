"""The device mesh, and which parameter is cut along which of its axes."""

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


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`, all of them Auto.

    Devices of several slices, which the data centre's network connects, differ along `data`.

    Args:
      shape: their sizes; -1, once, takes what is left of the devices.
      devices: all of this run's by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` cannot be split
        over the slices.
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
            "slices: what is cut over `fsdp` and `tensor` stays within one."
        )
    within = sizes[0] // slices, *sizes[1:]
    ordered = mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(ordered, AXES, axis_types=types)


def reshaped(mesh: Mesh, shape: Sequence[int]) -> Mesh:
    """The mesh's devices, in the same order, in another shape, or in its own for ().

    Raises:
      ValueError: as `make_mesh`, or `tensor` would connect slices: all that is not rows is cut
        over it, and gathered at every step.
    """
    sizes = _sizes(shape, mesh.size) if shape else mesh.devices.shape
    devices = mesh.devices.reshape(sizes)
    if any(len({_slice(device) for device in row}) > 1 for row in devices.reshape(-1, sizes[-1])):
        raise ValueError(
            f"mesh {tuple(shape)} has tensor = {sizes[-1]}, over several slices; expected a size "
            "that stays within one."
        )
    return Mesh(devices, AXES, axis_types=mesh.axis_types)


def _slice(device: jax.Device) -> int:
    """The number of a device's slice; 0 where there are none."""
    return getattr(device, "slice_index", 0)


def _sizes(shape: Sequence[int], devices: int) -> list[int]:
    """The sizes of a mesh's axes, none of them -1."""
    sizes = list(shape)
    if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(
            f"mesh is {tuple(shape)}; expected sizes of {AXES}, at most one of them -1."
        )
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ValueError(
            f"mesh {tuple(shape)} over {AXES} takes {known} devices"
            f"{' or a multiple' if -1 in shape else ''}; there are {devices}."
        )
    return sizes


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_shardings(mesh: Mesh, rules: Rules, tree: Any, what: str = "parameter") -> Any:
    """The sharding of each leaf, by the first rule whose expression matches its whole path.

    Args:
      mesh: from `make_mesh`.
      rules: as `DECODER_RULES`.
      tree: parameters, a cache or their shapes.
      what: a leaf is called in errors.

    Raises:
      ValueError: a leaf matches no rule, or the rule is not for as many dimensions, names an axis
        that is not there or one twice, or a dimension is not divided by its mesh axis.
    """

    def sharding(path, leaf):
        name = path_name(path)
        spec = next((s for pattern, s in rules if re.fullmatch(pattern, name)), None)
        if spec is None:
            raise ValueError(f"no sharding rule matches the {what} {name}{list(leaf.shape)}.")
        used = [a for axes in spec for a in ((axes,) if isinstance(axes, str) else axes or ())]
        where = f"{what} {name}{list(leaf.shape)}: its rule {spec}"
        if len(spec) > len(leaf.shape):
            raise ValueError(f"{where} is for {len(spec)} dimensions or more.")
        if unknown := sorted({*used} - {*mesh.shape}):
            raise ValueError(f"{where} names {unknown}; the mesh has {list(mesh.shape)}.")
        if len({*used}) < len(used):
            raise ValueError(f"{where} uses a mesh axis twice; expected each once at most.")
        for size, axes in zip(leaf.shape, spec, strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[axis] for axis in names)
            if size % parts:
                raise ValueError(
                    f"{what} {name}{list(leaf.shape)}: its dimension of {size} is split over "
                    f"the mesh axis {' x '.join(map(repr, names))} of {parts}, which does not "
                    "divide it."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def abstract_of(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree's leaves with shardings, as compilation and `restore` take them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def placed(tree: Any, shardings: Any) -> Any:
    """Arrays of the host on devices, also of other hosts, which all have equal ones: none compares
    them, as `jax.device_put` does.
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
    """Bytes on a device of arrays, or of their shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of an array whose `axis` counts rows of a batch."""
    return NamedSharding(mesh, P(*(None,) * axis, ROWS))


def rows_in_context() -> P | None:
    """The PartitionSpec of `rows` if there is a mesh in context (`jax.set_mesh`), else None."""
    return None if jax.sharding.get_abstract_mesh().empty else P(ROWS)


def on_each_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on each device's own part (`jax.shard_map`), if there is a mesh in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """`x`, laid out so if there is a mesh in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts `rows` cuts an array."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
