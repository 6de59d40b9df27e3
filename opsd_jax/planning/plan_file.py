"""Writes a plan to a text file, with a hash of the config fields that the plan depends on."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from typing import Any

import jax

from opsd_jax.config import loading
from opsd_jax.planning import table
from opsd_jax.planning.plan import Plan


def write(arguments: argparse.Namespace, overrides: Mapping[str, str], plan: Plan) -> None:
    """Writes a plan to the text file `arguments.out`.

    Args:
      arguments: the arguments of `opsd-jax plan`.
      overrides: the config fields changed on the command line.
      plan: the plan that `opsd_jax.planning.plan.plan` returns.
    """
    lines = [
        command(arguments, overrides),
        "",
        f"date: {datetime.date.today().isoformat()}",
        f"jax: {jax.__version__}",
        f"libtpu: {importlib.metadata.version('libtpu')}",
        f"config sha256: {config_hash(plan.config)}",
        "status: compiled, not run",
        "",
        *table.summary(plan),
    ]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> str:
    """Returns the command line that reproduces a plan."""
    argv = ["opsd-jax", "plan", "--config", arguments.config, "--topology", arguments.topology]
    if arguments.slices != 1:
        argv += ["--slices", str(arguments.slices)]
    if arguments.length != 0.5:
        argv += ["--length", str(arguments.length)]
    argv += [f"--config.{field}={value}" for field, value in overrides.items()]
    return shlex.join([*argv, "--out", str(arguments.out)])


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the config fields that a plan depends on, as a hexadecimal string.

    Args:
      config: all fields, as `opsd_jax.config.loading.flatten` returns them.
    """
    # The model, the meshes, the evaluation and the stages that run determine the programs, and the
    # number of held-out problems determines the size of the evaluation. Nothing else changes a
    # plan: not seeds, other data, sections of stages that do not run, the pool or checkpoints.
    sections = ("model", "evaluation", *config["stages"])
    prefixes = ("stages", "mesh", "decode_mesh", "data.heldout", *(f"{s}." for s in sections))
    fields = {
        field: value
        for field, value in loading.as_before(config).items()
        if field.startswith(prefixes) and not field.endswith(".seed")
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
