"""Builds and checks the objects that the stages and evaluations of a run share."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from opsd_jax.config.run_options import RunOptions
from opsd_jax.data.task import Task
from opsd_jax.evaluation.evaluator import Evaluator
from opsd_jax.options import ConfigError, import_function
from opsd_jax.parallel.mesh import row_shards
from opsd_jax.problem import DataError
from opsd_jax.rollout.engines import Engines
from opsd_jax.run import checks
from opsd_jax.run.parameters import Parameters, seed_of, stage_seed
from opsd_jax.stages import flops
from opsd_jax.stages.parts import Parts
from opsd_jax.storage.files import Path
from opsd_jax.training.stage import Stage
from opsd_jax.verify.pool import VerifierPool

NO_PLAN: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({})


class Run(NamedTuple):
    """The objects that the stages and evaluations of a run share.

    Attributes:
      config: the options of the run.
      workdir: its work directory.
      parameters: the model and its parameters.
      task: the data.
      pool: worker processes that judge responses.
      engines: compiles engines that sample for the stages.
      evaluator: evaluates parameters on held-out problems.
      planned: stage -> what the run's plan predicts for it
        (`opsd_jax.planning.plan_file.predictions`); empty without a plan.
    """

    config: RunOptions
    workdir: Path
    parameters: Parameters
    task: Task
    pool: VerifierPool
    engines: Engines
    evaluator: Evaluator
    planned: Mapping[str, Mapping[str, Any]] = NO_PLAN


def assemble(config: RunOptions, workdir: Path) -> Run:
    """Builds the `Run` of a config, and checks that its parts fit together.

    Raises:
      ConfigError: names the field that does not fit the devices, the model or the data.
      DataError: a source cannot be used.
    """
    parameters = Parameters(config, workdir)
    checks.check_devices(config, parameters.mesh, parameters.decode_mesh)
    model, form = parameters.model, parameters.form
    checks.check_pools(config, form.rollouts.model.policy, parameters.decode_mesh)
    checks.check_speculation(config, form.rollouts.model)
    checks.check_adapter(config, model)
    checks.check_positions(config, model.max_positions)
    task = make_task(config)
    seed = functools.partial(stage_seed, config)
    checks.check_data(config, task, model.vocab_size, seed, model.max_positions)
    pool = VerifierPool(task.verify, config.pool)
    engines = Engines(form.rollouts, task.tokenizer.pad_id)
    exact = engines
    if form.rollouts is not form.evaluated:
        exact = Engines(form.evaluated, task.tokenizer.pad_id)
    evaluator = Evaluator(
        config.evaluation,
        task,
        model.vocab_size,
        exact,
        pool,
        lambda params: parameters.form_of(params).evaluated.layout.convert(params),
    )
    return Run(config, workdir, parameters, task, pool, engines, evaluator)


def make_task(config: RunOptions) -> Task:
    """Builds the task: imports the function that `config.task` names, and calls it.

    The function gets `config.data`.

    Raises:
      ConfigError: the function cannot be imported, or rejects the section.
      DataError: a source cannot be used.
    """
    make = import_function(config.task, "task")
    try:
        return make(config.data)
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise ConfigError(f"config.task is {config.task!r}: {error}") from error


def stage_parts(this: Run, name: str, seed: int, poll: Callable[[], None]) -> Parts:
    """Returns the `Parts` from which a stage of the run is built.

    Args:
      this: the run.
      name: the name of the stage.
      seed: the seed of the stage.
      poll: called while the stage samples; an exception that it raises ends the sampling.
    """
    return Parts(
        task=this.task,
        model=this.parameters.trained(name),
        engines=this.engines,
        pool=this.pool,
        seed=seed,
        seed_of=functools.partial(seed_of, this.config),
        row_shards=row_shards(this.parameters.mesh),
        poll=poll,
        trained=flops.ADAPTED if this.parameters.computes_with_factors(name) else flops.TRAINED,
    )


def make_stage(this: Run, name: str, poll: Callable[[], None] = lambda: None) -> Stage:
    """Builds the stage that the config section `name` describes, and compiles its engines.

    Args:
      this: the run.
      name: the name of the section.
      poll: called while the stage samples; an exception that it raises ends the sampling.
    """
    options = this.config.sections[name]
    algorithm = this.config.algorithm(name)
    seed = stage_seed(this.config, name)
    stage = algorithm.make(options, stage_parts(this, name, seed, poll))
    stage = this.parameters.adapt(stage, name)
    if not algorithm.sampling(options):
        return stage
    # One conversion per step to the decode layout, whatever the step samples.
    convert = this.parameters.form_in(name).rollouts.layout.convert
    return stage._replace(
        batches=lambda step, params, *carried: stage.batches(step, convert(params), *carried)
    )
