"""Whether a config's sizes go with its devices and hold its data, before anything is compiled."""

from __future__ import annotations

import functools
import heapq
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import grain
import jax
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.data import contexts
from opsd_jax.data.contexts import Context
from opsd_jax.data.task import Task
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.problem import Problem
from opsd_jax.stages import opsd
from opsd_jax.stages import teacher as teacher_lib
from opsd_jax.verify.outcomes import Groups

# What is made into tokens of a data set before a run begins, if it has more elements than this:
WHOLLY_LOOKED_AT = 50_000
LONGEST = 256  # of problems in memory, those with the longest question, and with a solution to it;
LOOKED_AT = 64  # of others the first, as each may have to be made


def check_devices(
    config: ConfigDict, mesh: jax.sharding.Mesh, decode_mesh: jax.sharding.Mesh
) -> None:
    """Raises ConfigError where the devices do not go with a field; looks at no data.

    Args:
      config: of the run.
      mesh, decode_mesh: the devices as training and as sampling see them.
    """
    kind, tensor = mesh.devices.flat[0].platform, mesh.shape["tensor"]
    for name, form in (("cache", "paged"), ("attention", "splash")):
        runs = config.model.get(name) != form or kind == "tpu"
        _expect(runs, f"model.{name}", repr(form), f"'auto' on a {kind}: TPUs run it")

    def divides(field: str, value: int, mesh: jax.sharding.Mesh = decode_mesh) -> None:
        shards = mesh_lib.row_shards(mesh)
        _expect(value % shards == 0, field, value, f"a multiple of data x fsdp = {shards}")

    divides("evaluation.slots", config.evaluation.slots)
    for name in config.stages:
        section = config[name]
        divides(f"{name}.microbatch", section.microbatch, mesh)
        teaches = section.algorithm == "opsd"
        if config.model.get("sequence_parallel"):
            shapes = opsd.buckets(section) if teaches else [{"": n} for n in section.buckets]
            lengths = sorted({length for shape in shapes for length in shape.values()})
            whole = all(length % tensor == 0 for length in lengths)
            field = f"{name}.buckets{' with teacher_buckets' * teaches}"
            expected = f"multiples of tensor = {tensor}, over which tokens are cut"
            _expect(whole, field, lengths, expected)
        if section.algorithm != "sft":
            divides(f"{name}.slots", section.slots)
        if teaches and "memo" in section.contexts:
            divides(f"{name}.memo.slots", section.memo.slots)


def _expect(holds: bool, field: str, value: Any, expected: str) -> None:
    if not holds:
        raise config_lib.ConfigError(f"config.{field} is {value}; expected {expected}.")


