"""The figures of a training step: where its time went, and how well it used the devices."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax

from opsd_jax.parallel.chips import peak_flops
from opsd_jax.parallel.watchdog import Moment, Wait

logger = logging.getLogger(__name__)

SPEED = "speed/"
MFU = SPEED + "mfu"
PARTS = "seconds/"  # the parts of a step's `seconds`, which add up to it
OTHER = PARTS + "other"  # the host's own work: data, packing, dispatching


def seconds(began: Moment, ended: Moment) -> dict[str, float]:
    """Returns the time between two moments, and its parts.

    Returns:
      `seconds`, `seconds/train_step` and so on for every `Wait`, and `seconds/other`. The host
      begins a step while the devices compute the update of the step before: `seconds/train_step` is
      the time for which it waited for an update, mostly the one before.
    """
    total = ended.seconds - began.seconds
    parts = {PARTS + wait.name.lower(): ended.waited[wait] - began.waited[wait] for wait in Wait}
    return {"seconds": total, **parts, OTHER: total - sum(parts.values())}


def without_times(row: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics of a step that do not depend on the machine's speed."""
    return {k: v for k, v in row.items() if "seconds" not in k and not k.startswith(SPEED)}


class Speed:
    """Computes how fast the updates of a stage are, on the devices of its mesh."""

    def __init__(self, mesh: jax.sharding.Mesh):
        """Logs a line if no peak rate of the accelerators is known: there will be no MFU."""
        device = mesh.devices.flat[0]
        self._devices, self._peak = mesh.devices.size, peak_flops(device)
        if self._peak is None and device.platform != "cpu":
            logger.info("no MFU: the peak rate of %r devices is unknown", device.device_kind)

    def __call__(
        self, metrics: dict[str, Any], flops: float | None, update_seconds: float
    ) -> dict[str, float]:
        """Returns the speed of a step.

        Args:
          metrics: the metrics of the step, with `tokens` and `seconds`.
          flops: model FLOPs of its updates (`Stage.flops`), 0 without active rows; None if they are
            unknown.
          update_seconds: how long the devices computed them.

        Returns:
          `speed/tokens_per_device`: sampled or read tokens per second of the step and device. With
          `flops`, `speed/tflops_per_device`: 10^12 model FLOPs per second of the update and device.
          With known devices too, `speed/mfu`, the same as a fraction of their peak rate.
        """
        values = {
            "update_seconds": update_seconds,
            SPEED + "tokens_per_device": metrics["tokens"] / metrics["seconds"] / self._devices,
        }
        if flops and update_seconds > 0:
            rate = flops / update_seconds / self._devices
            values[SPEED + "tflops_per_device"] = rate / 1e12
            if self._peak is not None:
                values[MFU] = rate / self._peak
        return values
