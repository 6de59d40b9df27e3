"""Compiles a run for TPUs without executing it, and reports its memory, traffic and time.

XLA:TPU compiles every program of a config's run for a topology. The plan reads the compiled text:
memory by phase and part, operations and traffic with loops counted, and the collectives with the
loops around them. Times are a roofline: at best with perfect overlap, and with no overlap at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from opsd_jax.config import loading
from opsd_jax.config.run_options import RunOptions
from opsd_jax.losses.fused import LOSS_CHUNKS
from opsd_jax.parallel import aot
from opsd_jax.parallel.chips import CHIPS
from opsd_jax.parallel.program import DECODE_STEPS
from opsd_jax.planning.chips import PlanError, hbm_bytes, topology_devices
from opsd_jax.planning.phases import Phase, Phases
from opsd_jax.planning.programs import Compiler, ProgramCosts
from opsd_jax.storage.executables import Executables
from opsd_jax.storage.files import Path


class Plan(NamedTuple):
    """The predicted memory and time of a run and of each phase. Memory is per device.

    Attributes:
      topology: the chip and its arrangement, such as "v5p:2x2x4".
      slices: number of slices with that topology.
      devices: number of devices in all slices.
      chip: the kind of the devices.
      hbm: bytes of memory that programs can use.
      mesh, decode_mesh: the sizes of the mesh axes, while training and while sampling.
      response_length: assumed mean response length, as a fraction of the budget.
      config: every field of the config, as `opsd_jax.config.loading.flatten` returns them.
      phases: the phases, in the order of the run.
      seconds_at_best: seconds of the run if compute, memory traffic and network overlap completely.
      seconds_in_turn: seconds of the run if they follow one another.
      programs: the costs of each program.
      largest_collective: name of a loop -> elements of the largest array of a collective in it.
      smallest_weight: elements of the smallest weight of one layer.
      fits: whether every phase fits into `hbm`, and the compiler refuses no program.
    """

    topology: str
    slices: int
    devices: int
    chip: str
    hbm: float
    mesh: dict[str, int]
    decode_mesh: dict[str, int]
    response_length: float
    config: dict[str, Any]
    phases: list[Phase]
    seconds_at_best: float
    seconds_in_turn: float
    programs: list[ProgramCosts]
    largest_collective: dict[str, int]
    smallest_weight: int
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as the dictionary that `opsd-jax plan --json` prints."""
        return self._asdict() | {
            "phases": [phase.to_json() for phase in self.phases],
            "programs": [program.to_json() for program in self.programs],
        }


def plan(
    config: RunOptions,
    topology: str,
    *,
    slices: int = 1,
    length: float = 0.5,
    executables: Path | None = None,
) -> Plan:
    """Compiles a run for a TPU topology and returns its plan.

    Args:
      config: the config of the run; the paths of data and weights need not exist.
      topology: the chip and its arrangement, such as "v5p:2x2x4".
      slices: number of slices with that topology, connected by the data centre's network.
      length: assumed mean response length, as a fraction of the budget, in (0, 1].
      executables: directory to save the compiled programs in; None to save none.

    Raises:
      PlanError: the topology is unknown, libtpu is missing, or a program cannot be compiled.
      ConfigError: the config does not fit the devices.
    """
    devices = topology_devices(topology, slices)
    device = devices[0]
    if device.device_kind not in CHIPS:
        known = ", ".join(kind for kind in CHIPS if kind.startswith("TPU"))
        raise PlanError(
            f"--topology {topology} has devices of kind {device.device_kind}; expected one of "
            f"{known}."
        )
    chip, hbm = CHIPS[device.device_kind], hbm_bytes(device)
    compiler = Compiler(Executables(executables, devices) if executables else None)
    with aot.planning(compiler):
        run = Phases(config, devices, compiler, chip, length)
        for name in config.stages:
            run.add_stage(name)
        run.add_evaluation()
    collectives = [c for program in run.programs for c in program.collectives]
    return Plan(
        topology=topology,
        slices=slices,
        devices=len(devices),
        chip=device.device_kind,
        hbm=hbm,
        mesh=dict(run.parameters.mesh.shape),
        decode_mesh=dict(run.parameters.decode_mesh.shape),
        response_length=length,
        config=loading.flatten(config),
        phases=run.phases,
        seconds_at_best=sum(phase.times * phase.seconds_at_best for phase in run.phases),
        seconds_in_turn=sum(phase.times * phase.seconds_in_turn for phase in run.phases),
        programs=run.programs,
        largest_collective={
            loop: max((c["elements"] for c in collectives if loop in c["loops"]), default=0)
            for loop in (DECODE_STEPS, LOSS_CHUNKS)
            if any(loop in program.loops for program in run.programs)
        },
        smallest_weight=run.smallest_weight(),
        fits=max(phase.total for phase in run.phases) <= hbm
        and not any(program.refused for program in run.programs),
    )
