"""Trains and evaluates the stages of a run in order, in one work directory.

    workdir/config.json               the config; a run with a different config is refused
    workdir/data.json                 digests of the problems; different problems are refused
    workdir/lineage.json              the runs that it was made from, if any
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
from collections.abc import Mapping, Sequence
from typing import Any

from opsd_jax.config import loading
from opsd_jax.config.run_options import RunOptions
from opsd_jax.evaluation import records, report
from opsd_jax.models.lora import Weights
from opsd_jax.options import ConfigError
from opsd_jax.parallel import hosts
from opsd_jax.policy import Params
from opsd_jax.problem import Problem
from opsd_jax.run import compilation, lineage, probe
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.assembly import NO_PLAN, Run, assemble, make_stage
from opsd_jax.storage import files
from opsd_jax.storage.files import Path
from opsd_jax.storage.names import PARAMS, UNTRAINED
from opsd_jax.training import checkpoint, speed
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.loop import LoopOptions, run_stage
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.training.progress import Progress
from opsd_jax.training.signals import StopSignal

NOTE = "note.txt"  # the task's note for the reader of the report


def run(
    config: RunOptions,
    workdir: Path,
    fork: lineage.Origin | None = None,
    *,
    profile: int | None = None,
    planned: Mapping[str, Mapping[str, Any]] = NO_PLAN,
) -> None:
    """Trains and evaluates the stages of a config in order. Skips finished stages.

    Args:
      config: the options of the run.
      workdir: its work directory.
      fork: a checkpoint of another run, from which this run goes on; None for none.
      profile: number of the step that each stage traces; None for none.
      planned: stage -> what a plan predicts for it (`opsd_jax.planning.plan_file.predictions`).

    Raises:
      ConfigError: the config cannot be run, or the work directory holds a run with a different
        config or different data. Nothing has been compiled yet.
      DataError: a source cannot be used.
      Interrupted: a signal arrived; a checkpoint was saved.
    """
    most = max((config.sections[name].steps for name in config.stages), default=0)
    if profile is not None and profile >= most:
        raise ConfigError(
            f"--profile is {profile}; expected less than {most}, the largest number of steps of a "
            "stage. Steps are counted from 0."
        )
    compilation.use_cache(config.compilation_cache, workdir)
    saved = hosts.together(lambda: compilation.saved_programs(config.executables))
    this = hosts.together(lambda: assemble(config, workdir))._replace(planned=planned)
    with (
        saved,
        workdir_lib.claimed(config, workdir, lambda: lineage.begin(config, workdir, fork)),
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
            params = train(this, name, progress, stop, profile)
            evaluate_and_record(this, name, params, progress, stop, began)
            del params  # frees the memory before the next stage


def is_finished(workdir: Path, name: str) -> bool:
    """Returns whether a stage has been trained and evaluated; for UNTRAINED, only evaluated."""
    has_result = name == UNTRAINED or checkpoint.has_params(workdir / name / PARAMS)
    return has_result and (workdir / name / records.SUMMARY).exists()


def train(
    this: Run, name: str, progress: Progress, stop: StopSignal, profile: int | None
) -> Params:
    """Builds a stage, trains it to its last step, saves its result and returns the parameters."""
    config = this.config
    options = config.sections[name]
    progress.start(name, options.steps, unit="step")
    stage = make_stage(this, name, stop.check)
    adapts = config.adapter.trains(name)
    base = this.parameters.base(name) if adapts else None
    params = run_stage(
        stage,
        make_optimizer(options.optimizer, stage.steps * stage.updates),
        functools.partial(this.parameters.first_trained, name, base and base.model),
        abstract_params=this.parameters.trained_form(name),
        mesh=this.parameters.mesh,
        directory=this.workdir / name,
        options=LoopOptions(
            checkpoint_every=options.checkpoint_every,
            max_nonfinite=config.max_nonfinite,
            max_without_signal=config.max_without_signal,
            checkpoints=config.checkpoints,
            identity=loading.identity(config),
            ancestors=hosts.from_first(lambda: lineage.identities(this.workdir)),
            wandb_project=config.wandb_project,
            profile=profile,
        ),
        stop=stop,
        report=progress.step,
        base=base,
    )
    progress.finish()
    checkpoint.save_params(this.workdir / name / PARAMS, params, base and base.model)
    return Weights(base.params, params) if base else params


def evaluation_settings(
    this: Run, model: str, weights: str, problems: Sequence[Problem]
) -> dict[str, Any]:
    """Returns the settings of an evaluation, as a dict that is saved with the responses."""
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
    """Evaluates a stage's parameters and writes the summary, which marks the stage as finished.

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
        probe.measure(this, name, params, responses, progress, stop)
    if name in this.planned:
        rows = hosts.from_first(functools.partial(metrics_lib.read, directory))
        summary["plan"] = speed.beside(this.planned[name], rows)
    summary["steps"] = 0 if options is None else options.steps
    summary["seconds"] = time.monotonic() - began
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary["peak_rss_gib"] = peak / 2 ** (30 if sys.platform == "darwin" else 20)
    hosts.from_first(lambda: records.finish(directory, summary))


def write_report(config: RunOptions, workdir: Path) -> Path:
    """Writes the report to `workdir/report/`, and returns the path of its HTML page."""
    path = workdir / NOTE
    note = path.read_text() if path.exists() else ""
    note = "\n".join(filter(None, [note, lineage.text(workdir)]))
    sections = {name: config.sections[name] for name in config.stages}
    return report.write(sections, workdir, note)
