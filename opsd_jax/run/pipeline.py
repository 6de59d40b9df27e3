"""A run: the stages in order, each followed by its evaluation, in one work directory.

    workdir/config.json               the config; a run with a different config is refused
    workdir/data.json                 digests of the problems; different problems are refused
    workdir/note.txt                  the task's note to the reader of the report
    workdir/<stage>/checkpoints/      checkpoints to resume from
    workdir/<stage>/params/           the stage's result, from which later stages start
    workdir/<stage>/metrics.jsonl     one row per step; TensorBoard events are next to it
    workdir/<stage>/groups.jsonl      how many rollouts of each problem were correct
    workdir/<stage>/settings.json     the settings of the evaluation of the result
    workdir/<stage>/responses.jsonl   responses to held-out problems, with verdicts
    workdir/<stage>/evaluation.json   statistics; the stage is finished if this file exists
    workdir/untrained/                the evaluation of the initial parameters
    workdir/report/                   tables and plots

An interrupted run resumes when the same command runs again.
"""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from opsd_jax.config import loading
from opsd_jax.config.run_options import RunOptions
from opsd_jax.data.task import Task
from opsd_jax.evaluation import divergence, records, report
from opsd_jax.evaluation.evaluator import Evaluator
from opsd_jax.options import ConfigError, import_function
from opsd_jax.parallel import hosts
from opsd_jax.policy import Params
from opsd_jax.problem import DataError, Problem
from opsd_jax.rollout.engines import Engines
from opsd_jax.run import checks
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.parameters import UNTRAINED, Parameters, seed_of, stage_seed
from opsd_jax.stages.parts import Parts
from opsd_jax.storage import files
from opsd_jax.storage.files import Path
from opsd_jax.training import checkpoint
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.loop import LoopOptions, run_stage
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.training.progress import Progress
from opsd_jax.training.signals import StopSignal
from opsd_jax.training.stage import Stage
from opsd_jax.verify.pool import VerifierPool

NOTE = "note.txt"  # the task's note for the reader of the report


class Run(NamedTuple):
    """The objects that the stages and evaluations of a run share.

    Attributes:
      config: the options of the run.
      workdir: its work directory.
      parameters: the model and its parameters.
      task: the data.
      pool: worker processes that judge responses.
      engines: compiles engines that sample.
      evaluator: evaluates parameters on held-out problems.
    """

    config: RunOptions
    workdir: Path
    parameters: Parameters
    task: Task
    pool: VerifierPool
    engines: Engines
    evaluator: Evaluator


def run(config: RunOptions, workdir: Path) -> None:
    """Runs the stages of a config that are not finished yet.

    Raises:
      ConfigError: the config cannot be run, or the work directory holds a run with a different
        config or different data. Nothing has been compiled yet.
      DataError: a source cannot be used.
      Interrupted: a signal arrived; a checkpoint was saved.
    """
    this = hosts.together(lambda: assemble(config, workdir))
    with (
        workdir_lib.claimed(config, workdir),
        this.pool,
        StopSignal() as stop,
        Progress() as progress,
    ):
        workdir_lib.check_data(this.task, workdir)
        hosts.from_first(lambda: files.write_atomically(workdir / NOTE, this.task.note))
        finished = hosts.from_first(
            lambda: [name for name in (UNTRAINED, *config.stages) if is_finished(workdir, name)]
        )
        if UNTRAINED not in finished:
            began = time.monotonic()
            initial = this.parameters.of(UNTRAINED)
            evaluate_and_record(this, UNTRAINED, initial, progress, stop, began)
            del initial
        for name in config.stages:
            if name in finished:
                continue
            # Steps of an earlier process count with their own time.
            rows = hosts.from_first(functools.partial(metrics_lib.read, workdir / name))
            began = time.monotonic() - sum(row["seconds"] for row in rows)
            params = train(this, name, progress, stop)
            checkpoint.save_params(workdir / name / "params", params)
            evaluate_and_record(this, name, params, progress, stop, began)
            del params  # frees the memory before the next stage


