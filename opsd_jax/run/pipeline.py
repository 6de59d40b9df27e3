"""A run: the stages in order, each evaluated when it ends, in one working directory.

    workdir/config.json               what the run is; another config is refused
    workdir/data.json                 which problems of files it has, as digests; others are refused
    workdir/note.txt                  what the task says of its figures
    workdir/<stage>/checkpoints/      to go on from
    workdir/<stage>/params/           the stage's result: what later stages start from
    workdir/<stage>/metrics.jsonl     a row a step; TensorBoard events lie beside it
    workdir/<stage>/groups.jsonl      how many rollouts of each problem were correct
    workdir/<stage>/settings.json     what the figures of its evaluation depend on
    workdir/<stage>/responses.jsonl   held-out responses of the result, judged
    workdir/<stage>/evaluation.json   their figures; once it is there the stage is done
    workdir/untrained/                the evaluation of the parameters that the run began with
    workdir/report/

Started again after whatever stopped it, the run goes on where it was.
"""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import jax
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.config import loading as config_files
from opsd_jax.data.task import Task
from opsd_jax.evaluation import divergence, report, statistics
from opsd_jax.evaluation import records as evaluate
from opsd_jax.parallel import hosts
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Params
from opsd_jax.problem import DataError, Problem
from opsd_jax.rollout import sampling
from opsd_jax.rollout.collect import Collector, Rollouts
from opsd_jax.rollout.engine import Engine, EngineShape, shape_for
from opsd_jax.run import checks as sizes
from opsd_jax.run import workdir as workdir_lib
from opsd_jax.run.parameters import UNTRAINED, Parameters, seed_of
from opsd_jax.stages import memos, opsd, rlvr, sft
from opsd_jax.stages.privileged import Privileged
from opsd_jax.stages.rollouts import step_rollouts
from opsd_jax.storage import files
from opsd_jax.storage.files import Path
from opsd_jax.training import checkpoint
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.loop import run_stage
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.training.progress import Progress
from opsd_jax.training.signals import Interrupted, StopSignal
from opsd_jax.training.stage import Stage
from opsd_jax.verify.pool import PoolOptions, VerifierPool

NOTE = "note.txt"  # what a reader of the figures has to know, as the task says it


