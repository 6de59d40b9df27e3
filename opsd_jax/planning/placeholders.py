"""Placeholders for the task and the other parts of a run, which a plan builds without data."""

from __future__ import annotations

from typing import Any, NoReturn

import grain

from opsd_jax.data.task import Task
from opsd_jax.data.tokenizer import ByteTokenizer
from opsd_jax.policy import Model
from opsd_jax.stages.parts import Parts
from opsd_jax.verify.pool import VerifierPool


def _no_data(*arguments: Any) -> NoReturn:
    """Placeholder for the functions of a task; raises RuntimeError, because a plan has no data."""
    raise RuntimeError(
        "A function of the task was called while planning, but a plan has no data; expected the "
        "programs to depend on shapes only."
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
    """Placeholder for a stage's engines; does nothing, because the plan compiles them itself."""


def parts(model: Model) -> Parts:
    """Returns placeholder parts, for building a stage of which only shapes and loss are used."""
    pool = VerifierPool(TASK.verify)
    return Parts(TASK, model, _no_engine, pool, seed=0, seed_of=lambda name: 0)
