"""TPU topologies that a plan can target, and the memory limits of their chips."""

from __future__ import annotations

import importlib.util
import os
import re

import jax
import jax.numpy as jnp

# Without these variables libtpu looks for TPUs on this machine and locks them.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GIB = 2**30


class PlanError(Exception):
    """Raised when a run cannot be planned."""


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Returns the devices of a TPU topology. No TPU needs to be attached.

    Args:
      name: the chip and its arrangement, such as "v5p:2x2x4".
      slices: number of slices with that topology.

    Raises:
      PlanError: the topology does not exist, or libtpu is not installed.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise PlanError("XLA's TPU compiler is not installed. Run: pip install 'opsd-jax[tpu]'")
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(
            f"--topology {name}: {error}; expected a topology such as v5e:4x4, v5p:2x2x4 or "
            "v6e:4x4."
        ) from error
    return list(topology.devices)


def hbm_bytes(device: jax.Device) -> float:
    """Returns the number of HBM bytes that programs can use on a device.

    The compiler states this limit only when it refuses a program, so this function compiles a
    program that is too large.

    Raises:
      PlanError: the compiler accepted the program.
    """
    one_device = jax.sharding.SingleDeviceSharding(device)
    large = jax.ShapeDtypeStruct((2**20, 2**16), jnp.float32, sharding=one_device)
    try:
        jax.jit(lambda x: jnp.sin(x @ x.T).sum()).lower(large).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"available HBM \(([\d.]+)G\)", str(error)):
            return float(found[1]) * GIB
        raise
    raise PlanError(
        f"Cannot find the HBM size of {device.device_kind}: the compiler accepted an array of "
        "256 GiB; expected an out-of-memory error that states the HBM size. Install the version "
        "of libtpu that this Python's file in constraints/ pins."
    )
