"""The command `evaluate`: a stage's result, or a model's directory, on held-out problems.

    OUT/settings.json      what the figures depend on; other settings are refused
    OUT/responses.jsonl    every response, judged
    OUT/evaluation.json    the figures and the settings; once it is there the evaluation is done
    OUT/comparison.json    what changed since the evaluation in --compare
    OUT/report.md, index.html, *.svg

Started again after whatever stopped it, it goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from typing import Any

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.config import checks as validation
from opsd_jax.evaluation import benchmarks, summary
from opsd_jax.evaluation import records as evaluate
from opsd_jax.options import section
from opsd_jax.parallel import hosts
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.problem import Problem
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.parameters import UNTRAINED, chosen_stage, meshes
from opsd_jax.run.pipeline import Run
from opsd_jax.storage import files
from opsd_jax.training.progress import Progress
from opsd_jax.training.signals import StopSignal

# How the paper (arXiv 2605.06188) measures on benchmarks.
PAPER = {
    "samples": 8,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "min_p": 0.0,
    "response_tokens": 30_000,
    "prompt_tokens": 2048,
}
CHANGES = (*PAPER, "slots", "seed")
TEXT_TASK = "opsd_jax.data.text:task"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluates as the command line says.

    Returns:
      The figures; in `directory` where they are, and in `comparison` what changed.

    Raises:
      ConfigError: what is asked for cannot be run.
      DataError: a benchmark cannot be used.
      Interrupted: a signal came; what was done is kept.
    """
    stage, config = hosts.together(lambda: _config(arguments))
    workdir = arguments.workdir
    this = hosts.together(lambda: Run(config, workdir or arguments.out))
    problems = this.heldout()
    if arguments.benchmark and arguments.problems:
        problems = _first_of_each(problems, arguments.problems)
    model = workdir / stage if workdir else arguments.model
    weights = model / "params" if workdir else model
    fingerprint = hosts.together(lambda: evaluate.fingerprint(weights))
    settings = evaluate.settings(str(model), fingerprint, config, this.task, problems)
    workdir_lib.check_equal(settings, "settings")
    directory = arguments.out or (
        workdir / "evaluations" / stage / _name(list(config.data.heldout), settings)
    )
    if arguments.compare == directory:
        raise config_lib.ConfigError(f"--compare {directory} is the evaluation that is asked for.")
    if arguments.compare:
        summary.check_comparable(arguments.compare, problems)
    with (
        workdir_lib.locked(directory, "--out"),
        this.pool,
        StopSignal() as stop,
        Progress() as progress,
    ):
        hosts.from_first(lambda: evaluate.check_settings(directory, settings))
        if not hosts.from_first((directory / evaluate.SUMMARY).exists):
            _, figures = this.evaluate(
                stage if workdir else arguments.model.name,
                this.parameters.of(stage),
                progress,
                stop,
                problems=problems,
                directory=directory,
                settings=settings,
            )
            hosts.from_first(lambda: evaluate.finish(directory, figures))
        changes = hosts.from_first(lambda: summary.write(directory, arguments.compare))
        figures = hosts.from_first(lambda: evaluate.read(directory)[1])
    if changes and (warning := summary.warning(changes)) and hosts.is_first():
        print(f"opsd-jax: {warning}", file=sys.stderr)
    return figures | {"directory": str(directory), "comparison": changes}


def _config(arguments: argparse.Namespace) -> tuple[str, ConfigDict]:
    """The stage and the config of an evaluation. No stage is run in it, and it reads no training
    data but those of which a part is held out.
    """
    if arguments.problems is not None and arguments.problems < 0:
        raise config_lib.ConfigError(
            f"--problems {arguments.problems}: expected 0, for all, or more."
        )
    if arguments.model is None:
        config = workdir_lib.config_of(arguments.workdir)
        stage = chosen_stage(config, arguments.workdir, arguments.stage) or UNTRAINED
        if arguments.benchmark and config.task != TEXT_TASK:
            raise config_lib.ConfigError(
                f"--benchmark: the run's config.task is {config.task!r}, which has problems of its "
                f"own; expected a run of {TEXT_TASK!r}."
            )
    else:
        stage, config = UNTRAINED, config_lib.default()
        if not arguments.benchmark or arguments.out is None or arguments.stage is not None:
            raise config_lib.ConfigError(
                "--model belongs to no run; expected --benchmark and --out, and no --stage."
            )
    config.unlock()
    if arguments.model is not None:
        # Nothing is trained: the weights in the dtype of the products do.
        config.model = config_lib.pretrained(arguments.model, param_dtype="bfloat16")
        config.task, config.data.tokenizer = TEXT_TASK, str(arguments.model)
    config.stages = ()
    for name, form in (("cache", "paged"), ("attention", "splash")):
        if config.model.get(name) == form:
            config.model[name] = "auto"  # as the machine that evaluates has it
    if arguments.mesh is not None:
        config.mesh, config.decode_mesh = arguments.mesh, ()
    if arguments.benchmark:
        sources = dict(benchmarks.source(text) for text in arguments.benchmark)
        if len(sources) < len(arguments.benchmark):
            raise config_lib.ConfigError("--benchmark: a name comes twice; expected each once.")
        config.data.heldout = ConfigDict({name: section(s) for name, s in sources.items()})
        config.evaluation.update(
            PAPER | {"problems": 0, "slots": 8 * mesh_lib.row_shards(meshes(config)[1])}
        )
    elif arguments.problems is not None:
        config.evaluation.problems = arguments.problems
    if config.data.heldout:
        config.data.train, config.data.exclude = ConfigDict(), ConfigDict()
    given = {name: getattr(arguments, name) for name in CHANGES}
    config.evaluation.update({name: value for name, value in given.items() if value is not None})
    for name in evaluate.PROMPTING:
        if getattr(arguments, name) is not None:
            config.data[name] = getattr(arguments, name)
    config.lock()
    validation.validate(config)
    return stage, config


def _first_of_each(problems: list[Problem], count: int) -> list[Problem]:
    """The first problems of each source."""
    seen: Counter[str] = Counter()
    first = []
    for problem in problems:
        seen[problem.source] += 1
        if seen[problem.source] <= count:
            first.append(problem)
    return first


def _name(benchmarks: list[str], settings: dict[str, Any]) -> str:
    """The name of an evaluation's directory: another one for other settings."""
    told = {name: value for name, value in settings.items() if name != "model"}
    digest = hashlib.sha256(files.to_json(told, sort_keys=True).encode()).hexdigest()[:8]
    return f"{'+'.join(sorted(benchmarks)) or 'heldout'}-{digest}"
