"""Names of a plan's phases and of the parts of their memory.

The modules that account for phases and the table, which gives advice on them, share these names.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Part(enum.StrEnum):
    """A part of the memory that a phase needs; the value is the text that a plan prints."""

    PARAMETERS = "parameters"
    OPTIMIZER = "optimizer"
    TEACHER = "teacher"
    PROBE_TEACHER = "teacher parameters"
    SAMPLING_WEIGHTS = "weights for sampling"
    CACHE = "cache"
    PROMPT_CACHE = "prompts' cache"
    BATCH = "batch"
    TEMPORARIES = "temporaries"


class PhaseKind(enum.Enum):
    """What a run does in a phase; the value is the text that a plan prints after the section.

    In the text, "{}" stands for the name of the phase's `Sampling`.
    """

    RESHARD = "reshard"
    SAMPLING = "{}"
    STEP = "step"
    PROBE_SAMPLING = "probe {}"
    PROBE = "probe"
    EVALUATION = ""


class PhaseKey(NamedTuple):
    """Identifies a phase of a run.

    Attributes:
      section: the section of the config that the phase belongs to: a stage or "evaluation".
      kind: what the run does in the phase.
      sampling: the name of the `Sampling`, for SAMPLING and PROBE_SAMPLING; "" for other kinds.
    """

    section: str
    kind: PhaseKind
    sampling: str = ""

    def __str__(self) -> str:
        """The text that a plan prints, such as "opsd memos, closed"."""
        return f"{self.section} {self.kind.value.format(self.sampling)}".rstrip()
