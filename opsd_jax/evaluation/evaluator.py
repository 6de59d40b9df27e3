"""Runs an evaluation: samples, verifies and records responses to problems."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import jax

from opsd_jax.data.task import Task
from opsd_jax.evaluation import records, statistics
from opsd_jax.evaluation.options import EvaluationOptions
from opsd_jax.parallel import hosts
from opsd_jax.policy import Params
from opsd_jax.problem import Problem
from opsd_jax.rollout import sampling
from opsd_jax.rollout.collect import Collector, Rollouts
from opsd_jax.rollout.diagnosis import diagnose
from opsd_jax.rollout.engines import Engines
from opsd_jax.storage import files
from opsd_jax.storage.files import Path
from opsd_jax.training.progress import Progress
from opsd_jax.training.signals import Interrupted, StopSignal
from opsd_jax.verify.pool import VerifierPool

logger = logging.getLogger(__name__)


class Evaluator:
    """Evaluates a model: samples and verifies responses to problems, and computes metrics."""

    def __init__(
        self,
        options: EvaluationOptions,
        task: Task,
        vocab_size: int,
        engines: Engines,
        pool: VerifierPool,
        convert: Callable[[Params], Params],
    ):
        """Creates an evaluator without compiling anything.

        Args:
          options: how responses are sampled.
          task: makes prompts and decodes responses.
          vocab_size: the vocabulary size of the model.
          engines: compiles the engine that samples.
          pool: verifies the responses.
          convert: converts parameters from the training layout to the decode layout.
        """
        self._options, self._task, self._vocab_size = options, task, vocab_size
        self._engines, self._pool, self._convert = engines, pool, convert

    def problems(self) -> list[Problem]:
        """Returns the held-out problems that the options select."""
        heldout = self._task.heldout
        return [heldout[i] for i in range(self._options.problems or len(heldout))]

    def __call__(
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
        """Evaluates the problems that have no records in `directory` yet.

        Args:
          name: name of the evaluation.
          params: parameters of the model, in the training layout.
          progress: shows the responses as they are recorded.
          stop: ends the evaluation between two chunks of decoding.
          problems: the problems to evaluate.
          directory: directory of the records. Check it first with `records.check_settings`.
          settings: the settings that `records.settings` returns.

        Returns:
          `(responses, summary)`: the records of all responses, in the order of the problems, and
          the statistics with the settings.

        Raises:
          Interrupted: a signal arrived. Problems whose responses were all sampled are recorded.
        """
        samples = self._options.samples
        progress.start(f"evaluate {name}", len(problems) * samples, unit="response")
        responses = hosts.from_first(lambda: records.resume(directory, samples))
        done = {record["problem"] for record in responses}
        left = [i for i, problem in enumerate(problems) if problem.id not in done]
        opened = records.recorder(directory, responses) if hosts.is_first() else nullcontext()
        with opened as file:
            pending = _Pending(file, self._task, samples, responses, progress)
            try:
                for rollouts in self._sample(params, problems, left, stop.check):
                    pending.add(rollouts)
            except Interrupted:
                pending.record(wait=True)
                raise
            pending.record(wait=True)
            order = {problem.id: i for i, problem in enumerate(problems)}
            responses.sort(key=lambda record: (order[record["problem"]], record["sample"]))
            if file is not None:
                records.rewrite(file, responses)
        summary = statistics.summarise(responses)
        progress.finish(
            f"accuracy {summary['accuracy']:.1%} ± {summary['accuracy_se']:.1%}, "
            f"length {summary['mean_length']:.1f} ± {summary['mean_length_se']:.1f} tokens"
        )
        if hosts.is_first():
            self._describe(name, responses)
        return responses, {"name": name, **summary, "settings": settings}

    def _describe(self, name: str, responses: Sequence[records.Record]) -> None:
        """Says how many responses have no answer and, if they are many, what to change."""
        diagnosis = diagnose(
            [record["verdict"] for record in responses],
            sum(record["correct"] for record in responses),
            lambda i: responses[i]["response"],
            section="evaluation",
            response_tokens=self._options.response_tokens,
            unanswered=self._task.unanswered,
        )
        logger.info("evaluation of %s: %s", name, diagnosis)

    def _sample(
        self,
        params: Params,
        problems: Sequence[Problem],
        left: Sequence[int],
        poll: Callable[[], None],
    ) -> Iterator[Rollouts]:
        """Samples responses. Yields a problem's rollouts as soon as all of them are complete."""
        if not left:
            return
        options = self._options
        engine = self._engines(
            slots=options.slots,
            group_size=options.samples,
            # Count recorded problems too: other shapes would round differently in bfloat16.
            rollouts=len(problems) * options.samples,
            prompt_tokens=options.prompt_tokens,
            response_tokens=options.response_tokens,
        )
        rollouts = Collector(engine, self._task, self._pool, options.samples).by_problem(
            self._convert(params),
            [problems[i] for i in left],
            # Every model gets the same random numbers, so that differences are less noisy.
            key=jax.random.key(options.seed),
            sampling_params=sampling.params(
                self._vocab_size,
                stop=self._task.tokenizer.eos_ids,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                min_p=options.min_p,
            ),
            numbers=left,
            poll=poll,
        )
        yield from (made for _, made in rollouts)


class _Pending:
    """Holds sampled rollouts until their verdicts arrive, and then records the rollouts."""

    def __init__(
        self,
        file: files.Lines | None,
        task: Task,
        samples: int,
        responses: list[dict[str, Any]],
        progress: Progress,
    ):
        """Creates an empty queue of rollouts.

        Args:
          file: the file to append records to, on the first host; None on the others.
          task: decodes the texts of the records.
          samples: responses per problem.
          responses: list to append records to, in place.
          progress: shows the number of records.
        """
        self._file, self._task, self._samples = file, task, samples
        self._responses, self._progress = responses, progress
        self._unjudged: list[Rollouts] = []

    def add(self, rollouts: Rollouts) -> None:
        """Adds a problem's rollouts, and then records all rollouts that have verdicts."""
        self._unjudged.append(rollouts)
        self.record(wait=False)

    def record(self, *, wait: bool) -> None:
        """Records all rollouts that have verdicts. With `wait`, first waits for every verdict."""
        judged = hosts.gathered([wait or rollouts.are_judged for rollouts in self._unjudged])
        late = []
        for rollouts, *everywhere in zip(self._unjudged, *judged, strict=True):
            if all(everywhere):
                made = records.records(rollouts, self._task, self._samples)
                if self._file is not None:
                    records.append(self._file, made)
                self._responses.extend(made)
            else:
                late.append(rollouts)
        self._unjudged = late
        self._progress.reach(len(self._responses))
