"""The TPUs that a plan is for: what they can do, and where the compiler takes them from."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Without these libtpu looks for the TPUs of this machine, and locks them.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GIB = 2**30


class Chip(NamedTuple):
    """What a device can do in a second at best: the makers' figures.

    Attributes:
      flops: operations on bfloat16.
      hbm: bytes to and from its memory.
      ici: bytes to its neighbours on a ring, both ways together.
    """

    flops: float
    hbm: float
    ici: float


# By `device_kind`. A chip of v4 and of TPU7x is two devices here.
CHIPS = {
    "TPU v4": Chip(1.37e14, 6.1e11, 4.5e10),
    "TPU v5 lite": Chip(1.97e14, 8.2e11, 9.0e10),
    "TPU v5": Chip(4.59e14, 2.77e12, 1.8e11),
    "TPU v6 lite": Chip(9.18e14, 1.64e12, 1.8e11),
    "TPU7x": Chip(1.15e15, 3.69e12, 1.0e11),
}


class PlanError(Exception):
    """A plan cannot be made."""


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a TPU topology, such as "v5p:2x2x4", that need not be there.

    Raises:
      PlanError: there is no such topology, or its compiler is not installed.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise PlanError("XLA's compiler for TPUs is missing: pip install 'opsd-jax[tpu]'.")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    many = {"num_slices": slices} if slices > 1 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **many)
    except jax.errors.JaxRuntimeError as error:
        expected = "expected such as v5e:4x4, v5p:2x2x4 or v6e:4x4"
        raise PlanError(f"--topology {name}: {error}; {expected}.") from error
    return list(topology.devices)


def hbm_bytes(device: jax.Device) -> float:
    """The memory of a device that programs may use: as the compiler says when they want more."""
    one = jax.sharding.SingleDeviceSharding(device)
    large = jax.ShapeDtypeStruct((2**20, 2**16), jnp.float32, sharding=one)
    try:
        jax.jit(lambda x: jnp.sin(x @ x.T).sum()).lower(large).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"available HBM \(([\d.]+)G\)", str(error)):
            return float(found[1]) * GIB
        raise
    raise PlanError(f"{device.device_kind} has no limit to its memory that the compiler tells.")
