"""The figures of a training step: where its time went, and how well it used the devices."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from opsd_jax.parallel.chips import chip_of
from opsd_jax.parallel.watchdog import Moment, Wait
from opsd_jax.rollout.decoding import Decoding

logger = logging.getLogger(__name__)

SPEED = "speed/"
MFU = SPEED + "mfu"
MBU = SPEED + "mbu"
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


def median(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Returns the median of a metric over the steps after the first; None if no step has it.

    If there is only one step, returns its value.

    Args:
      rows: the metrics of the steps of a stage, in order.
      name: the metric.
    """
    values = [row[name] for row in (rows[1:] or rows) if name in row]
    return statistics.median(values) if values else None


def beside(planned: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Returns what a plan predicts for a stage, beside what its steps measured.

    Args:
      planned: an entry of `opsd_jax.planning.plan_file.predictions`.
      rows: the metrics of the steps of the stage, in order.

    Returns:
      `planned`, where each metric in `metrics` has {"planned": [low, high], "measured": `median`}.
      A metric that no step has is left out.
    """
    if "metrics" not in planned:
        return {**planned}
    measured = {name: median(rows, name) for name in planned["metrics"]}
    metrics = {
        name: {"planned": [*planned["metrics"][name]], "measured": value}
        for name, value in measured.items()
        if value is not None
    }
    return {**planned, "metrics": metrics}


class Speed:
    """Computes how fast the updates and the rollouts of a stage are, on the devices of its mesh."""

    def __init__(self, mesh: jax.sharding.Mesh):
        """Logs a line if the accelerators' peak rates are unknown: there will be no MFU or MBU."""
        device = mesh.devices.flat[0]
        self._devices, self._chip = mesh.devices.size, chip_of(device)
        if self._chip is None and device.platform != "cpu":
            logger.info(
                "no MFU and no MBU: the peak rates of %r devices are unknown", device.device_kind
            )

    def __call__(
        self,
        metrics: dict[str, Any],
        flops: float | None,
        update_seconds: float,
        decoding: Decoding | None = None,
    ) -> dict[str, float]:
        """Returns the speed of a step.

        Args:
          metrics: the metrics of the step, with `tokens` and `seconds`.
          flops: model FLOPs of its updates (`Stage.flops`), 0 without active rows; None if they are
            unknown.
          update_seconds: how long the devices computed them.
          decoding: the memory traffic and the time of its rollouts; None without rollouts.

        Returns:
          `update_seconds`. `speed/tokens_per_device`: sampled or read tokens per second of the step
          and device. With `flops`, `speed/tflops_per_device`: 10^12 model FLOPs per second of the
          update and device. With `decoding`, `rollout_seconds`, and `speed/decode_gb_per_device`:
          10^9 bytes that decoding has to read, per second of the rollouts and device. With known
          devices, the last two also as fractions of the peak rates: `speed/mfu` and `speed/mbu`.
        """
        values = {
            "update_seconds": update_seconds,
            SPEED + "tokens_per_device": metrics["tokens"] / metrics["seconds"] / self._devices,
        }
        if flops and update_seconds > 0:
            rate = flops / update_seconds / self._devices
            values[SPEED + "tflops_per_device"] = rate / 1e12
            if self._chip is not None:
                values[MFU] = rate / self._chip.flops
        if decoding is not None and decoding.seconds > 0:
            rate = decoding.bytes / decoding.seconds
            values["rollout_seconds"] = decoding.seconds
            values[SPEED + "decode_gb_per_device"] = rate / 1e9
            if self._chip is not None:
                values[MBU] = rate / self._chip.hbm
        return values
