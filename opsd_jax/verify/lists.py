r"""Splits answers such as `1,2`, `(1,2)`, `\{1,2\}` and `x=1,y=2` into their parts.

The time is linear in the length of the answer.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CONNECTIVE = re.compile(r"\\l(?:and|or)(?![a-zA-Z])")
_TOKEN = re.compile(
    rf"{CONNECTIVE.pattern}|\\[{{}}]|\\begin(?![a-zA-Z])|\\end(?![a-zA-Z])|\\.|[()\[\]{{}},]",
    re.DOTALL,
)
_OPEN = {"(", "[", "{", r"\{", r"\begin"}
_LISTS = ("(", "[", "{", r"\{")
_CLOSE = {")", "]", "}", r"\}", r"\end"}
_NAME = r"(?:\\[a-zA-Z]+|[A-Z]{2,3}|[a-zA-Z])'*(?:_(?:\{\w+\}|\w))?(?:\([a-zA-Z0-9]\))?"
_NAMED = re.compile(rf" ?({_NAME}) ?=(?!=)([^=]+)", re.DOTALL)
_NAMED_TUPLE = re.compile(rf"\(({_NAME}(?:,{_NAME})+)\)=(\(.*\))", re.DOTALL)
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-zA-Z])")


class Listing(NamedTuple):
    r"""An answer as a list of parts.

    Attributes:
      brackets: the brackets around the list, such as `(]`. Empty if there are none.
      parts: the texts of the parts. One part if the answer is not a list.
      names: the name of each part, such as x in `x=1`. None for a part without a name.
    """

    brackets: str
    parts: tuple[str, ...]
    names: tuple[str | None, ...]

    @property
    def ordered(self) -> bool:
        """Whether the order of the parts counts, as in a point or an interval."""
        return self.brackets[:1] in ("(", "[")

    @property
    def named(self) -> bool:
        """Whether every part has a name of its own."""
        return None not in self.names and len(set(self.names)) == len(self.names) > 1


def listing(text: str) -> Listing:
    r"""Splits a normalised answer at its top-level commas. `a \pm b` counts as two parts."""
    if found := _NAMED_TUPLE.fullmatch(text):
        inner = listing(found[2])
        names = tuple(found[1].split(","))
        if len(names) == len(inner.parts):
            return Listing("", inner.parts, names)
    brackets, parts = _split(text)
    if brackets[:1] not in ("(", "["):
        parts = [alternative for part in parts for alternative in _alternatives(part)]
    named = [_NAMED.fullmatch(part) for part in parts]
    return Listing(
        brackets,
        tuple(name[2] if name else part for name, part in zip(named, parts, strict=True)),
        tuple(name[1] if name else None for name in named),
    )


def _split(text: str) -> tuple[str, list[str]]:
    r"""Returns the brackets around a list, without backslashes, and the texts between its commas.

    The connectives `\lor` and `\land` count as commas.
    """
    commas: dict[int, list[tuple[int, int]]] = {0: [], 1: []}  # depth -> start and end
    depth = 0
    opening = closing = None  # the first bracket, if the text begins with it, and its partner
    for token in _TOKEN.finditer(text):
        sign = token[0]
        if sign in _OPEN:
            if token.start() == 0:
                opening = token
            depth += 1
        elif sign in _CLOSE:
            depth -= 1
            if depth == 0 and closing is None:
                closing = token
        elif depth in commas and (sign == "," or CONNECTIVE.match(sign)):
            commas[depth].append(token.span())
    if (
        opening
        and closing
        and closing.end() == len(text)
        and opening[0] in _LISTS
        and (commas[1] or opening[0] == r"\{")
    ):
        brackets = f"{opening[0]}{closing[0]}".replace("\\", "")
        return brackets, _cut(text, opening.end(), commas[1], closing.start())
    return "", _cut(text, 0, commas[0], len(text))


def _cut(text: str, start: int, cuts: list[tuple[int, int]], end: int) -> list[str]:
    """Returns the texts between the given separators."""
    starts = [start, *(after for _, after in cuts)]
    ends = [*(before for before, _ in cuts), end]
    return [text[a:b].strip() for a, b in zip(starts, ends, strict=True)]


def _alternatives(part: str) -> list[str]:
    r"""Returns both values of a text with one `\pm`, and other texts unchanged."""
    signs = _PLUS_MINUS.findall(part)
    if signs.count("pm") != 1 or len(signs) > 2:
        return [part]
    upper = _PLUS_MINUS.sub(lambda sign: "+" if sign[1] == "pm" else "-", part)
    lower = _PLUS_MINUS.sub(lambda sign: "-" if sign[1] == "pm" else "+", part)
    return [upper, lower]


def sorted_by_name(answer: Listing) -> tuple[str, ...]:
    """Returns the parts in the alphabetical order of their names, if these are single letters."""
    if not all(name and re.fullmatch("[a-zA-Z]", name) for name in answer.names):
        return answer.parts
    return tuple(part for _, part in sorted(zip(answer.names, answer.parts, strict=True)))
