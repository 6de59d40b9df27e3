"""The command `train`: runs the stages of a config and writes the report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from opsd_jax.cli import report
from opsd_jax.config import loading
from opsd_jax.parallel import hosts
from opsd_jax.run import lineage, pipeline


def main(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs `opsd-jax train` and returns the exit code. Raises the same errors as `pipeline.run`."""
    config = hosts.together(lambda: loading.load(arguments.config, overrides))
    origin = None
    if arguments.fork is not None:
        stage, step = arguments.fork
        origin = lineage.Origin(stage.parent, stage.name, step)
    pipeline.run(config, arguments.workdir, origin)
    return report.write(config, arguments.workdir)
