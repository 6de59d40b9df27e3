"""SFT: cross-entropy training on the response tokens of demonstrations."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from opsd_jax import losses
from opsd_jax.data.task import Demonstration, Task
from opsd_jax.options import option, with_default
from opsd_jax.parallel.mesh import rows_in_context
from opsd_jax.policy import Policy
from opsd_jax.problem import DataError
from opsd_jax.stages import flops
from opsd_jax.stages.algorithm import Algorithm, Curve, DataSample, Responses, RowFields
from opsd_jax.stages.batch import pack, response_head, useful_fraction
from opsd_jax.stages.options import StageOptions
from opsd_jax.stages.packing import Lengths, Packing
from opsd_jax.stages.parts import Parts
from opsd_jax.training.optimizer import OptimizerOptions
from opsd_jax.training.stage import Stage, StepData

WINDOW = 16  # steps whose demonstrations are sorted by length together, to save padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTOptions(StageOptions):
    """The options of an SFT stage."""

    algorithm: str = with_default(StageOptions, "algorithm", "sft")
    batch_size: int = option(32, "Demonstrations per step.", at_least=1)
    checkpoint_every: int = option(100, "Steps between checkpoints.", at_least=1)
    optimizer: OptimizerOptions = option(
        OptimizerOptions(
            learning_rate=1e-5, schedule="cosine", b2=0.999, warmup=10, weight_decay=0.01
        ),
        "AdamW with a schedule.",
    )


def loss_fn(policy: Policy, chunk: int, params, teacher, microbatch):
    """Returns the sum of -log p(token) over response tokens, the token count, and metrics."""
    del teacher
    loss = losses.sft(
        student=response_head(policy, params, microbatch["student"]),
        tokens=microbatch["targets"],
        mask=microbatch["mask"],
        starts=microbatch.get("starts"),
        chunk=chunk,
        partition=rows_in_context(),
    )
    return loss.sum, (loss.weight, {"token_accuracy": loss.metric("accuracy")})


def buckets(options: SFTOptions) -> list[Lengths]:
    """Returns the padded shapes that a microbatch can have, one for each of `options.buckets`."""
    return [{"student": tokens} for tokens in options.buckets]


def _length(options: SFTOptions, task: Task, row: Demonstration) -> int:
    """Returns the number of tokens of a demonstration. Raises DataError if it fits no bucket."""
    tokens = len(row.prompt) + len(row.response)
    if tokens - 1 > options.buckets[-1]:
        raise DataError(
            f"the demonstration for {task.tokenizer.decode(row.prompt)[:60]!r} has {tokens} "
            f"tokens; expected at most {options.buckets[-1] + 1}, one more than the largest "
            "of the stage's `buckets`."
        )
    return tokens


def stage(
    options: SFTOptions, task: Task, policy: Policy, seed: int, packing: Packing | None = None
) -> Stage:
    """Builds the `Stage` that trains on the task's demonstrations in random order.

    Args:
      options: the options of the stage.
      task: the data.
      policy: the model.
      seed: determines the order of the demonstrations.
      packing: how demonstrations share rows; None if each has a row of its own.
    """
    demonstrations = task.demonstrations(seed)
    length = functools.partial(_length, options, task)
    batch_of = functools.partial(
        pack,
        buckets=buckets(options),
        microbatch=options.microbatch,
        capacity=options.batch_size,
        pad_id=task.tokenizer.pad_id,
        packing=packing,
    )

    # Demonstrations that share rows need no others of similar length.
    similar = 1 if packing else math.gcd(options.batch_size, options.microbatch)

    @functools.lru_cache(maxsize=1)
    def window(index: int) -> list[Demonstration]:
        """Returns the demonstrations of WINDOW steps, in an order that needs little padding.

        Without packing, the rows of a microbatch are of similar length. The microbatches of a step
        are not, because length goes with style, and steps of one style each would pull the model to
        and fro.
        """
        size = options.batch_size * WINDOW
        rows = sorted((demonstrations[index * size + i] for i in range(size)), key=length)
        order = np.random.default_rng((seed, index)).permutation(size // similar)
        return [row for i in order for row in rows[i * similar : (i + 1) * similar]]

    def batches(step, params):
        del params
        first = step % WINDOW * options.batch_size
        rows = window(step // WINDOW)[first : first + options.batch_size]
        batch = batch_of([{"student": row.prompt, "response": row.response} for row in rows])
        metrics = {
            "length": float(np.mean([len(row.response) for row in rows])),
            "tokens": float(sum(map(length, rows))),
            "useful_tokens": useful_fraction([batch]),
        }
        return StepData([batch], metrics)

    return Stage(
        steps=options.steps,
        updates=1,
        batches=batches,
        empty_batch=batch_of([]),
        loss=functools.partial(loss_fn, policy, options.loss_chunk),
    )


def _make(options: SFTOptions, parts: Parts) -> Stage:
    made = stage(options, parts.task, parts.model.policy, parts.seed, parts.packing(options))
    return made._replace(flops=flops.of_update(parts.model, {"student": parts.trained}))


def _check_data(options: SFTOptions, name: str, data: DataSample) -> None:
    computed = lambda row: [*row.prompt, *row.response][:-1]
    demonstrations = data.task.demonstrations(data.seed)
    data.check_fits(f"{name}.buckets", options.buckets[-1], demonstrations, computed)
    if data.max_positions:
        data.check_fits("model.max_positions", data.max_positions, demonstrations, computed)


def _step_rows(options: SFTOptions, responses: Responses) -> tuple[list[int], list[Lengths]]:
    """Returns the response and row lengths that a plan assumes: all equal to the largest bucket."""
    targets = [options.buckets[-1]] * options.batch_size
    return targets, [{"student": tokens} for tokens in targets]


ALGORITHM = Algorithm(
    options=SFTOptions,
    make=_make,
    buckets=buckets,
    check_data=_check_data,
    step_rows=_step_rows,
    row_fields=RowFields(("batch_size",)),
    curves=(Curve("loss", "loss, nats a token"), Curve("token_accuracy", "token accuracy, %", 100)),
)
