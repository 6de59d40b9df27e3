"""Names of the phases in a plan, and of the parts of each phase's memory.

The modules that account for phases and the table, which gives advice on them, share these names.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Part(enum.StrEnum):
    """A part of a phase's memory, such as the optimizer state. A plan prints the enum value."""

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
    """What a run does in a phase. A plan prints the enum value after the config section's name.

    In the value, "{}" stands for the name of the phase's `Sampling`.
    """

    RESHARD = "reshard"
    SAMPLING = "{}"
    STEP = "step"
    PROBE_SAMPLING = "probe {}"
    PROBE = "probe"
    EVALUATION = ""


class PhaseKey(NamedTuple):
    """Identifies a phase in a plan by its config section, its kind and its `Sampling`, if any.

    Attributes:
      section: the section of the config that the phase belongs to: a stage or "evaluation".
      kind: what the run does in the phase.
      sampling: the name of the `Sampling`, for SAMPLING and PROBE_SAMPLING; "" for other kinds.
    """

    section: str
    kind: PhaseKind
    sampling: str = ""

    def __str__(self) -> str:
        """Returns the name that a plan prints for the phase, such as "opsd memos, closed"."""
        return f"{self.section} {self.kind.value.format(self.sampling)}".rstrip()
