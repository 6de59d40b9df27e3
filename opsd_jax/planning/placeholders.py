"""Placeholders that let a plan build stages without a dataset, engines or a verifier."""

from __future__ import annotations

from typing import Any, NoReturn

import grain

from opsd_jax.data.task import Task
from opsd_jax.data.tokenizer import ByteTokenizer
from opsd_jax.policy import Model
from opsd_jax.stages.parts import Parts
from opsd_jax.verify.pool import VerifierPool


def _no_data(*arguments: Any) -> NoReturn:
    """Stands in for the functions of a task. Raises RuntimeError, because a plan has no data."""
    raise RuntimeError(
        "The stage called a function of its Task during planning, when no data is loaded. Call "
        "these functions only when the stage runs, not when it is built."
    )


# The shapes of programs do not depend on the data, except for the tokens that close a memo's
# thinking: a plan assumes that there are none.
TASK = Task(
    tokenizer=ByteTokenizer(),
    train=grain.MapDataset.source([]),
    heldout=grain.MapDataset.source([]),
    demonstrations=lambda seed: grain.MapDataset.source([]),
    prompt=_no_data,
    teacher_prompt=_no_data,
    verify=_no_data,
    stream=lambda seed: grain.MapDataset.source([]),
    memo_request=_no_data,
    reminder=_no_data,
)


def _no_engine(**sizes: int) -> Any:
    """Stands in for `Parts.engines`. Does nothing, because the plan compiles engines itself."""


def parts(model: Model, row_shards: int) -> Parts:
    """Returns `Parts` for a stage that never runs: a plan reads only its shapes and its loss."""
    pool = VerifierPool(TASK.verify)
    return Parts(
        TASK, model, _no_engine, pool, seed=0, seed_of=lambda name: 0, row_shards=row_shards
    )
