"""Checks, before anything is compiled, that a config fits the devices and the data."""

from __future__ import annotations

import functools
import heapq
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import jax

from opsd_jax.config.run_options import RunOptions
from opsd_jax.data.task import Task
from opsd_jax.models.options import TPU_ONLY
from opsd_jax.options import ConfigError, fail
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Model, Policy
from opsd_jax.problem import Problem
from opsd_jax.rollout import speculation
from opsd_jax.rollout.pages import pool_sizes
from opsd_jax.stages.algorithm import DataSample
from opsd_jax.stages.options import RolloutOptions
from opsd_jax.stages.privileged import PrivilegedOptions, inserted_tokens

logger = logging.getLogger(__name__)

# The rows of a dataset that are tokenized before a run begins:
WHOLE = 50_000  # all rows, if there are at most this many;
LONGEST = 256  # in a larger dataset in memory, the rows with the longest questions and solutions;
FIRST = 64  # in any other dataset, the first rows, because each row may have to be generated

LIMIT = (
    "the model's max_position_embeddings. To go beyond, set config.model.max_positions to the "
    "number that you want"
)


def check_devices(
    config: RunOptions, mesh: jax.sharding.Mesh, decode_mesh: jax.sharding.Mesh
) -> None:
    """Checks that a config fits the devices. Reads no data.

    Args:
      config: the options of the run.
      mesh: the devices while training.
      decode_mesh: the devices while sampling.

    Raises:
      ConfigError: a field does not fit the devices.
    """
    kind, tensor = mesh.devices.flat[0].platform, mesh.shape["tensor"]
    for name, form in TPU_ONLY.items():
        if getattr(config.model, name, None) == form and kind != "tpu":
            fail(f"model.{name}", form, f"'auto' on a {kind}, because {form!r} runs only on TPUs")

    def check_divides(field: str, value: int, mesh: jax.sharding.Mesh) -> None:
        shards = mesh_lib.row_shards(mesh)
        if value % shards:
            fail(
                field,
                value,
                f"a multiple of {shards}, the product of the mesh axes 'data' and 'fsdp'",
            )

    check_divides("evaluation.slots", config.evaluation.slots, decode_mesh)
    for name in config.stages:
        options = config.sections[name]
        algorithm = config.algorithm(name)
        check_divides(f"{name}.microbatch", options.microbatch, mesh)
        splits = ("sequence_parallel", "context_parallel")
        if any(getattr(config.model, option, False) for option in splits):
            shapes = algorithm.buckets(options)
            lengths = sorted({length for shape in shapes for length in shape.values()})
            if any(length % tensor for length in lengths):
                raise ConfigError(
                    f"config.{name}: the padded lengths of its buckets are {lengths}; expected "
                    f"multiples of {tensor}, because the mesh axis 'tensor' has that size."
                )
        for sampling in algorithm.sampling(options):
            check_divides(f"{name}.{sampling.slots_field}", sampling.slots, decode_mesh)


def check_adapter(config: RunOptions, model: Model) -> None:
    """Logs a warning if a stage adapts a model with random parameters, which stay as they are.

    Args:
      config: the options of the run.
      model: its model.
    """
    for name in config.stages:
        first = config.sections[name].init_from == ""
        random = not (config.init_from or config.adapter.path or model.load)
        if first and random and config.adapter.trains(name):
            logger.warning(
                "%s trains an adapter of a model with random parameters, which stay random. Train "
                "all parameters first: config.adapter.stages names the stages that train the "
                "adapter.",
                name,
            )


def check_speculation(config: RunOptions, model: Model) -> None:
    """Checks that the model can sample with speculation, if a stage does.

    Args:
      config: the options of the run.
      model: the model that samples the rollouts of stages.

    Raises:
      ConfigError: names the fields of the stage and the model.
    """
    for name in config.stages:
        options = config.sections[name]
        if not isinstance(options, RolloutOptions) or not options.speculation:
            continue
        try:
            speculation.check(model, options.speculation)
        except ValueError as error:
            field = f"config.{name}.speculation"
            dense = " Or set config.model.cache to 'dense'." if model.ragged else ""
            raise ConfigError(
                f"{field} is {options.speculation}, but {error}; expected 0.{dense}"
            ) from error


def check_pools(config: RunOptions, policy: Policy, decode_mesh: jax.sharding.Mesh) -> None:
    """Checks that the page pool of every stage has room for its longest rollout.

    Args:
      config: the options of the run.
      policy: the model that samples rollouts.
      decode_mesh: the devices while sampling.

    Raises:
      ConfigError: a pool is too small, or the model's cache has no pages.
    """
    for name in config.stages:
        for sampling in config.algorithm(name).sampling(config.sections[name]):
            try:
                pool_sizes(
                    policy,
                    slots=sampling.slots,
                    length=sampling.prompt_tokens + sampling.response_tokens,
                    shards=mesh_lib.row_shards(decode_mesh),
                    pool_tokens=sampling.pool_tokens,
                )
            except ValueError as error:
                raise ConfigError(f"config.{name}.{error}") from error