def check(
    config: ConfigDict, task: Task, vocab_size: int, stage_seed: Callable[[str], int]
) -> None:
    """Raises ConfigError where the task's data do not go with a field, as far as a first look at
    them tells.

    Args:
      config: of the run.
      task: its data.
      vocab_size: the model's.
      stage_seed: name of a stage -> the seed of its demonstrations.
    """

    def looked_at(data: grain.MapDataset, wholly: int = WHOLLY_LOOKED_AT) -> Iterable[int]:
        if len(data) <= wholly:
            return range(len(data))
        if not (task.in_memory and (data is task.train or data is task.heldout)):
            return range(LOOKED_AT)
        question = [len(data[i].question) for i in range(len(data))]
        both = [n + len(data[i].solution or data[i].answer) for i, n in enumerate(question)]
        return {
            i
            for lengths in (question, both)
            for i in heapq.nlargest(LONGEST, range(len(data)), key=lengths.__getitem__)
        }

    @functools.cache
    def longest(data: grain.MapDataset, tokens: Callable) -> tuple[int, int]:
        return max((len(tokens(data[i])), i) for i in looked_at(data))

    def holds(field: str, value: int, data: grain.MapDataset, tokens: Callable) -> None:
        length, i = longest(data, tokens)
        row = data[i]
        whose = (
            f"problem {row.id}"
            if isinstance(row, Problem)
            else f"the demonstration to {task.tokenizer.decode(row.prompt)[:60]!r}"
        )
        _expect(length <= value, field, value, f"at least {length}, which {whose} has")

    tokens, words = vocab_size, task.tokenizer.vocab_size
    _expect(tokens >= words, "model.vocab_size", tokens, f"at least {words}, the tokenizer's")
    evaluation = config.evaluation
    there = len(task.heldout)
    expected = f"at most {there}, all that are held out"
    _expect(evaluation.problems <= there, "evaluation.problems", evaluation.problems, expected)
    holds("evaluation.prompt_tokens", evaluation.prompt_tokens, task.heldout, task.prompt)
    for name in config.stages:
        section = config[name]
        example = "sources, such as config.data.train.maths = config_lib.source('maths.jsonl')"
        _expect(len(task.train) > 0, "data.train", "empty", example)
        if section.algorithm == "sft":
            computed = lambda row: [*row.prompt, *row.response][:-1]
            rows = task.demonstrations(stage_seed(name))
            holds(f"{name}.buckets", section.buckets[-1], rows, computed)
            continue
        holds(f"{name}.prompt_tokens", section.prompt_tokens, task.train, task.prompt)
        if section.algorithm == "opsd":
            problems = [
                data[i] for data in (task.train, task.heldout) for i in looked_at(data, LONGEST)
            ]
            _check_contexts(task, name, section, problems)
            if warning := teacher_lib.warning(section.teacher):
                print(f"{name}: {warning}", file=sys.stderr)


def _check_contexts(
    task: Task, stage: str, section: ConfigDict, problems: Sequence[Problem]
) -> None:
    """Raises ConfigError for a context that the task cannot give, that no problem has, or for which
    a limit leaves no room; tells standard error how many lack one or lose a part of it.

    Args:
      task: of the run.
      stage, section: of the config, for OPSD.
      problems: trained on and held out, those that are looked at.
    """
    limit = section.teacher_prompt_tokens

    def fail(field: str, value: Any, why: Any) -> NoReturn:
        raise config_lib.ConfigError(f"config.{stage}.{field} is {value!r}; {why}")

    if section.reinject_every and task.reminder is None:
        fail("reinject_every", section.reinject_every, "expected 0: the task has no reminder.")
    for kind in section.contexts:
        about = contexts.context_kind(kind, f"{stage}.contexts")
        if kind == "memo" and task.memo_request is None:
            fail("contexts", kind, "expected none of 'memo': the task has no memo_request.")
        find: contexts.Find = contexts.nothing  # a text that depends on rollouts is not known yet
        if about.find is not None and not about.needs_group:
            find = about.find(section)
        wording = contexts.worded_as(kind)
        texts = [find(problem, 0, ()) for problem in problems]
        cut = 0
        try:
            for problem, text in zip(problems, texts, strict=True):
                cut += task.teacher_prompt(problem, Context(wording, text or ""), limit)[1]
        except ValueError as error:
            fail("teacher_prompt_tokens", limit, error)
        if section.reinject_every and task.reminder is not None:
            try:
                task.reminder(Context(wording, ""), section.reminder_tokens)
            except ValueError as error:
                fail("reminder_tokens", section.reminder_tokens, error)
        there = len(texts) - texts.count(None)
        if not there and len(section.contexts) == 1:
            fail(
                "contexts",
                (kind,),
                f"expected another: no problem that was looked at has a {kind}.",
            )
        if cut or there < len(texts):
            print(
                f"{stage}: of {len(texts)} problems looked at, {there} have a {kind}, and {cut} of "
                f"these lose a part of it to teacher_prompt_tokens = {limit}.",
                file=sys.stderr,
            )
    if "memo" in section.contexts and task.memo_request is not None:
        most = section.memo.request_tokens
        for problem in problems:
            for group in Groups._fields:
                needed = len(task.memo_request(problem, group))
                if needed > most:
                    why = f"expected at least {needed}, which the request on {problem.id} has."
                    fail("memo.request_tokens", most, why)
