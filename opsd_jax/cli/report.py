"""The command `report`: writes the report of a run from its records."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from opsd_jax.config.run_options import RunOptions, parse_run
from opsd_jax.parallel import hosts
from opsd_jax.run import pipeline, workdir
from opsd_jax.storage.files import Path


def main(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs `opsd-jax report` and returns the exit code.

    Raises:
      ConfigError: the directory holds no run.
      RecordError: a record of the run cannot be read.
    """
    del overrides  # the command takes none
    with workdir.trusting(arguments.workdir, arguments.trust):
        return write(parse_run(workdir.config_of(arguments.workdir)), arguments.workdir)


def write(config: RunOptions, directory: Path) -> int:
    """Writes the report of a run, prints its path, and returns the exit code."""
    path = hosts.from_first(lambda: pipeline.write_report(config, directory))
    if hosts.is_first():
        print(f"report: {path}")
    return 0
