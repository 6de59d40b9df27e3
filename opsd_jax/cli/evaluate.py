"""The `evaluate` command: evaluates a stage's result, or a model directory.

    OUT/settings.json      the settings of the evaluation; different settings are refused
    OUT/responses.jsonl    every response with its verdict
    OUT/evaluation.json    the statistics and the settings; written last
    OUT/comparison.json    the changes since the evaluation in --compare
    OUT/report.md, index.html, *.svg

An interrupted evaluation resumes when the same command runs again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import pathlib
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from opsd_jax.config import sections
from opsd_jax.config.run_options import RunOptions, parse_run
from opsd_jax.evaluation import benchmarks, records, summary
from opsd_jax.models import peft
from opsd_jax.models.options import TPU_ONLY, default_dtype
from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.options import ConfigError, section
from opsd_jax.parallel import hosts
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.problem import Problem
from opsd_jax.run import assembly, compilation, pipeline
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.parameters import chosen_stage, meshes
from opsd_jax.storage import files, hub
from opsd_jax.storage.names import EVALUATIONS, PARAMS, UNTRAINED
from opsd_jax.training.progress import Progress
from opsd_jax.training.signals import StopSignal

logger = logging.getLogger(__name__)

# The evaluation settings of the paper (arXiv 2605.06188) for benchmarks.
PAPER = {
    "samples": 8,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "min_p": 0.0,
    "response_tokens": 30_000,
    "prompt_tokens": 2048,
}
CHANGES = (*PAPER, "slots", "seed")  # fields of config.evaluation that an argument sets
TEXT_TASK = "opsd_jax.data.text:task"


def main(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs `opsd-jax evaluate` and returns the exit code. Raises the same errors as `evaluate`."""
    del overrides  # the command takes none
    with workdir_lib.trusting(arguments.workdir, arguments.trust):
        statistics = evaluate(arguments)
    if hosts.is_first():
        print(files.to_json(statistics, indent=2))
        print(f"report: {statistics['directory']}/index.html", file=sys.stderr)
    return 0


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the evaluation that the command-line arguments describe.

    Returns:
      The statistics, the directory of the records as `directory`, and the changes since the earlier
      evaluation as `comparison`.

    Raises:
      ConfigError: the arguments contradict each other, the model or the directory.
      DataError: a benchmark cannot be used.
      Interrupted: a signal arrived. The finished problems are recorded.
    """
    stage, config = hosts.together(lambda: config_of(arguments))
    workdir = arguments.workdir
    # The work directory may come from somebody else, and to load a program executes its code.
    compilation.use_cache(compilation.AUTO, None)
    this = hosts.together(lambda: assembly.assemble(config, workdir or arguments.out))
    problems = this.evaluator.problems()
    if arguments.benchmark and arguments.problems:
        problems = _first_of_each(problems, arguments.problems)
    model = str(workdir / stage) if workdir else config.model.path
    settings = _settings(arguments, this, stage, model, problems)
    directory = arguments.out or (
        workdir / EVALUATIONS / stage / _name(list(config.data.heldout), settings)
    )
    if arguments.compare == directory:
        raise ConfigError(
            f"--compare {directory} is the directory of this evaluation; expected an earlier "
            "evaluation's directory."
        )
    if arguments.compare:
        summary.check_comparable(arguments.compare, problems)
    with (
        workdir_lib.locked(directory, "--out"),
        this.pool,
        StopSignal() as stop,
        Progress() as progress,
    ):
        hosts.from_first(lambda: records.check_settings(directory, settings))
        if not hosts.from_first((directory / records.SUMMARY).exists):
            _, statistics = this.evaluator(
                stage if workdir else _label(arguments, model),
                this.parameters.of(stage),
                progress,
                stop,
                problems=problems,
                directory=directory,
                settings=settings,
            )
            hosts.from_first(lambda: records.finish(directory, statistics))
        changes = hosts.from_first(lambda: summary.write(directory, arguments.compare))
        statistics = hosts.from_first(lambda: records.read(directory)[1])
    if changes and (warning := summary.warning(changes)) and hosts.is_first():
        logger.warning("opsd-jax: %s", warning)
    return statistics | {"directory": str(directory), "comparison": changes}


def _settings(
    arguments: argparse.Namespace,
    this: assembly.Run,
    stage: str,
    model: str,
    problems: list[Problem],
) -> dict[str, Any]:
    """Returns the settings of the evaluation, with fingerprints of the weights.

    Args:
      arguments: the command-line arguments.
      this: the run.
      stage: the stage to evaluate.
      model: the name or the directory of the model.
      problems: the problems to evaluate it on.
    """
    weights = arguments.workdir and arguments.workdir / stage / PARAMS
    weights = weights or hub.local(model, hub.MODEL, "--model")
    fingerprint = lambda path: hosts.together(lambda: records.fingerprint(path))
    settings = pipeline.evaluation_settings(this, model, fingerprint(weights), problems)
    if arguments.adapter:
        settings["adapter"] = fingerprint(arguments.adapter)
    if arguments.trust:
        settings["trusted"] = sorted({*arguments.trust})
    workdir_lib.check_equal(settings, "settings")
    return settings


def config_of(arguments: argparse.Namespace) -> tuple[str, RunOptions]:
    """Returns the stage to evaluate (its name, or UNTRAINED) and the config of the evaluation.

    The config runs no stage, and reads training data only if some of them are held out.

    Raises:
      ConfigError: the arguments contradict each other or the run.
    """
    if arguments.problems is not None and arguments.problems < 0:
        raise ConfigError(
            f"--problems is {arguments.problems}; expected a positive number, or 0 for all "
            "problems."
        )
    stage, config = _of_model(arguments) if arguments.workdir is None else _of_run(arguments)
    config.stages = ()
    for name, form in TPU_ONLY.items():
        if config.model.get(name) == form:
            config.model[name] = "auto"  # the machine that evaluates may have no TPU
    if arguments.mesh is not None:
        config.mesh, config.decode_mesh = arguments.mesh, ()
    if arguments.benchmark:
        _take_benchmarks(config, arguments.benchmark)
    elif arguments.problems is not None:
        config.evaluation.problems = arguments.problems
    if config.data.heldout:
        config.data.train, config.data.exclude = ConfigDict(), ConfigDict()
    given = {name: getattr(arguments, name) for name in CHANGES}
    config.evaluation.update({name: value for name, value in given.items() if value is not None})
    for name in records.PROMPTING:
        if getattr(arguments, name) is not None:
            config.data[name] = getattr(arguments, name)
    options = parse_run(config)
    options.data.check_sources("data")
    # An evaluation samples from the exact model, and int8 can exclude meshes.
    return stage, dataclasses.replace(options, rollout_quantisation=QuantisationOptions())


def _of_run(arguments: argparse.Namespace) -> tuple[str, ConfigDict]:
    """Returns the name of the stage to evaluate, and the unlocked config of its run."""
    if arguments.adapter:
        raise ConfigError(
            "--adapter applies to a model directory; expected --model in place of --workdir, or no "
            "--adapter. The adapter of a stage is evaluated with the stage."
        )
    config = workdir_lib.config_of(arguments.workdir)
    stage = chosen_stage(config.stages, arguments.workdir, arguments.stage) or UNTRAINED
    if arguments.benchmark and config.task != TEXT_TASK:
        raise ConfigError(
            f"--benchmark: the run's config.task is {config.task!r}, which generates its own "
            f"problems; expected a run whose task is {TEXT_TASK!r}."
        )
    return stage, config.unlock()


def _of_model(arguments: argparse.Namespace) -> tuple[str, ConfigDict]:
    """Returns UNTRAINED and an unlocked config for evaluating a model directory."""
    if not arguments.benchmark or arguments.out is None or arguments.stage is not None:
        given = "--adapter" if arguments.adapter else "--model"
        raise ConfigError(
            f"{given} evaluates a model outside a run, without stages or held-out problems; "
            "expected --benchmark and --out, and no --stage."
        )
    config = sections.default().unlock()
    # Nothing is trained, so the weights can have the dtype of the matmuls.
    dtype = default_dtype(jax.default_backend())
    named, field, param_dtype = arguments.model, "--model", dtype
    if arguments.adapter:
        about = _adapter(arguments.adapter, named)
        # The checksums of the base model are of its parameters in this dtype.
        named, param_dtype = named or about.base, about.param_dtype
        if not arguments.model:
            field = f"base_model_name_or_path in {arguments.adapter / peft.CONFIG}"
            _check_base(named, field)
        options = {"rank": about.rank, "alpha": about.alpha, "targets": about.paths}
        config.adapter = sections.lora(path=str(arguments.adapter), base=about.form, **options)
    path = hub.pinned(named, hub.MODEL, field)
    config.model = sections.pretrained(path, dtype=dtype, param_dtype=param_dtype).unlock()
    config.task, config.data.tokenizer = TEXT_TASK, path
    return UNTRAINED, config


def _label(arguments: argparse.Namespace, model: str) -> str:
    """Returns a name for the evaluation of a model directory, perhaps with an adapter."""
    names = [pathlib.PurePath(path).name for path in (model, arguments.adapter) if path]
    return " + ".join(names)


def _adapter(directory: pathlib.Path, model: str | None) -> peft.About:
    """Reads what the adapter in a directory is. `model` is the value of --model, or None."""
    try:
        about = peft.about(directory)
    except ValueError as error:
        raise ConfigError(f"--adapter: {error}") from error
    if not (model or about.base):
        raise ConfigError(f"--adapter {directory} does not name its model; expected --model too.")
    return about


def _check_base(model: str, field: str) -> None:
    """Raises ConfigError if the model that an adapter names is neither here nor on the Hub."""
    if not pathlib.Path(model).is_dir() and not hub.is_name(model, hub.MODEL):
        raise ConfigError(
            f"{field} is {model!r}, which is no directory on this machine; expected --model with "
            "the directory of the adapter's model."
        )


def _take_benchmarks(config: ConfigDict, named: list[str]) -> None:
    """Replaces the held-out problems with benchmarks, and applies the options of `PAPER`."""
    sources = dict(benchmarks.source(text) for text in named)
    if len(sources) < len(named):
        raise ConfigError(f"--benchmark names {', '.join(named)}; expected each name only once.")
    config.data.heldout = ConfigDict({name: section(options) for name, options in sources.items()})
    _, decode_mesh = meshes(config.mesh, config.decode_mesh)
    slots = 8 * mesh_lib.row_shards(decode_mesh)
    config.evaluation.update(PAPER | {"problems": 0, "slots": slots})


def _first_of_each(problems: list[Problem], count: int) -> list[Problem]:
    """Returns the first `count` problems of each source."""
    seen: Counter[str] = Counter()
    first = []
    for problem in problems:
        seen[problem.source] += 1
        if seen[problem.source] <= count:
            first.append(problem)
    return first


def _name(benchmarks: list[str], settings: dict[str, Any]) -> str:
    """Returns a directory name for an evaluation: its benchmarks and a digest of its settings."""
    named = {name: value for name, value in settings.items() if name != "model"}
    digest = hashlib.sha256(files.to_json(named, sort_keys=True).encode()).hexdigest()[:8]
    names = "+".join(sorted(benchmarks))[:200]  # file systems allow 255 characters
    return f"{names or 'heldout'}-{digest}"