def check_positions(config: RunOptions, limit: int) -> None:
    """Checks that no prompt with its response can be longer than the model was made for.

    Args:
      config: the options of the run.
      limit: the most tokens of a sequence (`Model.max_positions`); 0 for any number.

    Raises:
      ConfigError: names the field to lower.
    """
    if not limit:
        return

    def check(field: str, value: int, others: int) -> None:
        if value + others <= limit:
            return
        if others >= limit:
            raise ConfigError(
                f"config.{field} is {value}, in addition to {others} tokens of prompt and "
                f"response; expected a sum of at most {limit} tokens, {LIMIT}."
            )
        expected = f"at most {limit - others}, so that the sequence has at most {limit} tokens"
        fail(field, value, f"{expected}, {LIMIT}")

    limits = config.evaluation
    try:
        check("evaluation.response_tokens", limits.response_tokens, limits.prompt_tokens)
    except ConfigError as error:
        raise ConfigError(f"{error} For `opsd-jax evaluate`, pass --response-tokens.") from None
    for name in config.stages:
        options = config.sections[name]
        for sampling in config.algorithm(name).sampling(options):
            field = f"{name}.{sampling.response_tokens_field}"
            check(field, sampling.response_tokens, sampling.prompt_tokens)
        if isinstance(options, PrivilegedOptions) and isinstance(options, RolloutOptions):
            response = options.response_tokens + inserted_tokens(options, options.response_tokens)
            check(f"{name}.teacher_prompt_tokens", options.teacher_prompt_tokens, response)


def check_data(
    config: RunOptions,
    task: Task,
    vocab_size: int,
    stage_seed: Callable[[str], int],
    max_positions: int = 0,
) -> None:
    """Checks that a config fits the data. Reads only a part of a large dataset.

    Args:
      config: the options of the run.
      task: the data of the run.
      vocab_size: the vocabulary size of the model.
      stage_seed: the name of a stage -> its seed.
      max_positions: the most tokens of a sequence (`Model.max_positions`); 0 for any number.

    Raises:
      ConfigError: a field does not fit the data.
    """
    needed = task.tokenizer.vocab_size
    if vocab_size < needed:
        fail(
            "model.vocab_size",
            vocab_size,
            f"at least {needed}, the size of the tokenizer's vocabulary",
        )
    there = len(task.heldout)
    if config.evaluation.problems > there:
        expected = f"at most {there}, the number of held-out problems"
        fail("evaluation.problems", config.evaluation.problems, expected)
    sample = functools.partial(DataSample, task, problems=_problems(task), longest=_longest(task))
    limit = config.evaluation.prompt_tokens
    sample(seed=0).check_fits("evaluation.prompt_tokens", limit, task.heldout, task.prompt)
    for name in config.stages:
        if not len(task.train):
            raise ConfigError(
                "config.data.train is empty; expected sources, such as config.data.train.maths = "
                "config_lib.source('maths.jsonl')."
            )
        options = config.sections[name]
        algorithm = config.algorithm(name)
        rows = sample(seed=stage_seed(name), max_positions=max_positions)
        algorithm.check_data(options, name, rows)


def _looked_at(task: Task, data: grain.MapDataset, whole: int) -> Iterable[int]:
    """Returns the indices of the dataset rows that the checks read."""
    if len(data) <= whole:
        return range(len(data))
    if not (task.in_memory and (data is task.train or data is task.heldout)):
        return range(FIRST)
    question = [len(data[i].question) for i in range(len(data))]
    both = [n + len(data[i].solution or data[i].answer) for i, n in enumerate(question)]
    return {
        i
        for lengths in (question, both)
        for i in heapq.nlargest(LONGEST, range(len(data)), key=lengths.__getitem__)
    }


def _problems(task: Task) -> Callable[[], Sequence[Problem]]:
    """Creates `DataSample.problems`, a function that returns the problems to check."""
    return lambda: [
        data[i] for data in (task.train, task.heldout) for i in _looked_at(task, data, LONGEST)
    ]


def _longest(task: Task) -> Callable[[Any, Callable[[Any], Sequence[int]]], tuple[int, str]]:
    """Creates `DataSample.longest`, a function that finds the longest of the checked rows."""

    @functools.cache
    def longest(data: Any, tokens: Callable[[Any], Sequence[int]]) -> tuple[int, str]:
        length, i = max((len(tokens(data[i])), i) for i in _looked_at(task, data, WHOLE))
        row = data[i]
        if isinstance(row, Problem):
            return length, f"problem {row.id}"
        return length, f"the demonstration for {task.tokenizer.decode(row.prompt)[:60]!r}"

    return longest
