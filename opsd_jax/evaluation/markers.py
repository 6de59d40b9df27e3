"""Epistemic markers: the words with which a model doubts, re-checks, or turns to something else."""

from __future__ import annotations

import re

WORDS = (
    "wait", "hmm", "hold on", "perhaps", "maybe", "possibly", "might", "however", "alternatively",
    "actually", "check", "double-check", "verify", "let me see", "not sure",
)  # fmt: skip
MARKERS = re.compile(rf"\b({'|'.join(sorted(WORDS, key=len, reverse=True))})\b", re.IGNORECASE)


def count(text: str) -> int:
    """How many there are in a text."""
    return sum(1 for _ in MARKERS.finditer(text))
