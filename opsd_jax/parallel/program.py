"""Keys that identify the compiled programs of a run, and scope names of their loops.

The modules that compile programs and the plan, which counts their executions and the trips of their
loops, share these keys. A key that does not match raises an error instead of counting as zero.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

DECODE_STEPS = "decode_steps"  # named scope of the loop over decoding steps


def bucket_scope(bucket: int) -> str:
    """Returns the name of the `jax.named_scope` in which the train step processes a bucket."""
    return f"bucket_{bucket}"


class ProgramKind(enum.Enum):
    """What a compiled program does. The values appear in the output of `opsd-jax plan`."""

    RESHARD = "reshard"
    START = "start"
    PREFILL = "prefill"
    INSERT = "insert into"
    CONTINUE = "continue in"
    DECODE = "decode in"
    SPECULATE = "speculate in"
    RESIZE = "resize"
    TRAIN_STEP = "train step"
    PROBE = "probe"


class ProgramKey(NamedTuple):
    """Identifies a compiled program within one part of a run, such as a rollout engine.

    Attributes:
      kind: what the program does.
      cache_length: the cache's length in tokens, for INSERT, CONTINUE, DECODE and SPECULATE; None
        for the others.
    """

    kind: ProgramKind
    cache_length: int | None = None

    def __str__(self) -> str:
        """Returns the program's name in the output of a plan, such as "decode in 9216"."""
        name = self.kind.value
        return name if self.cache_length is None else f"{name} {self.cache_length}"
