"""The published peak rates of accelerators, for plans and for the figures of a run's steps."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """Published peak rates of one device: compute, memory bandwidth and network bandwidth.

    Attributes:
      flops: dense bfloat16 operations per second.
      hbm: bytes per second between the device and its memory.
      ici: bytes per second to the two neighbours on a ring, both directions together.
    """

    flops: float
    hbm: float
    ici: float


# Keyed by `jax.Device.device_kind`. A chip of v4 or TPU7x is two devices of a topology.
CHIPS = {
    "TPU v4": Chip(1.37e14, 6.1e11, 4.5e10),
    "TPU v5 lite": Chip(1.97e14, 8.2e11, 9.0e10),
    "TPU v5": Chip(4.59e14, 2.77e12, 1.8e11),
    "TPU v6 lite": Chip(9.18e14, 1.64e12, 1.8e11),
    "TPU7x": Chip(1.15e15, 3.69e12, 1.0e11),
    "NVIDIA A100-SXM4-40GB": Chip(3.12e14, 1.56e12, 6.0e11),
    "NVIDIA A100-SXM4-80GB": Chip(3.12e14, 2.04e12, 6.0e11),
    "NVIDIA H100 80GB HBM3": Chip(9.89e14, 3.35e12, 9.0e11),
    "NVIDIA H200": Chip(9.89e14, 4.80e12, 9.0e11),
}
# Other names of the same devices.
SAME = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def kind_of(device: jax.Device) -> str:
    """Returns the kind of a device, by its name in `CHIPS` if it is known."""
    return SAME.get(device.device_kind, device.device_kind)


def chip_of(device: jax.Device) -> Chip | None:
    """Returns the peak rates of a device of a run; None if they are unknown."""
    kind = kind_of(device)
    if kind != "TPU v4":
        return CHIPS.get(kind)
    # The two cores of an attached v4 are one device ("megacore").
    return Chip(*(2 * rate for rate in CHIPS[kind]))