class Run:
    """The parts of a run that its stages share, built from the config: nothing is compiled yet."""

    def __init__(self, config: ConfigDict, workdir: Path):
        """Raises ConfigError for what does not fit together."""
        self.config, self.workdir = config, workdir
        self.parameters = Parameters(config, workdir)
        self.model, self.mesh = self.parameters.model, self.parameters.mesh
        sizes.check_devices(config, self.mesh, self.parameters.decode_mesh)
        make_task = config_lib.import_function(config.task, "task")
        try:
            self.task: Task = make_task(config.data)
        except (config_lib.ConfigError, DataError):
            raise
        except ValueError as error:
            raise config_lib.ConfigError(f"config.task is {config.task!r}: {error}") from error
        sizes.check(config, self.task, self.model.vocab_size, self.stage_seed)
        self.pool = VerifierPool(self.task.verify, PoolOptions(**config.pool))

    def stage_seed(self, name: str) -> int:
        """The seed of a stage: arms that start from one model draw the same problems and random
        numbers, and a stage that follows one of its own kind draws others.
        """
        algorithm, ancestor, generation = self.config[name].algorithm, name, 0
        while ancestor := self.config[ancestor].init_from:
            generation += self.config[ancestor].algorithm == algorithm
        return seed_of(self.config, f"{algorithm}/{generation}" if generation else algorithm)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - one run a process
    def _engine(self, shape: EngineShape) -> Engine:
        layout = self.parameters.decoding
        pad_id = self.task.tokenizer.pad_id
        return Engine(self.model, layout.abstract, layout.mesh, shape, pad_id=pad_id)

    def engine(
        self, slots: int, group_size: int, rollouts: int, prompt_tokens: int, response_tokens: int
    ) -> Engine:
        """An engine, compiled at the first request of its shape.

        Args:
          slots: rollouts in the making at once, of `rollouts` that there are at a time.
          group_size: rollouts of each prompt.
          rollouts: see above.
          prompt_tokens, response_tokens: the longest.
        """
        return self._engine(
            shape_for(
                slots=slots,
                group_size=group_size,
                rollouts=rollouts,
                prompt_tokens=prompt_tokens,
                response_tokens=response_tokens,
                shards=mesh_lib.row_shards(self.parameters.decode_mesh),
            )
        )

    def stage(self, name: str, poll: Callable[[], None] = lambda: None) -> Stage:
        """The stage of a section of the config; compiles what samples for it.

        Args:
          name: of the section.
          poll: called while it samples; what it raises ends that.
        """
        section, seed = self.config[name], self.stage_seed(name)
        if section.algorithm == "sft":
            return sft.stage(section, self.task, self.model.policy, seed)
        G, rollouts = section.group_size, section.prompts * section.group_size
        engine = self.engine(
            section.slots, G, rollouts, section.prompt_tokens, section.response_tokens
        )
        module = {"rlvr": rlvr, "opsd": opsd}[section.algorithm]
        roll_out = step_rollouts(
            section,
            self.task,
            Collector(engine, self.task, self.pool, G),
            seed,
            vocab_size=self.model.vocab_size,
            capacity=module.capacity(section),
            trains=functools.partial(module.trains, section),
            poll=poll,
        )
        keep = self.model.decode_params
        if section.algorithm == "rlvr":
            stage = rlvr.stage(section, self.task, self.model.policy, roll_out, keep)
        else:
            of_memos = seed_of(self.config, f"{seed}/memos")
            privileged = self.privileged(section, section, G, of_memos, poll)
            stage = opsd.stage(section, self.task, self.model.policy, roll_out, privileged, keep)
        # Cast and moved once a step, whatever the step samples.
        convert = self.parameters.decoding.convert
        return stage._replace(batches=lambda step, params: stage.batches(step, convert(params)))

    def privileged(
        self,
        section: ConfigDict,
        sampled: ConfigDict,
        group_size: int,
        seed: int,
        poll: Callable[[], None],
    ) -> Privileged:
        """Who finds the contexts of an OPSD stage; compiles the sampling of memos, if it has any.

        Args:
          section: of the stage.
          sampled: of the rollouts: their `prompt_tokens` and `response_tokens`.
          group_size: rollouts of each problem.
          seed: of memos.
          poll: as in `stage`.
        """
        if "memo" not in section.contexts:
            return Privileged(section, self.task, group_size)
        longest = memos.sizes(
            section.memo, self.task, sampled.prompt_tokens, sampled.response_tokens
        )
        slots = section.memo.slots
        write, close = (self.engine(slots, 1, slots, *sizes) for sizes in longest)
        writer = memos.Memos(
            section.memo, self.task, seed, self.model.vocab_size, write, close, poll
        )
        return Privileged(section, self.task, group_size, writer)

    def is_done(self, name: str) -> bool:
        """Whether a stage, or UNTRAINED, is evaluated and its result is there."""
        directory = self.workdir / name
        has_result = name == UNTRAINED or checkpoint.has_params(directory / "params")
        return has_result and (directory / evaluate.SUMMARY).exists()

    def heldout(self) -> list[Problem]:
        """The held-out problems that are evaluated."""
        heldout = self.task.heldout
        return [heldout[i] for i in range(self.config.evaluation.problems or len(heldout))]

    def evaluate(
        self,
        name: str,
        params: Params,
        progress: Progress,
        stop: StopSignal,
        *,
        problems: Sequence[Problem],
        directory: Path,
        settings: dict[str, Any],
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Samples and judges responses to problems: `(responses, figures)`. What is done stands in
        the directory, a problem at a time, and is not done again.

        Args:
          name: of the evaluation.
          params: of the model.
          progress: shows it.
          stop: ends it between two chunks of decoding.
          problems: the evaluated ones.
          directory: of the records, with these settings (`evaluate.check_settings`).
          settings: `evaluate.settings`.

        Raises:
          Interrupted: a signal came; every problem whose responses had all been handed out is kept.
        """
        config = self.config.evaluation
        progress.start(f"evaluate {name}", len(problems) * config.samples, unit="response")
        responses = hosts.from_first(lambda: evaluate.resume(directory, config.samples))
        done = {record["problem"] for record in responses}
        left = [i for i, problem in enumerate(problems) if problem.id not in done]
        unjudged: list[Rollouts] = []

        def record(*, wait: bool) -> None:
            judged = hosts.gathered([wait or rollouts.are_judged for rollouts in unjudged])
            late = []
            for rollouts, *everywhere in zip(unjudged, *judged, strict=True):
                if all(everywhere):
                    made = evaluate.records(rollouts, self.task, config.samples)
                    if file is not None:
                        evaluate.append(file, made)
                    responses.extend(made)
                else:
                    late.append(rollouts)
            unjudged[:] = late
            progress.reach(len(responses))

        order = {problem.id: i for i, problem in enumerate(problems)}
        recorder = evaluate.recorder(directory, responses) if hosts.is_first() else nullcontext()
        with recorder as file:
            try:
                for rollouts in self._responses(params, problems, left, stop.check):
                    unjudged.append(rollouts)
                    record(wait=False)
            except Interrupted:
                record(wait=True)
                raise
            record(wait=True)
            responses.sort(key=lambda record: (order[record["problem"]], record["sample"]))
            if file is not None:
                evaluate.rewrite(file, responses)
        figures = statistics.summarise(responses)
        progress.finish(
            f"accuracy {figures['accuracy']:.1%} ± {figures['accuracy_se']:.1%}, "
            f"length {figures['mean_length']:.1f} ± {figures['mean_length_se']:.1f} tokens"
        )
        return responses, {"name": name, **figures, "settings": settings}

    def _responses(
        self,
        params: Params,
        problems: Sequence[Problem],
        left: Sequence[int],
        poll: Callable[[], None],
    ) -> Iterator[Rollouts]:
        """Samples responses to those of the problems that are left, yields those of one at a time
        as they are made, and has them judged meanwhile.
        """
        if not left:
            return
        config = self.config.evaluation
        engine = self.engine(
            config.slots,
            config.samples,
            # Not fewer where some are done: in bfloat16 other shapes round in another way.
            len(problems) * config.samples,
            config.prompt_tokens,
            config.response_tokens,
        )
        rollouts = Collector(engine, self.task, self.pool, config.samples).by_problem(
            self.parameters.decoding.convert(params),
            [problems[i] for i in left],
            # The same random numbers for every model: two differ with less noise.
            key=jax.random.key(config.seed),
            rule=sampling.rule(
                self.model.vocab_size,
                stop=self.task.tokenizer.eos_ids,
                **{n: config[n] for n in ("temperature", "top_k", "top_p", "min_p")},
            ),
            numbers=left,
            poll=poll,
        )
        yield from (made for _, made in rollouts)

    def evaluate_and_record(
        self, name: str, params: Params, progress: Progress, stop: StopSignal, began: float
    ) -> None:
        """Evaluates a stage's result and writes down what belongs to it: the stage is done.

        Args:
          name: the stage, or UNTRAINED.
          params: its result.
          progress: shows the evaluation.
          stop: ends it.
          began: the time.monotonic() from which the stage's seconds count.
        """
        problems, directory = self.heldout(), self.workdir / name
        # The directory is the run's own: its weights are no others.
        settings = evaluate.settings(name, "", self.config, self.task, problems)
        hosts.from_first(lambda: evaluate.check_settings(directory, settings))
        responses, figures = self.evaluate(
            name,
            params,
            progress,
            stop,
            problems=problems,
            directory=directory,
            settings=settings,
        )
        section = self.config.get(name)
        if section is not None and section.algorithm == "opsd":
            self.probe_divergence(name, params, responses, stop)
        figures["steps"] = 0 if section is None else section.steps
        figures["seconds"] = time.monotonic() - began
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        figures["peak_rss_gib"] = peak / 2 ** (30 if sys.platform == "darwin" else 20)
        hosts.from_first(lambda: evaluate.finish(directory, figures))

    def probe_divergence(
        self, name: str, params: Params, responses: list[dict], stop: StopSignal
    ) -> None:
        """Writes the divergence from the stage's teacher by position, before and after the stage,
        each on the model's own held-out responses. The teacher is the model before the stage.
        """
        section, config = self.config[name], self.config.evaluation
        privileged = self.privileged(
            section, config, config.samples, seed_of(self.config, "probe"), stop.check
        )
        # What writes memos has the parameters as decoding has them; nothing else looks at them.
        convert = self.parameters.decoding.convert if "memo" in section.contexts else lambda p: p
        probe = divergence.DivergenceProbe(
            section, config, self.task, self.model.policy, self.mesh, self.parameters.abstract
        )
        teacher = self.parameters.of(section.init_from)
        started_from = self.workdir / (section.init_from or UNTRAINED)
        before, _ = hosts.from_first(lambda: evaluate.read(started_from))
        there = min(len(before) // config.samples, max(1, divergence.PROBED // config.samples))
        problems = [self.task.heldout[i] for i in range(there)]

        def curve(student: Params, responses: list[dict[str, Any]]) -> dict[str, Any]:
            rollouts = evaluate.rollouts_of(problems, responses)
            n = len(rollouts.responses)
            taught = privileged(0, convert(student), rollouts, range(n), capacity=n)
            return probe(student=student, teacher=teacher, rollouts=rollouts, taught=taught.rows)

        curves = {"before": curve(teacher, before), "after": curve(params, responses)}
        path = self.workdir / name / divergence.FILE
        if hosts.is_first():
            files.write_atomically(path, files.to_json(curves) + "\n")


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs what is left of the config's stages.

    Raises:
      ConfigError: before anything is compiled; also where the data are not what they were.
      Interrupted: a signal came; what was done is saved.
    """
    this = hosts.together(lambda: Run(config, workdir))
    with (
        workdir_lib.claimed(config, workdir),
        this.pool,
        StopSignal() as stop,
        Progress() as progress,
    ):
        workdir_lib.check_data(this.task, workdir)
        hosts.from_first(lambda: files.write_atomically(workdir / NOTE, this.task.note))
        done = hosts.from_first(lambda: [n for n in (UNTRAINED, *config.stages) if this.is_done(n)])
        if UNTRAINED not in done:
            began = time.monotonic()
            this.evaluate_and_record(UNTRAINED, this.parameters.of(""), progress, stop, began)
        for name in config.stages:
            if name in done:
                continue
            # The steps that are done already took their time before this process began.
            rows = hosts.from_first(functools.partial(metrics_lib.read, workdir / name))
            began = time.monotonic() - sum(row["seconds"] for row in rows)
            section = config[name]
            progress.start(name, section.steps, unit="step")
            stage = this.stage(name, stop.check)
            params = run_stage(
                stage,
                make_optimizer(section.optimizer, stage.steps * stage.updates),
                functools.partial(this.parameters.of, section.init_from),
                abstract_params=this.parameters.abstract,
                mesh=this.mesh,
                directory=workdir / name,
                checkpoint_every=section.checkpoint_every,
                keep=checkpoint.Retention(**config.checkpoints),
                about=config_files.identity(config),
                max_nonfinite=config.max_nonfinite,
                stop=stop,
                report=progress.step,
                wandb_project=config.wandb_project,
            )
            progress.finish()
            checkpoint.save_params(workdir / name / "params", params)
            this.evaluate_and_record(name, params, progress, stop, began)
            del params  # the next stage has its own


def write_report(config: ConfigDict, workdir: Path) -> Path:
    """Writes `workdir/report/`; returns the path of its page."""
    path = workdir / NOTE
    note = path.read_text() if path.exists() else ""
    return report.write(config, workdir, UNTRAINED, note)
