"""The command `plan`: estimates the memory and time of a run on TPUs, without using a TPU."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from opsd_jax.config import loading
from opsd_jax.planning import plan_file, table
from opsd_jax.planning.plan import plan
from opsd_jax.storage.files import to_json


def main(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs `opsd-jax plan` and returns the exit code: 1 if the run does not fit in memory.

    Raises:
      PlanError: XLA cannot compile for the topology.
      ConfigError: the config cannot run on the topology.
    """
    config = loading.load(arguments.config, overrides, data=False, platform="tpu")
    made = plan(
        config,
        arguments.topology,
        slices=arguments.slices,
        length=arguments.length,
        executables=arguments.executables,
    )
    if arguments.out:
        plan_file.write(arguments, overrides, made)
    lines = [to_json(made.to_json(), indent=2)] if arguments.json else table.lines(made)
    print(*lines, sep="\n")
    return 0 if made.fits else 1
