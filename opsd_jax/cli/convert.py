"""The command `convert`: writes a directory for Hugging Face transformers, or for PEFT."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import pathlib
from collections.abc import Mapping

import jax

from opsd_jax.config.run_options import RunOptions, parse_run
from opsd_jax.models import peft, pretrained, weights
from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.options import ConfigError
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.parameters import Parameters, chosen_stage
from opsd_jax.storage import hub
from opsd_jax.storage.files import Path
from opsd_jax.storage.names import UNTRAINED

logger = logging.getLogger(__name__)


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
                convert = export_adapter if arguments.adapter else convert_stage
                convert(config, arguments.workdir, arguments.stage, arguments.out, dtype)
        elif arguments.stage is not None or arguments.adapter:
            given = "--adapter" if arguments.stage is None else "--stage"
            raise ConfigError(
                f"{given} applies to a run; expected --workdir in place of --model, or no {given}."
            )
        else:
            source = hub.local(arguments.model, hub.MODEL, "--model")
            pretrained.rewrite(source, arguments.out, dtype)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"{'adapter' if arguments.adapter else 'model'}: {arguments.out}")
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
    stage, parameters = _opened(config, workdir, stage, directory)
    if parameters.model.save is None:
        raise ConfigError(
            f"config.model.make is {config.model.make!r}, which returns a Model without `save`; "
            "expected a function that returns a Model with `save`, such as "
            "opsd_jax.models.decoder:from_config."
        )
    parameters.model.save(parameters.merged(stage), directory, dtype)


def export_adapter(
    config: RunOptions,
    workdir: Path,
    stage: str | None,
    directory: pathlib.Path,
    dtype: str = "",
) -> None:
    """Writes a stage's adapter as a directory that Hugging Face PEFT can load, in float32.

    The other arguments and errors are those of `convert_stage`.

    Raises:
      ConfigError: the stage trained no adapter, or its model cannot export it.
    """
    if dtype not in ("", "float32"):
        raise ConfigError(f"--dtype is {dtype}; expected no --dtype, because adapters are float32.")
    stage, parameters = _opened(config, workdir, stage, directory)
    if stage == UNTRAINED or not config.adapter.trains(stage):
        raise ConfigError(
            f"--adapter: the stage {stage!r} trained no adapter; expected a stage that did, or no "
            "--adapter."
        )
    if parameters.model.adapter_files is None:
        raise ConfigError(
            f"--adapter: config.model.make is {config.model.make!r}, which returns a Model without "
            "`adapter_files`; expected no --adapter, which writes the model with the adapter added."
        )
    adapter, base = parameters.trained_adapter(stage)
    about = peft.About(
        config.adapter.rank,
        config.adapter.alpha,
        tuple(sorted(adapter)),
        base.path,
        base.checksums,
        getattr(config.model, "param_dtype", "float32"),
        config.adapter.base,
    )
    parameters.model.adapter_files.save(adapter, directory, about, config.adapter.dropout)
    if not base.path:
        logger.warning(
            "the base model is %s, which PEFT needs too: write it with --stage, --dtype float32 "
            "and another --out, and without --adapter.",
            base.name,
        )


def _opened(
    config: RunOptions, workdir: Path, stage: str | None, directory: pathlib.Path
) -> tuple[str, Parameters]:
    """Returns the name of the stage to write, and the parameters of the run.

    Raises:
      ConfigError: no stage of the run has finished.
      WeightsError: `directory` has files in it.
    """
    weights.check_new(directory)
    stage = chosen_stage(config.stages, workdir, stage)
    if stage is None:
        raise ConfigError(
            f"--workdir {workdir}: no stage of the run has finished. "
            "To write the initial parameters, pass --stage untrained."
        )
    return stage, _parameters(config, workdir)


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
                stages=(),  # nothing is trained
                mesh=tuple(mesh),
                decode_mesh=(),
                rollout_quantisation=QuantisationOptions(),  # an exported model is exact
            )
            return Parameters(here, workdir, devices)
        except ValueError as error:
            reason = error
    raise reason