def assemble(config: RunOptions, workdir: Path) -> Run:
    """Builds the parts of a run and checks that they fit together.

    Raises:
      ConfigError: names the field that does not fit the devices, the model or the data.
      DataError: a source cannot be used.
    """
    parameters = Parameters(config, workdir)
    checks.check_devices(config, parameters.mesh, parameters.decode_mesh)
    task = make_task(config)
    seed = functools.partial(stage_seed, config)
    checks.check_data(config, task, parameters.model.vocab_size, seed)
    pool = VerifierPool(task.verify, config.pool)
    engines = Engines(parameters.model, lambda: parameters.decoding, task.tokenizer.pad_id)
    evaluator = Evaluator(
        config.evaluation,
        task,
        parameters.model.vocab_size,
        engines,
        pool,
        lambda params: parameters.decoding.convert(params),
    )
    return Run(config, workdir, parameters, task, pool, engines, evaluator)


def make_task(config: RunOptions) -> Task:
    """Builds the task by calling the function that `config.task` names with `config.data`.

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


def is_finished(workdir: Path, name: str) -> bool:
    """Returns whether a stage, or UNTRAINED, has its result and its evaluation."""
    has_result = name == UNTRAINED or checkpoint.has_params(workdir / name / "params")
    return has_result and (workdir / name / records.SUMMARY).exists()


def stage_parts(this: Run, seed: int, poll: Callable[[], None]) -> Parts:
    """Returns the objects from which a stage is built.

    Args:
      this: the run.
      seed: the seed of the stage.
      poll: called while the stage samples; an exception that it raises ends the sampling.
    """
    return Parts(
        task=this.task,
        model=this.parameters.model,
        engines=this.engines,
        pool=this.pool,
        seed=seed,
        seed_of=functools.partial(seed_of, this.config),
        poll=poll,
    )


def make_stage(this: Run, name: str, poll: Callable[[], None] = lambda: None) -> Stage:
    """Builds the stage that a section of the config describes, and compiles its engines.

    Args:
      this: the run.
      name: the name of the section.
      poll: called while the stage samples; an exception that it raises ends the sampling.
    """
    options = this.config.sections[name]
    algorithm = this.config.algorithm(name)
    stage = algorithm.make(options, stage_parts(this, stage_seed(this.config, name), poll))
    if not algorithm.sampling(options):
        return stage
    # One conversion per step to the decode layout, whatever the step samples.
    convert = this.parameters.decoding.convert
    return stage._replace(batches=lambda step, params: stage.batches(step, convert(params)))


def train(this: Run, name: str, progress: Progress, stop: StopSignal) -> Params:
    """Runs a stage from its newest checkpoint to its end; returns its parameters."""
    config = this.config
    options = config.sections[name]
    progress.start(name, options.steps, unit="step")
    stage = make_stage(this, name, stop.check)
    params = run_stage(
        stage,
        make_optimizer(options.optimizer, stage.steps * stage.updates),
        functools.partial(this.parameters.of, options.init_from),
        abstract_params=this.parameters.abstract,
        mesh=this.parameters.mesh,
        directory=this.workdir / name,
        options=LoopOptions(
            checkpoint_every=options.checkpoint_every,
            max_nonfinite=config.max_nonfinite,
            checkpoints=config.checkpoints,
            identity=loading.identity(config),
            wandb_project=config.wandb_project,
        ),
        stop=stop,
        report=progress.step,
    )
    progress.finish()
    return params


def evaluation_settings(
    this: Run, model: str, weights: str, problems: Sequence[Problem]
) -> dict[str, Any]:
    """Returns the `records.settings` of an evaluation in this run."""
    return records.settings(
        model,
        weights,
        evaluation=this.config.evaluation,
        data=this.config.data,
        dtype=getattr(this.config.model, "dtype", ""),  # a user's model may lack this field
        task=this.task,
        problems=problems,
    )


def evaluate_and_record(
    this: Run, name: str, params: Params, progress: Progress, stop: StopSignal, began: float
) -> None:
    """Evaluates the result of a stage and writes the summary, which marks the stage as finished.

    Args:
      this: the run.
      name: the stage, or UNTRAINED.
      params: the parameters to evaluate.
      progress: shows the evaluation.
      stop: ends the evaluation.
      began: the time.monotonic() at which the stage began.
    """
    problems, directory = this.evaluator.problems(), this.workdir / name
    # No fingerprint of the weights is needed: they are the result of the run in this directory.
    settings = evaluation_settings(this, name, "", problems)
    hosts.from_first(lambda: records.check_settings(directory, settings))
    responses, summary = this.evaluator(
        name, params, progress, stop, problems=problems, directory=directory, settings=settings
    )
    options = this.config.sections.get(name)
    if options is not None:
        measure_divergence(this, name, params, responses, stop)
    summary["steps"] = 0 if options is None else options.steps
    summary["seconds"] = time.monotonic() - began
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary["peak_rss_gib"] = peak / 2 ** (30 if sys.platform == "darwin" else 20)
    hosts.from_first(lambda: records.finish(directory, summary))


def measure_divergence(
    this: Run, name: str, params: Params, responses: list[dict[str, Any]], stop: StopSignal
) -> None:
    """Writes the divergence of a stage's model from its teacher, before and after the stage.

    The divergence is averaged at each position of the response. Each model is measured on its own
    held-out responses. The teacher has the parameters from before the stage. Nothing is written for
    a stage without a privileged teacher.

    Args:
      this: the run.
      name: the stage.
      params: the result of the stage.
      responses: the records of its evaluation.
      stop: ends the sampling of memos.
    """
    options, evaluation = this.config.sections[name], this.config.evaluation
    algorithm = this.config.algorithm(name)
    if algorithm.privileged is None:
        return
    seed = seed_of(this.config, "probe")
    parts = stage_parts(this, seed, stop.check)
    privileged = algorithm.privileged(options, parts, evaluation, evaluation.samples, seed)
    # Only memos need parameters, in the decode layout.
    samples = algorithm.privileged_sampling(options, evaluation, 0)
    convert = this.parameters.decoding.convert if samples else lambda params: params
    parameters = this.parameters
    probe = divergence.DivergenceProbe(
        options,
        evaluation,
        this.task,
        parameters.model.policy,
        parameters.mesh,
        parameters.abstract,
    )
    teacher = parameters.of(options.init_from)
    started_from = this.workdir / (options.init_from or UNTRAINED)
    before, _ = hosts.from_first(lambda: records.read(started_from))
    probed = max(1, divergence.PROBED // evaluation.samples)
    count = min(len(before) // evaluation.samples, probed)
    problems = [this.task.heldout[i] for i in range(count)]

    def curve(student: Params, responses: list[dict[str, Any]]) -> dict[str, Any]:
        rollouts = records.rollouts_of(problems, responses)
        n = len(rollouts.responses)
        taught = privileged(0, convert(student), rollouts, range(n), capacity=n)
        return probe(student=student, teacher=teacher, rollouts=rollouts, taught=taught.rows)

    curves = {"before": curve(teacher, before), "after": curve(params, responses)}
    if hosts.is_first():
        path = this.workdir / name / divergence.FILE
        files.write_atomically(path, files.to_json(curves) + "\n")


def write_report(config: RunOptions, workdir: Path) -> Path:
    """Writes the report to `workdir/report/`; returns the path of its HTML page."""
    path = workdir / NOTE
    note = path.read_text() if path.exists() else ""
    sections = {name: config.sections[name] for name in config.stages}
    return report.write(sections, workdir, UNTRAINED, note)
