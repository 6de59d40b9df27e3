"""Measures the model's divergence from its privileged teacher, before and after a stage."""

from __future__ import annotations

from typing import Any

from opsd_jax.evaluation import divergence, records
from opsd_jax.parallel import hosts
from opsd_jax.policy import Params
from opsd_jax.run.assembly import Run, stage_parts
from opsd_jax.run.parameters import seed_of
from opsd_jax.stages.privileged import PrivilegedOptions, privileged_options
from opsd_jax.storage import files
from opsd_jax.storage.names import UNTRAINED
from opsd_jax.training.progress import Progress
from opsd_jax.training.signals import StopSignal


def measure(
    this: Run,
    name: str,
    params: Params,
    responses: list[dict[str, Any]],
    progress: Progress,
    stop: StopSignal,
) -> None:
    """Measures the model's divergence from its teacher before and after a stage, and saves it.

    The divergence is averaged at each position of the response. Each model is measured on its own
    held-out responses. The teacher has the parameters from before the stage. Nothing is written for
    a stage without a privileged teacher.

    Args:
      this: the run.
      name: the stage.
      params: the result of the stage.
      responses: the records of its evaluation.
      progress: shows the responses that are measured.
      stop: ends the measurement.
    """
    evaluation = this.config.evaluation
    algorithm = this.config.algorithm(name)
    if algorithm.privileged is None or not evaluation.divergence_responses:
        return
    options = privileged_options(this.config.sections[name])
    seed = seed_of(this.config, "probe")
    parts = stage_parts(this, name, seed, stop.check)
    privileged = algorithm.privileged(options, parts, evaluation, evaluation.samples, seed)
    # Only memos need parameters, in the decode layout.
    samples = algorithm.privileged_sampling(options, evaluation, 0)
    form = this.parameters.form_in(name)
    convert = form.rollouts.layout.convert if samples else lambda params: params
    teacher = this.parameters.first(name, params)
    started_from = this.workdir / (options.init_from or UNTRAINED)
    before, _ = hosts.from_first(lambda: records.read(started_from))
    count = divergence.probed(evaluation, len(before) // evaluation.samples)
    problems = [this.task.heldout[i] for i in range(count)]
    progress.start(f"divergence {name}", 2 * count * evaluation.samples, unit="response")
    probe = _probe(this, name, options)

    def advance(number: int) -> None:
        stop.check()
        progress.advance(number)

    def curve(student: Params, responses: list[dict[str, Any]]) -> dict[str, Any]:
        rollouts = records.rollouts_of(problems, responses)
        n = len(rollouts.responses)
        taught = privileged(0, convert(student), rollouts, range(n), capacity=n)
        return probe(
            student=student, teacher=teacher, rollouts=rollouts, taught=taught.rows, advance=advance
        )

    curves = {"before": curve(teacher, before), "after": curve(params, responses)}
    progress.finish()
    if hosts.is_first():
        path = this.workdir / name / divergence.FILE
        files.write_atomically(path, files.to_json(curves) + "\n")


def _probe(this: Run, name: str, options: PrivilegedOptions) -> divergence.DivergenceProbe:
    """Compiles the probe of the stage `name`, which has the given options."""
    parameters = this.parameters
    return divergence.DivergenceProbe(
        options,
        this.config.evaluation,
        this.task,
        parameters.policy(name),
        parameters.mesh,
        parameters.form_in(name).abstract,
    )
