"""Epistemic markers: words that suggest doubt, self-checking or a change of approach."""

from __future__ import annotations

import re

WORDS = (
    "wait", "hmm", "hold on", "perhaps", "maybe", "possibly", "might", "however", "alternatively",
    "actually", "check", "double-check", "verify", "let me see", "not sure",
)  # fmt: skip
# The longest first, so that "double-check" is one marker.
MARKERS = re.compile(rf"\b({'|'.join(sorted(WORDS, key=len, reverse=True))})\b", re.IGNORECASE)


def count(text: str) -> int:
    """Returns the number of epistemic markers in a text."""
    return sum(1 for _ in MARKERS.finditer(text))
