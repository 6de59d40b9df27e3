"""Which questions are the same, however they are typed; and training data without such."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

from opsd_jax.problem import Problem

# Signs typed in several ways: quotes, minus and dashes, and those that TeX has a command for.
_WIDE = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}  # ASCII in full width
_SIGNS = (
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
        (r"\\\\", "\u21b5"),  # the end of a row: no other rule may take half of it
        # Math mode, sizes and spaces change how a formula looks, not what it says.
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
        # To TeX, \frac 1 2 is \frac12, and \log_8 2 is \log_82.
        (r"((?:[_^]|\\frac)\s*\d)\s+(?=\d)", r"\1"),
        # A space counts between two numbers alone: "1 2" is not "12".
        (r"(?<=\d)\s+(?=\d)", "\0"),
        (r"\s+", ""),
        (r"\0", " "),
        (r"\{(\w|\\[a-z]+)\}", r"\1"),  # x^{2} is x^2, and 90^{\circ} 90^\circ; x^{12} is not x^12
        (r"(\\(?:overline|bar|hat|tilde|vec))\{(\w_\w)\}", r"\1\2"),  # of r_1: over both, or over r
    ]
]


def normalise(question: str) -> str:
    """What two copies of a question have in common, however they are typed.

    Case, whitespace, dollar signs, the commands for spaces and sizes, the kinds of fraction, of
    quotes and of dashes, and the full stop at the end make no difference. Numbers and operators do.
    """
    text = unicodedata.normalize("NFC", question).translate(_SIGNS).casefold()
    if not text.isascii():  # category Cf: what has no looks, such as a soft hyphen
        text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf")
    for pattern, new in _SUBSTITUTIONS:
        text = pattern.sub(new, text)
    return text.rstrip(".:?")


def without_duplicates(
    train: Mapping[str, Iterable[Problem]], evaluated: Mapping[str, Iterable[str]]
) -> tuple[dict[str, list[Problem]], dict[str, tuple[dict[str, int], int]]]:
    """The training problems whose question stands nowhere else; the first of several is kept.

    Args:
      train: source -> problems.
      evaluated: evaluation set -> questions.

    Returns:
      `(source -> problems left, source -> (overlap, repeated))`: how many problems of a source
      stand in which evaluation set, in the first of several, and how many came before.
    """

    def digest(question: str) -> bytes:  # of a few million questions, less than their text
        return hashlib.blake2b(normalise(question).encode(), digest_size=16).digest()

    owner: dict[bytes, str] = {}  # of a question -> evaluation set
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
