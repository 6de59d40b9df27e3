"""Removes duplicate questions from the training data, ignoring differences in formatting."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

from opsd_jax.problem import Problem

MARKS = 30  # combining marks on one letter; no script has as many (Unicode annex 15, section 13)

# Characters with several spellings: quotes, dashes, and characters that have a TeX command.
_WIDE = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}  # full-width ASCII
_CHARACTERS = (
    _WIDE
    | str.maketrans("\u2018\u2019\u201c\u201d\u2212\u2010\u2011\u2013\u2014", "''\"\"-----")
    | str.maketrans(
        {
            "\u00d7": r"\times ",
            "\u00b7": r"\cdot ",
            "\u22c5": r"\cdot ",
            "\u00b0": r"^\circ ",
            "\u03c0": r"\pi ",
            "\u2264": r"\le ",
            "\u2265": r"\ge ",
            "\u2260": r"\ne ",
        }
    )
)
_SUBSTITUTIONS = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"\\\\", "\u21b5"),  # the end of a row, before another pattern matches half of it
        # Math mode, sizes and spaces change how a formula looks, not what it means.
        (r"\\?\$|\\[()\[\]]", " "),
        (r"\\(left|middle|right|bigg?[lmr]?|displaystyle|textstyle)(?![a-z])", ""),
        (r"\\[,;:!>]", ""),
        (r"\\(quad|qquad|enspace|thinspace)(?![a-z])|~|\\ ", " "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (
            r"\\(?:text|textrm|textbf|textit|emph|mathrm|mbox|operatorname)\s*\{([^{}]*)\}",
            r"\1",
        ),
        (r"\\(le|ge|ne)q(slant)?(?![a-z])", r"\\\1"),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"\\([lr]?vert|mid)(?![a-z])", "|"),
        (r"\\%", "%"),
        (r"\^\s*(\{\s*\\prime\s*\}|\\prime(?![a-z]))", "'"),
        (r"[_^]\s*\{\s*\}", ""),
        (r"``|''", '"'),
        (r"\\[lc]?dots[bcim]?(?![a-z])|\.\.\.|\u2026", r"\\dots"),
        (r"\{,\}", ","),
        # TeX reads \frac 1 2 as \frac12, and \log_8 2 as \log_82.
        (r"((?:[_^]|\\frac)\s*\d)\s+(?=\d)", r"\1"),
        # A space is significant only between two numbers: "1 2" is not "12".
        (r"(?<=\d)\s+(?=\d)", "\0"),
        (r"\s+", ""),
        (r"\0", " "),
        (r"\{(\w|\\[a-z]+)\}", r"\1"),  # x^{2} equals x^2, but x^{12} does not equal x^12
        (r"(\\(?:overline|bar|hat|tilde|vec))\{(\w_\w)\}", r"\1\2"),  # \bar{r_1} equals \bar r_1
    ]
]


def normalise(question: str) -> str:
    """Returns a normal form of a question, which ignores differences in formatting.

    The normal form ignores case, whitespace, dollar signs, commands for spaces and sizes, the style
    of fractions, quotes and dashes, and the full stop at the end. It keeps numbers and operators.
    """
    if not question.isascii():
        question = unicodedata.normalize("NFC", _without_long_marks(question))
    text = question.translate(_CHARACTERS).casefold()
    if not text.isascii():  # category Cf: invisible characters, such as a soft hyphen
        text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    for pattern, new in _SUBSTITUTIONS:
        text = pattern.sub(new, text)
    return text.rstrip(".:?")


def _without_long_marks(text: str) -> str:
    """Removes combining marks after the first MARKS in a row, which `normalize` sorts slowly."""
    kept, marks = [], 0
    for char in text:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks <= MARKS:
            kept.append(char)
    return "".join(kept)


def without_duplicates(
    train: Mapping[str, Iterable[Problem]], evaluated: Mapping[str, Iterable[str]]
) -> tuple[dict[str, list[Problem]], dict[str, tuple[dict[str, int], int]]]:
    """Removes training problems whose question is in an evaluation set or an earlier problem.

    Args:
      train: source -> problems.
      evaluated: evaluation set -> questions.

    Returns:
      `(kept, counts)`. `kept` is source -> remaining problems. `counts` is source ->
      `(overlap, repeated)`: `overlap` is evaluation set -> number of removed problems (the first
      set that has the question counts), and `repeated` is the number of repetitions removed.
    """

    def digest(question: str) -> bytes:  # takes less memory than millions of questions
        return hashlib.blake2b(normalise(question).encode(), digest_size=16).digest()

    owner: dict[bytes, str] = {}  # digest of a question -> first evaluation set that has it
    for name, questions in evaluated.items():
        for question in questions:
            owner.setdefault(digest(question), name)
    seen: set[bytes] = set()
    kept: dict[str, list[Problem]] = {}
    counts: dict[str, tuple[dict[str, int], int]] = {}
    for source, problems in train.items():
        overlap: Counter[str] = Counter()
        repeated = 0
        kept[source] = []
        for problem in problems:
            key = digest(problem.question)
            if key in owner:
                overlap[owner[key]] += 1
            elif key in seen:
                repeated += 1
            else:
                seen.add(key)
                kept[source].append(problem)
        counts[source] = (dict(overlap), repeated)
    return kept, counts
