"""The command `convert`: a Hugging Face directory of a run's result, or of another directory."""

from __future__ import annotations

import argparse
import pathlib

import jax
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.models import pretrained, weights
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.parameters import Parameters, chosen_stage
from opsd_jax.storage.files import Path


def run(arguments: argparse.Namespace) -> None:
    """Converts as the command line says.

    Raises:
      ConfigError: what is asked for cannot be converted, or not be written.
    """
    dtype = arguments.dtype or ""
    try:
        if arguments.workdir is not None:
            config = workdir_lib.config_of(arguments.workdir)
            of_run(config, arguments.workdir, arguments.stage, arguments.out, dtype)
        elif arguments.stage is not None:
            raise ValueError("--model has no stages; --stage goes with --workdir.")
        else:
            pretrained.rewrite(arguments.model, arguments.out, dtype)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from error


def of_run(
    config: ConfigDict,
    workdir: Path,
    stage: str | None,
    directory: pathlib.Path,
    dtype: str = "",
) -> None:
    """Writes the result of a stage as a directory that transformers loads.

    The parameters are spread over the devices as the config says or, where there are not as many,
    held by the first.

    Args:
      config: of the run in `workdir`; its data are not looked at.
      workdir: its directory.
      stage: a finished one, or UNTRAINED; the last that is finished if None.
      directory: what is written; absent or empty.
      dtype: of the weights, "float32", "bfloat16" or "float16"; by default those of the directory
        that the run began with or, without one, `config.model.param_dtype`.

    Raises:
      ConfigError: there is no such stage, it has not ended, or its model has no such form.
      WeightsError: the directory has files in it, or cannot be written.
    """
    weights.check_new(directory)
    stage = chosen_stage(config, workdir, stage)
    if stage is None:
        raise config_lib.ConfigError(f"no stage of the run in {workdir} has ended.")
    parameters = _parameters(config, workdir)
    if parameters.model.save is None:
        raise config_lib.ConfigError(
            f"config.model.make is {config.model.make!r}, whose Model has no `save`; expected one "
            "that has, as opsd_jax.models.decoder:from_config."
        )
    parameters.model.save(parameters.of(stage), directory, dtype)


def _parameters(config: ConfigDict, workdir: Path) -> Parameters:
    """On the run's mesh or, where that is of other devices, cut over all there are, or on one."""
    every = jax.devices()
    for mesh, devices in ((config.mesh, every), ((1, -1, 1), every), ((1, 1, 1), every[:1])):
        try:
            mesh_lib.make_mesh(mesh, devices)
            config.mesh, config.decode_mesh = tuple(mesh), ()
            return Parameters(config, workdir, devices)
        except ValueError as error:
            reason = error
    raise reason
