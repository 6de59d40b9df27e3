"""Writes a plan to a text file, and reads what the plan of a run predicts.

The file has a hash of the config fields that the plan depends on.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from opsd_jax.config import loading
from opsd_jax.config.run_options import RunOptions
from opsd_jax.models import pretrained
from opsd_jax.models.options import PretrainedOptions
from opsd_jax.parallel.chips import kind_of
from opsd_jax.planning import table
from opsd_jax.planning.keys import PhaseKey, PhaseKind
from opsd_jax.planning.plan import Plan
from opsd_jax.stages.rollouts import ROLLOUTS

PLANS = "plans"  # the directory of plans, next to config files
_DEVICES = re.compile(r": (\d+ x .+)$", re.MULTILINE)
# A line of `table.summary` with the times of a phase.
_PHASE = re.compile(
    r"^  (\S.*?) +([\d.]+) +([\d.]+) +\d+ x(?: +(\d+)% of its tokens are not padding)?$",
    re.MULTILINE,
)


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
    # The model, the adapter, the meshes, the evaluation and the stages that run determine the
    # programs, and the number of held-out problems determines the size of the evaluation. Nothing
    # else changes a plan: not seeds, other data, sections of stages that do not run, the pool or
    # checkpoints.
    sections = ("model", "adapter", "evaluation", *config["stages"])
    fields_of_run = ("stages", "mesh", "decode_mesh", "data.heldout", "rollout_quantisation")
    prefixes = (*fields_of_run, *(f"{section}." for section in sections))
    fields = {
        field: value
        for field, value in loading.as_before(config).items()
        if field.startswith(prefixes) and not field.endswith(".seed")
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def predictions(
    name: str, overrides: Mapping[str, str], config: RunOptions, devices: Sequence[jax.Device]
) -> dict[str, dict[str, Any]]:
    """Returns what the plan of a run predicts for each of its stages.

    The plan of the config file NAME.py is `plans/NAME.txt` next to it. It has to be made for this
    config, with the same overrides, and for these devices. It may be made without
    `config.model.path` if the model there is the preset of the config.

    Args:
      name: the config file, or the name of a packaged config.
      overrides: the config fields changed on the command line.
      config: the config of the run, loaded from them.
      devices: all devices of the run.

    Returns:
      Stage -> {"file": path of the plan} with one further entry. "metrics": metric of a step ->
      [low, high], times in seconds. Or "differs": why the plan is not one of this run. Empty
      without a plan.

    Raises:
      ConfigError: as for `loading.load`.
    """
    config_path = loading.path_of(name)
    path = config_path.parent / PLANS / f"{config_path.stem}.txt"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    fields = loading.flatten(loading.load(name, overrides, data=False, platform="tpu"))
    digests = {config_hash(fields)}
    if isinstance(config.model, PretrainedOptions) and pretrained.is_preset(config.model):
        digests.add(config_hash(fields | {"model.path": ""}))
    if reason := _difference(text, digests, f"{len(devices)} x {kind_of(devices[0])}"):
        return {stage: {"file": str(path), "differs": reason} for stage in config.stages}
    return {
        stage: {"file": str(path), "metrics": _of_stage(text, stage)} for stage in config.stages
    }


def _difference(text: str, digests: Collection[str], devices: str) -> str:
    """Returns why a plan file is not one of a run; "" if it is one.

    Args:
      text: the plan file.
      digests: hashes of the config, of which the plan has to have one.
      devices: the devices of the run, as a plan prints them.
    """
    found = _DEVICES.search(text)
    planned = found[1] if found else "no devices"
    if planned != devices:
        return f"it is for {planned}, and the run has {devices}"
    if not any(f"config sha256: {digest}\n" in text for digest in digests):
        return "it is for another config"
    return ""


def _of_stage(text: str, stage: str) -> dict[str, list[float]]:
    """Returns the metrics that a plan file predicts for a stage, as [low, high]."""
    phases = {
        phase: ([float(best), float(in_turn)], useful)
        for phase, best, in_turn, useful in _PHASE.findall(text)
        if phase.startswith(f"{stage} ")
        and not phase.startswith(str(PhaseKey(stage, PhaseKind.PROBE)))
    }
    update, useful = phases[str(PhaseKey(stage, PhaseKind.STEP))]
    rollouts = str(PhaseKey(stage, PhaseKind.SAMPLING, ROLLOUTS))
    times = zip(*(seconds for seconds, _ in phases.values()), strict=True)
    return {
        "seconds": [round(sum(column), 1) for column in times],
        **({"rollout_seconds": phases[rollouts][0]} if rollouts in phases else {}),
        "update_seconds": update,
        **({"useful_tokens": [int(useful) / 100] * 2} if useful else {}),
    }
