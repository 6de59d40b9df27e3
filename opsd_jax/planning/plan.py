"""Plans a run: compiles it for TPUs without using any, and reports memory, traffic and time.

XLA:TPU compiles every program of a config's run for a topology. The plan reads the compiled text:
memory by phase and part, operations and traffic with loops counted, and the collectives with the
loops around them. Times are a roofline: at best with perfect overlap, and with no overlap at all.
"""

from __future__ import annotations

from opsd_jax.config import loading
from opsd_jax.config.run_options import RunOptions
from opsd_jax.losses.fused import LOSS_CHUNKS
from opsd_jax.parallel import aot
from opsd_jax.parallel.program import DECODE_STEPS
from opsd_jax.planning.chips import CHIPS, PlanError, hbm_bytes, topology_devices
from opsd_jax.planning.phases import Phases
from opsd_jax.planning.programs import Compiler


def plan(config: RunOptions, topology: str, *, slices: int = 1, length: float = 0.5) -> dict:
    """Compiles a run for a TPU topology and returns its plan, ready for JSON.

    Args:
      config: the config of the run; the paths of data and weights need not exist.
      topology: the chip and its arrangement, such as "v5p:2x2x4".
      slices: number of slices with that topology, connected by the data centre's network.
      length: assumed mean response length, as a fraction of the budget, in (0, 1].

    Raises:
      PlanError: the topology is unknown, libtpu is missing, or a program cannot be compiled.
      ConfigError: the config does not fit the devices.
    """
    devices = topology_devices(topology, slices)
    device = devices[0]
    if device.device_kind not in CHIPS:
        known = ", ".join(CHIPS)
        raise PlanError(
            f"--topology {topology} has devices of kind {device.device_kind}; expected one of "
            f"{known}."
        )
    chip, hbm = CHIPS[device.device_kind], hbm_bytes(device)
    compiler = Compiler()
    with aot.planning(compiler):
        run = Phases(config, devices, compiler, chip, length)
        for name in config.stages:
            run.add_stage(name)
        run.add_evaluation()
    collectives = [c for program in run.programs for c in program.collectives]
    return {
        "topology": topology,
        "slices": slices,
        "devices": len(devices),
        "chip": device.device_kind,
        "hbm": hbm,
        "mesh": dict(run.parameters.mesh.shape),
        "decode_mesh": dict(run.parameters.decode_mesh.shape),
        "response_length": length,
        "config": loading.flatten(config),
        "phases": [phase.to_json() for phase in run.phases],
        "seconds_at_best": sum(phase.times * phase.seconds_at_best for phase in run.phases),
        "seconds_in_turn": sum(phase.times * phase.seconds_in_turn for phase in run.phases),
        "programs": [program.to_json() for program in run.programs],
        "largest_collective": {
            loop: max((c["elements"] for c in collectives if loop in c["loops"]), default=0)
            for loop in (DECODE_STEPS, LOSS_CHUNKS)
            if any(loop in program.loops for program in run.programs)
        },
        "smallest_weight": run.smallest_weight(),
        "fits": max(phase.total for phase in run.phases) <= hbm
        and not any(program.refused for program in run.programs),
    }
