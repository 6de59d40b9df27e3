"""The command `convert`: writes a model directory for Hugging Face transformers."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping

import jax

from opsd_jax.config.run_options import RunOptions, parse_run
from opsd_jax.models import pretrained, weights
from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.options import ConfigError
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.parameters import Parameters, chosen_stage
from opsd_jax.storage import hub
from opsd_jax.storage.files import Path


def main(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs `opsd-jax convert` and returns the exit code.

    Raises:
      ConfigError: the model cannot be converted or written.
    """
    del overrides  # the command takes none
    dtype = arguments.dtype or ""
    try:
        if arguments.workdir is not None:
            with workdir_lib.trusting(arguments.workdir, arguments.trust):
                config = parse_run(workdir_lib.config_of(arguments.workdir))
                convert_stage(config, arguments.workdir, arguments.stage, arguments.out, dtype)
        elif arguments.stage is not None:
            raise ConfigError(
                "--stage applies to a run; expected --workdir in place of --model, or no --stage."
            )
        else:
            source = hub.local(arguments.model, hub.MODEL, "--model")
            pretrained.rewrite(source, arguments.out, dtype)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"model: {arguments.out}")
    return 0


def convert_stage(
    config: RunOptions,
    workdir: Path,
    stage: str | None,
    directory: pathlib.Path,
    dtype: str = "",
) -> None:
    """Writes a stage's parameters as a model directory that transformers can load.

    The parameters are sharded over the devices as the config specifies. With fewer devices they are
    sharded over all devices or, if that is not possible, stored on the first one.

    Args:
      config: the options of the run in `workdir`. No data are read.
      workdir: the work directory.
      stage: a finished stage, or UNTRAINED; None for the last finished one.
      directory: the directory to write. It must be absent or empty.
      dtype: dtype of the weights: "float32", "bfloat16" or "float16". "" takes the dtypes of the
        directory that the run started from or, without one, `config.model.param_dtype`.

    Raises:
      ConfigError: there is no such stage, it is not finished, or its model has no `save`.
      WeightsError: the directory has files in it, or cannot be written.
    """
    weights.check_new(directory)
    stage = chosen_stage(config.stages, workdir, stage)
    if stage is None:
        raise ConfigError(
            f"--workdir {workdir}: no stage of the run has finished. "
            "To write the initial parameters, pass --stage untrained."
        )
    parameters = _parameters(config, workdir)
    if parameters.model.save is None:
        raise ConfigError(
            f"config.model.make is {config.model.make!r}, which returns a Model without `save`; "
            "expected a function that returns a Model with `save`, such as "
            "opsd_jax.models.decoder:from_config."
        )
    parameters.model.save(parameters.of(stage), directory, dtype)


def _parameters(config: RunOptions, workdir: Path) -> Parameters:
    """Builds the `Parameters` of a run on the first of three meshes that fits the devices.

    It tries the mesh of the run, a mesh of all devices, and a mesh of one device, in this order.
    """
    every = jax.devices()
    for mesh, devices in ((config.mesh, every), ((1, -1, 1), every), ((1, 1, 1), every[:1])):
        try:
            mesh_lib.make_mesh(mesh, devices)
            here = dataclasses.replace(
                config,
                mesh=tuple(mesh),
                decode_mesh=(),
                rollout_quantisation=QuantisationOptions(),  # an exported model is exact
            )
            return Parameters(here, workdir, devices)
        except ValueError as error:
            reason = error
    raise reason
