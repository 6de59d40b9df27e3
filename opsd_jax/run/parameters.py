"""The model of a run, its initial parameters, and the parameters that its stages produced."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
from etils import epath

from opsd_jax.config.run_options import RunOptions
from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.models.safetensors import WeightsError
from opsd_jax.options import ConfigError, import_function
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Model, Params
from opsd_jax.rollout import layout as layout_lib
from opsd_jax.storage import files
from opsd_jax.storage.files import Path, RecordError
from opsd_jax.storage.names import PARAMS, UNTRAINED
from opsd_jax.training import checkpoint


def seed_of(config: RunOptions, name: str) -> int:
    """Returns the seed of a named part of the run, an integer in [0, 2^31)."""
    return zlib.crc32(f"{config.seed}/{name}".encode()) >> 1


def stage_seed(config: RunOptions, name: str) -> int:
    """Returns the seed of a stage.

    Stages with the same algorithm that start from the same model draw the same problems and random
    numbers. A stage that follows one with the same algorithm draws different ones.
    """
    algorithm, ancestor = config.sections[name].algorithm, name
    before = []  # algorithms of the stages that led to this one
    while ancestor := config.sections[ancestor].init_from:
        before.append(config.sections[ancestor].algorithm)
    generation = before.count(algorithm)
    return seed_of(config, f"{algorithm}/{generation}" if generation else algorithm)


def chosen_stage(stages: Sequence[str], workdir: Path, stage: str | None) -> str | None:
    """Returns the stage that `--stage` names or, by default, the last finished stage.

    The result is None if `--stage` is absent and no stage has finished.

    Args:
      stages: the stages of the run, in order.
      workdir: the work directory of the run.
      stage: the value of `--stage`: a stage or UNTRAINED; None if it is absent.

    Raises:
      ConfigError: the run has no stage of that name.
    """
    if stage not in (None, UNTRAINED, *stages):
        raise ConfigError(
            f"--stage is {stage!r}; expected one of {', '.join((UNTRAINED, *stages))}."
        )
    finished = [s for s in stages if checkpoint.has_params(workdir / s / PARAMS)]
    return stage or (finished[-1] if finished else None)


def meshes(
    mesh: Sequence[int], decode_mesh: Sequence[int], devices: Sequence[jax.Device] | None = None
) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
    """Returns a mesh for training, and a mesh of the same devices for sampling.

    Args:
      mesh: `config.mesh`.
      decode_mesh: `config.decode_mesh`.
      devices: the devices to use; all devices by default.

    Raises:
      ConfigError: the number of devices does not fit one of the shapes.
    """
    field = "mesh"
    try:
        training = mesh_lib.make_mesh(mesh, devices)
        field = "decode_mesh"
        return training, mesh_lib.reshaped(training, decode_mesh)
    except ValueError as error:
        raise ConfigError(f"config.{field}: {error}") from error


class Parameters:
    """The model and meshes of a run, with methods that return the parameters of each stage.

    The constructor compiles nothing and reads neither weights nor data.

    Attributes:
      evaluated: the model as evaluations sample from it.
      rollouts: the model as stages sample from it: `evaluated`, or another if it is quantised.
    """

    def __init__(
        self,
        config: RunOptions,
        workdir: Path,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Builds the model and the meshes.

        Args:
          config: the options of the run.
          workdir: the work directory of the run, with the results of its finished stages.
          devices: the devices to use; all devices by default.

        Raises:
          ConfigError: the model, its sharding rules and the meshes do not fit together.
        """
        self.config, self.workdir = config, workdir
        make_model = import_function(config.model.make, "model.make")
        self.mesh, self.decode_mesh = meshes(config.mesh, config.decode_mesh, devices)
        try:
            self.model: Model = make_model(config.model)
            shapes = jax.eval_shape(self.model.init, jax.random.key(0))
            shardings = mesh_lib.tree_shardings(self.mesh, self.model.rules, shapes)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"config: {error}") from error
        rollouts = self._quantised()
        try:
            layout_lib.check_fits(self.model, shapes, self.decode_mesh)
            layout_lib.check_fits(rollouts, shapes, self.decode_mesh)
        except ValueError as error:
            raise ConfigError(f"config.decode_mesh: {error}") from error
        self.abstract = mesh_lib.abstract_of(shapes, shardings)
        self.evaluated = layout_lib.Sampler(self.model, self.abstract, self.decode_mesh)
        self.rollouts = self.evaluated
        if rollouts is not self.model:
            self.rollouts = layout_lib.Sampler(rollouts, self.abstract, self.decode_mesh)

    def _quantised(self) -> Model:
        """Returns the model that samples the rollouts of stages.

        Raises:
          ConfigError: the model cannot be quantised.
        """
        options = self.config.rollout_quantisation
        if options == QuantisationOptions():
            return self.model
        if self.model.quantised is None:
            raise ConfigError(
                f"config.rollout_quantisation has weights = {options.weights!r} and cache = "
                f"{options.cache!r}, but the model that config.model.make returns has no function "
                "`quantised`; expected 'none' for both, or a Model with this function."
            )
        return self.model.quantised(options)

    def initial(self) -> Params:
        """Returns the initial parameters of the run: of another run, loaded, or random.

        Raises:
          ConfigError: the weights cannot be read.
        """
        if self.config.init_from:
            path = epath.Path(self.config.init_from) / PARAMS
            try:
                return checkpoint.restore_params(path, self.abstract)
            except RecordError as error:
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                raise ConfigError(
                    f"config.init_from is {self.config.init_from!r}, whose parameters cannot be "
                    f"restored ({files.reason(cause)}); expected the result of a run with the same "
                    "config.model."
                ) from error
        if self.model.load is not None:
            try:
                return self.model.load(self.abstract)
            except WeightsError as error:
                raise ConfigError(f"config.model: {error}") from error
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        init = jax.jit(self.model.init, out_shardings=shardings)
        return init(jax.random.key(seed_of(self.config, "init")))

    def of(self, stage: str) -> Params:
        """Returns the parameters of a finished stage, or initial parameters for "" and UNTRAINED.

        Raises:
          ConfigError: the stage has no result yet.
        """
        if stage in ("", UNTRAINED):
            return self.initial()
        path = self.workdir / stage / PARAMS
        if not checkpoint.has_params(path):
            raise ConfigError(
                f"the stage {stage!r} has not finished: {path} does not exist. Expected a finished "
                "stage."
            )
        return checkpoint.restore_params(path, self.abstract)
