"""The model of a run, its initial parameters, and the parameters that its stages produced."""

from __future__ import annotations

import functools
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from opsd_jax.config.run_options import RunOptions
from opsd_jax.models.lora import LoRA, Weights
from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.models.safetensors import WeightsError
from opsd_jax.options import ConfigError, fail, import_function
from opsd_jax.parallel import aot
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Model, Params, Policy
from opsd_jax.rollout import layout as layout_lib
from opsd_jax.storage import files
from opsd_jax.storage.files import Path, RecordError
from opsd_jax.storage.names import PARAMS, UNTRAINED
from opsd_jax.training import base_model, checkpoint
from opsd_jax.training.base_model import Base, BaseModel, identify
from opsd_jax.training.stage import Stage


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


class Form(NamedTuple):
    """A form in which a run has parameters: all of the model's, or `Weights` with an adapter.

    Attributes:
      abstract: shapes, dtypes and shardings in this form.
      evaluated: the model as evaluations sample from it.
      rollouts: the model as stages sample from it: `evaluated`, or another if it is quantised.
    """

    abstract: Any
    evaluated: layout_lib.Sampler
    rollouts: layout_lib.Sampler


class Parameters:
    """The model and meshes of a run, with methods that return the parameters of each stage.

    The constructor compiles nothing and reads neither weights nor data.

    Attributes:
      lora: the adapter of the run; None if it has none.
      whole: the form of all parameters of the model.
      adapted: the form of a base model with an adapter; None for a run without an adapter.
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
          ConfigError: the model, its sharding rules, its adapter and the meshes do not fit
            together.
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
        self.whole = self._form(self.abstract, rollouts, lambda params: params)
        self.lora: LoRA | None = None
        self.adapted: Form | None = None
        if config.adapter.kind == "none" and self._continues_adapter:
            raise ConfigError(
                f"config.init_from is {config.init_from!r}, the result of a stage that trained an "
                "adapter; expected config.adapter = lora(...) with the same options, or the result "
                "of a stage that trained all parameters."
            )
        if config.adapter.kind != "none":
            self.lora = LoRA(config.adapter, self.model, shapes, config.model.make)
            base = self.lora.abstract_base(self.abstract)
            abstract = Weights(base, self.lora.abstract(self.abstract))
            self.adapted = self._form(abstract, rollouts, self.lora.merged)
            self._check_given()

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

    def _form(self, abstract: Any, rollouts: Model, merged: Callable[[Any], Params]) -> Form:
        """Returns a form of the parameters, from which `merged` makes all of the model's."""

        def sampler(model: Model) -> layout_lib.Sampler:
            prepare = model.decode_params
            model = model._replace(decode_params=lambda params: prepare(merged(params)))
            return layout_lib.Sampler(model, abstract, self.decode_mesh)

        evaluated = sampler(self.model)
        return Form(abstract, evaluated, evaluated if rollouts is self.model else sampler(rollouts))

    @property
    def form(self) -> Form:
        """The form of the parameters that the run samples from, for compiling engines."""
        return self.adapted or self.whole

    def form_of(self, params: Any) -> Form:
        """Returns the form that parameters have."""
        adapted = self.adapted if isinstance(params, Weights) else None
        return adapted or self.whole

    def form_in(self, stage: str) -> Form:
        """Returns the form of the parameters in a stage."""
        return self.form if self.config.adapter.trains(stage) else self.whole

    def initial(self) -> Params:
        """Returns the initial parameters of the model: of another run, loaded, or random.

        Raises:
          ConfigError: the weights cannot be read.
        """
        if self.config.init_from and not self._continues_adapter:
            path = epath.Path(self.config.init_from) / PARAMS
            return self._of_another_run(lambda: checkpoint.restore_params(path, self.abstract))
        if self.model.load is not None:
            try:
                return self.model.load(self.abstract)
            except WeightsError as error:
                raise ConfigError(f"config.model: {error}") from error
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        init = jax.jit(self.model.init, out_shardings=shardings)
        return init(jax.random.key(seed_of(self.config, "init")))

    def _of_another_run(self, restore: Callable[[], Params]) -> Params:
        """Restores the result in `config.init_from`. Raises ConfigError if that fails."""
        try:
            return restore()
        except RecordError as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise ConfigError(
                f"config.init_from is {self.config.init_from!r}, whose parameters cannot be "
                f"restored ({files.reason(cause)}); expected the result of a run with the same "
                "config.model and config.adapter."
            ) from error

    def of(self, stage: str) -> Any:
        """Returns the parameters of a finished stage, or initial parameters for "" and UNTRAINED.

        The result is a `Weights` if the stage trained an adapter, or if the run begins with one.

        Raises:
          ConfigError: the stage has no result yet.
          RecordError: its adapter is of another base model.
        """
        stage = "" if stage == UNTRAINED else stage
        if self._has_adapter(stage):
            base = self.base(stage)
            return Weights(base.params, self._adapter(stage, base.model))
        return self._result(stage, self.abstract) if stage else self.initial()

    def merged(self, stage: str) -> Params:
        """Returns all parameters of a finished stage, to which its adapter has been added.

        Arguments and errors are those of `of`.
        """
        stage = "" if stage == UNTRAINED else stage
        if self.lora is None or not self._has_adapter(stage):
            return self.of(stage)
        params, model = self._base(stage)
        adapter = self._adapter(stage, model)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        lora, int8 = self.lora, self.config.adapter.base == "int8"

        def merge(params, adapter):
            base = lora.held(params) if int8 else params  # in 8 bits, as the stage has trained it
            merged = lora.merged(Weights(base, adapter))
            return jax.tree.map(lambda x, y: x.astype(y.dtype), merged, params)

        merge = jax.jit(merge, out_shardings=shardings, donate_argnums=0)
        return merge(params, adapter)

    def base(self, stage: str) -> Base:
        """Returns the base model of the adapter that a stage trains, or of the initial adapter.

        Its parameters have the dtypes of the matmuls, or 8 bits.
        """
        assert self.adapted is not None
        assert self.lora is not None
        params, model = self._base(stage)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.adapted.abstract.base)
        hold = jax.jit(self.lora.held, out_shardings=shardings)
        return Base(hold(params), model)

    def _base(self, stage: str) -> Base:
        """Returns the base model of an adapter with the dtypes of its parameters."""
        if source := self._source(stage):
            params, name = self._result(source, self.abstract), f"the result of the stage {source}"
        else:
            params, name = self.initial(), self._origin
        assert self.lora is not None
        return Base(params, identify(params, name, self._base_path(source), self.lora.about))

    def trained_adapter(self, stage: str) -> tuple[Params, BaseModel]:
        """Returns the adapter of a finished stage and what identifies its base model.

        The base model is not read.
        """
        assert self.adapted is not None
        adapter = self._result(stage, self.adapted.abstract.adapter)
        return adapter, self._saved_base(stage)

    def _base_path(self, source: str) -> str:
        """Returns the directory or the name of the base model of an adapter.

        It is "" if the base model is the result of a stage, or has random parameters.

        Args:
          source: the stage whose result the base model is; "" for none.
        """
        if source or (self.config.init_from and not self._continues_adapter):
            return ""
        path = str(getattr(self.config.model, "path", ""))
        return str(pathlib.Path(path).absolute()) if pathlib.Path(path).is_dir() else path

    def _saved_base(self, stage: str) -> BaseModel:
        return base_model.read(checkpoint.base_of(self.workdir / stage / PARAMS))

    def _source(self, stage: str) -> str:
        """Returns the stage whose result is the base model of a stage's adapter, or ""."""
        while stage and self.config.adapter.trains(stage):
            stage = self.config.sections[stage].init_from
        return stage

    @property
    def _origin(self) -> str:
        """Says where the initial parameters of the model come from."""
        if self.config.init_from and not self._continues_adapter:
            return f"config.init_from = {self.config.init_from!r}"
        path = getattr(self.config.model, "path", "")
        made = f"the model of {self.config.model.make}, seed {self.config.seed}"
        return f"config.model.path = {path!r}" if path else made

    def trained_form(self, stage: str) -> Params:
        """Returns shapes, dtypes and shardings of the parameters that a stage trains."""
        abstract = self.form_in(stage).abstract
        return abstract.adapter if isinstance(abstract, Weights) else abstract

    def first_trained(self, stage: str, base: BaseModel | None) -> Params:
        """Returns what a stage trains as it is at the beginning: all parameters, or an adapter.

        Args:
          stage: the stage.
          base: the base model of a stage that trains an adapter; None for any other stage.

        Raises:
          ConfigError: the parameters cannot be read.
          RecordError: an adapter is of another base model.
        """
        before = self.config.sections[stage].init_from
        if base is None:
            return self.merged(before)
        return self._new_adapter() if self.is_new(stage) else self._adapter(before, base)

    def first(self, stage: str, params: Any) -> Any:
        """Returns the parameters from before a stage, in the form that the stage has.

        Args:
          stage: the stage.
          params: its result, whose base model is used again.
        """
        if not isinstance(params, Weights):
            return self.merged(self.config.sections[stage].init_from)
        return Weights(params.base, self.first_trained(stage, self._saved_base(stage)))

    def is_new(self, stage: str) -> bool:
        """Returns whether a stage begins with a new adapter, which does not change its base."""
        return not self._has_adapter(self.config.sections[stage].init_from)

    def trained(self, stage: str) -> Model:
        """Returns the model in the form that a stage trains."""
        if not self.config.adapter.trains(stage):
            return self.model
        return self.model._replace(decode_params=lambda adapter: adapter)

    def computes_with_factors(self, stage: str) -> bool:
        """Returns whether a stage needs no gradients of matrices, only those of its adapter."""
        trains = self.config.adapter.trains(stage)
        return trains and self.lora is not None and self.lora.native

    def policy(self, stage: str) -> Policy:
        """Returns the policy for the parameters in the form that they have in a stage."""
        if self.lora is None or not self.config.adapter.trains(stage):
            return self.model.policy
        return self.lora.policy

    def adapt(self, made: Stage, stage: str) -> Stage:
        """Returns a stage that trains the adapter, if the config says so; otherwise `made`.

        Args:
          made: the stage, as its algorithm made it.
          stage: its name.
        """
        if self.lora is None or not self.config.adapter.trains(stage):
            return made
        teacher = made.teacher
        if self.is_new(stage) and teacher is not None and teacher.update is None:
            teacher = None  # it never changes, and a new adapter is the base model alone
        seed = seed_of(self.config, f"dropout/{stage}")
        return made._replace(
            joined=functools.partial(self.lora.applied, seed=seed), teacher=teacher
        )

    def _new_adapter(self) -> Params:
        assert self.lora is not None
        assert self.adapted is not None
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.adapted.abstract.adapter)
        init = jax.jit(self.lora.init, out_shardings=shardings)
        return init(jax.random.key(seed_of(self.config, "adapter")))

    def _adapter(self, stage: str, base: BaseModel) -> Params:
        """Returns the adapter that a stage has trained or, for "", with which the run begins."""
        assert self.adapted is not None
        abstract = self.adapted.abstract.adapter
        if stage:
            return self._result(stage, abstract, base)
        if self._continues_adapter:
            path = epath.Path(self.config.init_from) / PARAMS
            return self._of_another_run(lambda: checkpoint.restore_params(path, abstract, base))
        adapter_files, path = self.model.adapter_files, pathlib.Path(self.config.adapter.path)
        assert adapter_files is not None
        try:
            if saved := adapter_files.about(path).checksums:
                base.check({"name": "its base model", "checksums": saved}, path)
            return adapter_files.load(abstract, path)
        except (WeightsError, RecordError) as error:
            raise ConfigError(f"config.adapter.path: {error}") from error

    def _has_adapter(self, stage: str) -> bool:
        """Returns whether a stage trains an adapter or, for "", whether the run begins with one."""
        return self.config.adapter.trains(stage) if stage else self._has_given

    @property
    def _continues_adapter(self) -> bool:
        """Whether `config.init_from` is the result of a stage that trained an adapter."""
        return bool(self.config.init_from) and checkpoint.is_adapter(
            epath.Path(self.config.init_from) / PARAMS
        )

    @property
    def _has_given(self) -> bool:
        """Whether the run begins with an adapter of another run or in a directory."""
        return bool(self.config.adapter.path) or self._continues_adapter

    def _check_given(self) -> None:
        """Checks that the adapter with which the run begins is one that the config describes.

        Raises:
          ConfigError: it has another rank, alpha or other matrices, or it cannot be read.
        """
        options, given = self.config.adapter, self.config.adapter.path
        if not self._has_given or not self.config.stages or aot.is_planned():
            return  # nothing that this process does depends on it
        if not given:
            place = self.config.init_from
            there = base_model.read(checkpoint.base_of(epath.Path(place) / PARAMS)).adapter
        elif self._continues_adapter:
            fail("adapter.path", given, "'', because config.init_from begins with an adapter too")
        elif self.model.adapter_files is None:
            fail("adapter.path", given, "'', because the model has no `Model.adapter_files`")
        else:
            place = given
            try:
                about = self.model.adapter_files.about(pathlib.Path(given))
            except ValueError as error:
                raise ConfigError(f"config.adapter.path: {error}") from error
            there = {"rank": about.rank, "alpha": about.alpha, "targets": sorted(about.paths)}
        assert self.lora is not None
        for name, value in self.lora.about.items():
            same = math.isclose(value, there[name]) if name != "targets" else value == there[name]
            if not same:
                expected = f"{there[name]}, as the adapter in {place} has"
                fail(f"adapter.{name}", getattr(options, name), expected)

    def _result(self, stage: str, abstract: Params, base: BaseModel | None = None) -> Params:
        """Restores what a finished stage has trained.

        Raises:
          ConfigError: the stage has no result yet.
        """
        path = self.workdir / stage / PARAMS
        if not checkpoint.has_params(path):
            raise ConfigError(
                f"the stage {stage!r} has not finished: {path} does not exist. Expected a finished "
                "stage."
            )
        return checkpoint.restore_params(path, abstract, base)
