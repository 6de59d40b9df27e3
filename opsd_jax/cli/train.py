"""The command `train`: runs the stages of a config and writes the report."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

import jax

from opsd_jax.cli import report
from opsd_jax.config import loading
from opsd_jax.parallel import hosts
from opsd_jax.planning import plan_file
from opsd_jax.run import lineage, pipeline
from opsd_jax.run.workdir import CONFIG
from opsd_jax.storage import files


def main(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs `opsd-jax train` and returns the exit code. Raises the same errors as `pipeline.run`."""
    origin = None
    if arguments.fork is not None:
        stage, step = arguments.fork
        origin = lineage.Origin(stage.parent, stage.name, step)

    @functools.cache
    def earlier() -> Mapping[str, Any]:
        """Returns the saved config of the run, or of the run to fork; {} if there is none."""
        runs = [arguments.workdir, *([origin.workdir] if origin else [])]
        saved = next((run / CONFIG for run in runs if (run / CONFIG).exists()), None)
        return files.read_json(saved) if saved else {}

    config = hosts.together(lambda: loading.load(arguments.config, overrides, earlier))
    planned = hosts.together(
        lambda: plan_file.predictions(arguments.config, overrides, config, jax.devices())
    )
    pipeline.run(config, arguments.workdir, origin, profile=arguments.profile, planned=planned)
    return report.write(config, arguments.workdir)
