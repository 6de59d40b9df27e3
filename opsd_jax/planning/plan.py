"""A run compiled for TPUs that are not there: whether it fits, what it moves, how long it takes.

Every program of a config's run is compiled by XLA:TPU for a topology, and its text is read: memory
by part and by phase, operations and traffic with loops counted, the collectives and the loops that
they stand in. Times are a roofline: what the chips could do at best, and with nothing overlapped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from opsd_jax.config import loading as config_files
from opsd_jax.parallel import aot
from opsd_jax.planning.chips import CHIPS, PlanError, hbm_bytes, topology_devices
from opsd_jax.planning.phases import BOUNDS, Phases
from opsd_jax.planning.programs import Compiler


def plan(
    config: ConfigDict,
    topology: str,
    *,
    slices: int = 1,
    length: float = 0.5,
    report: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict:
    """The plan of a config's run on a topology, JSON-ready.

    Args:
      config: of the run; paths of data and weights need not exist.
      topology: as `topology_devices`.
      slices: how many of it, connected by the data centre's network.
      length: of responses on average, as a part of their budget: an assumption of the times.
      report: is told the name of each program when it is compiled, and the seconds that this took.

    Raises:
      PlanError: as `topology_devices`.
      ConfigError: the config does not go with these devices.
    """
    devices = topology_devices(topology, slices)
    device = devices[0]
    if device.device_kind not in CHIPS:
        known = ", ".join(CHIPS)
        raise PlanError(f"--topology {topology}: a {device.device_kind}; expected one of {known}.")
    chip, hbm = CHIPS[device.device_kind], hbm_bytes(device)
    compiler = Compiler(report)
    with aot.planning(compiler):
        run = Phases(config, devices, compiler, chip, length)
        for name in config.stages:
            run.stage(name)
        run.evaluation()
    found = [collective for program in run.programs for collective in program["collectives"]]
    return {
        "topology": topology,
        "slices": slices,
        "devices": len(devices),
        "chip": device.device_kind,
        "hbm": hbm,
        "mesh": dict(run.parameters.mesh.shape),
        "decode_mesh": dict(run.parameters.decode_mesh.shape),
        "response_length": length,
        "config": config_files.flatten(config),
        "phases": run.phases,
        **{bound: sum(p["times"] * p[bound] for p in run.phases) for bound in BOUNDS},
        "programs": run.programs,
        "largest_collective": {
            loop: max((c["elements"] for c in found if loop in c["loops"]), default=0)
            for loop in ("decode_steps", "loss_chunks")
            if any(loop in program["loops"] for program in run.programs)
        },
        "smallest_weight": run.smallest_weight(),
        "fits": max(phase["total"] for phase in run.phases) <= hbm
        and not any(program["refused"] for program in run.programs),
    }


def run(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> dict:
    """The plan that the command line asks for; raises as `plan`."""
    config = config_files.load(arguments.config, dict(overrides), data=False)

    def report(name: str, seconds: float) -> None:
        print(f"compiled {name}: {seconds:.0f} s", file=sys.stderr, flush=True)

    return plan(
        config,
        arguments.topology,
        slices=arguments.slices,
        length=arguments.length,
        report=report,
    )
