"""Keys of the programs that a run compiles, and names of the loops in them.

The modules that compile programs and the plan, which counts their executions and the trips of their
loops, share these keys. A key that does not match raises an error instead of counting as zero.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

DECODE_STEPS = "decode_steps"  # named scope of the loop over decoding steps


def bucket_scope(bucket: int) -> str:
    """Returns the named scope of the train step's loop over the microbatches of a bucket."""
    return f"bucket_{bucket}"


class ProgramKind(enum.Enum):
    """The kind of a compiled program. Its value is the text that a plan prints."""

    RESHARD = "reshard"
    START = "start"
    PREFILL = "prefill"
    INSERT = "insert into"
    DECODE = "decode in"
    RESIZE = "resize"
    TRAIN_STEP = "train step"
    PROBE = "probe"


class ProgramKey(NamedTuple):
    """Identifies a program among those that one part of a run compiles.

    Attributes:
      kind: what the program does.
      cache_length: the cache's length in tokens, for INSERT and DECODE; None for other kinds.
    """

    kind: ProgramKind
    cache_length: int | None = None

    def __str__(self) -> str:
        """Returns the text that a plan prints, such as "decode in 9216"."""
        name = self.kind.value
        return name if self.cache_length is None else f"{name} {self.cache_length}"
