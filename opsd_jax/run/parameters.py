"""A run's model and its parameters: those that it begins with, and those of its stages."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.models.safetensors import WeightsError
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Model, Params
from opsd_jax.rollout import layout as layout_lib
from opsd_jax.storage.files import Path
from opsd_jax.training import checkpoint

UNTRAINED = "untrained"  # the name under which the initial parameters are evaluated


def seed_of(config: ConfigDict, name: str) -> int:
    """A seed of its own for each part of the run, in [0, 2^31)."""
    return zlib.crc32(f"{config.seed}/{name}".encode()) >> 1


def chosen_stage(config: ConfigDict, workdir: Path, stage: str | None) -> str | None:
    """The stage that is named or, where none is, the last one that is finished; None without any.

    Raises:
      ConfigError: there is no stage of that name.
    """
    if stage not in (None, UNTRAINED, *config.stages):
        raise config_lib.ConfigError(
            f"--stage {stage}: expected one of {', '.join((UNTRAINED, *config.stages))}."
        )
    finished = [s for s in config.stages if checkpoint.has_params(workdir / s / "params")]
    return stage or (finished[-1] if finished else None)


def meshes(
    config: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
    """The devices, by default all, as training and as sampling see them.

    Raises:
      ConfigError: they do not go with `config.mesh` or `config.decode_mesh`; names it.
    """
    field = "mesh"
    try:
        mesh = mesh_lib.make_mesh(config.mesh, devices)
        field = "decode_mesh"
        return mesh, mesh_lib.reshaped(mesh, config.decode_mesh)
    except ValueError as error:
        raise config_lib.ConfigError(f"config.{field}: {error}") from error


class Parameters:
    """What a run needs of its model, without its data: nothing is compiled or read yet."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Raises ConfigError for what does not fit together, on these devices or on all."""
        self.config, self.workdir = config, workdir
        make_model = config_lib.import_function(config.model.make, "model.make")
        self.mesh, self.decode_mesh = meshes(config, devices)
        try:
            self.model: Model = make_model(config.model)
            shapes = jax.eval_shape(self.model.init, jax.random.key(0))
            shardings = mesh_lib.tree_shardings(self.mesh, self.model.rules, shapes)
        except ValueError as error:
            raise config_lib.ConfigError(f"config: {error}") from error
        try:
            layout_lib.check_fits(self.model, shapes, self.decode_mesh)
        except ValueError as error:
            raise config_lib.ConfigError(f"config.decode_mesh: {error}") from error
        self.abstract = mesh_lib.abstract_of(shapes, shardings)

    @functools.cached_property
    def decoding(self) -> layout_lib.Layout:
        """The parameters' layout while rollouts are sampled; compiles the way to it."""
        return layout_lib.decode_layout(self.model, self.abstract, self.decode_mesh)

    def fresh(self) -> Params:
        """The parameters that the run begins with, made or read where they belong.

        Raises:
          ConfigError: they cannot be read.
        """
        if self.model.load is not None:
            try:
                return self.model.load(self.abstract)
            except WeightsError as error:
                raise config_lib.ConfigError(f"config.model: {error}") from error
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        init = jax.jit(self.model.init, out_shardings=shardings)
        return init(jax.random.key(seed_of(self.config, "init")))

    def of(self, stage: str) -> Params:
        """The result of a finished stage, or the initial parameters for "" and UNTRAINED.

        Raises:
          ConfigError: the stage has no result yet.
        """
        if stage in ("", UNTRAINED):
            return self.fresh()
        path = self.workdir / stage / "params"
        if not checkpoint.has_params(path):
            raise config_lib.ConfigError(f"the stage {stage!r} has not ended: there is no {path}.")
        return checkpoint.restore_params(path, self.abstract)
