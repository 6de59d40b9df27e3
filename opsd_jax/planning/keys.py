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


class PhaseKind(enum.StrEnum):
    """What a run does in a phase; the value is the text that a plan prints after the section."""

    RESHARD = "reshard"
    ROLLOUTS = "rollouts"
    MEMOS = "memos"
    CLOSED_MEMOS = "memos, closed"
    STEP = "step"
    PROBE = "probe"
    PROBE_MEMOS = "probe memos"
    CLOSED_PROBE_MEMOS = "probe memos, closed"
    EVALUATION = ""


# Phase that writes memos -> phase that completes the memos whose thinking filled its budget.
CLOSED = {
    PhaseKind.MEMOS: PhaseKind.CLOSED_MEMOS,
    PhaseKind.PROBE_MEMOS: PhaseKind.CLOSED_PROBE_MEMOS,
}


class PhaseKey(NamedTuple):
    """Identifies a phase of a run.

    Attributes:
      section: the section of the config that the phase belongs to: a stage or "evaluation".
      kind: what the run does in the phase: a PhaseKind, or the name of another `Sampling`.
    """

    section: str
    kind: str

    def __str__(self) -> str:
        """The text that a plan prints, such as "opsd memos, closed"."""
        return f"{self.section} {self.kind}".rstrip()

    @classmethod
    def parse(cls, text: str) -> PhaseKey:
        """Parses the text that `str` makes of a key."""
        section, _, kind = text.partition(" ")
        return cls(section, kind)
