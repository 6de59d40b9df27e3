r"""Reads inequalities, set-builder notation and unions of intervals as sets of real numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

# An answer that may be an inequality, or a set that a condition defines.
REGION = re.compile(
    r"[<>]|\\(?:leq|geq|neq|lor|land)(?![a-zA-Z])|"
    r"\\\{ ?[a-zA-Z][^,{}]*(?:\\mid|\\vert|[|:])"
)
_RELATION = re.compile(r"[<>=]|\\(?:leq|geq|neq)(?![a-zA-Z])")
_BUILDER = re.compile(
    r"\\\{ ?([a-zA-Z]) ?(?:\\in ?(?:\\mathbb ?\{?R\}?|\\R) ?)?"
    r"(?:\\mid(?![a-zA-Z])|\\vert|[|:]) ?(.*)\\\}",
    re.DOTALL,
)
_MEMBER = re.compile(r"([a-zA-Z]) ?\\in(?![a-zA-Z]) ?(.*)", re.DOTALL)
_OR = re.compile(r"\\lor(?![a-zA-Z])")
_AND = re.compile(r"\\land(?![a-zA-Z])")


class Region(NamedTuple):
    """A set of real numbers.

    Attributes:
      members: the sympy set.
      variable: the name of the variable in the inequalities; None for intervals.
    """

    members: Any
    variable: str | None

    def equals(self, other: Region) -> bool:
        """Returns whether two regions have the same members, and the same variable if both do."""
        if self.variable and other.variable and self.variable != other.variable:
            return False
        difference = self.members.symmetric_difference(other.members)
        return self.members == other.members or difference.is_empty is True


def region(text: str, parse: Callable[[str], Any]) -> Region | None:
    """Returns the region that a normalised answer describes, or None if it describes none.

    Args:
      text: inequalities in one variable, set-builder notation, intervals, or unions of these.
      parse: returns the sympy object of a text, or None.
    """
    try:
        return _region(text, parse)
    except Exception:  # sympy raises exceptions of many types
        return None


def _region(text: str, parse: Callable[[str], Any]) -> Region | None:
    """Returns what `region` returns, or raises an exception of sympy."""
    import sympy

    if builder := _BUILDER.fullmatch(text):
        inner = _region(builder[2], parse)
        return inner and Region(inner.members, None)
    if member := _MEMBER.fullmatch(text):
        inner = _region(member[2], parse)
        return inner and Region(inner.members, member[1])
    alternatives = _OR.split(text)
    if len(alternatives) == 1 and _RELATION.search(text) and "\\cup" in text:
        alternatives = re.split(r"\\cup(?![a-zA-Z])", text)
    if len(alternatives) > 1:
        parts = [_region(part.strip(" ,"), parse) for part in alternatives]
        return _joined(parts, sympy.Union)
    conditions = _AND.split(text)
    if len(conditions) > 1:
        return _joined(
            [_region(part.strip(" ,"), parse) for part in conditions], sympy.Intersection
        )
    if not _RELATION.search(text):
        parsed = parse(text)
        return Region(_exact(parsed), None) if isinstance(parsed, sympy.Set) else None
    conditions = text.split(",")
    if len(conditions) > 1:
        parts = [_region(part.strip(), parse) for part in conditions]
        both = _joined(parts, sympy.Intersection)
        # A comma between conditions that exclude each other can only mean "or".
        return _joined(parts, sympy.Union) if both and both.members.is_empty else both
    return _inequality(parse(text))


def _joined(parts: list[Region | None], join: Callable[..., Any]) -> Region | None:
    """Joins regions into one. Returns None if one is None, or if their variables differ."""
    known = [part for part in parts if part is not None]
    variables = {part.variable for part in known if part.variable}
    if len(known) < len(parts) or len(variables) > 1:
        return None
    return Region(join(*(part.members for part in known)), next(iter(variables), None))


def _inequality(parsed: Any) -> Region | None:
    """Returns the solutions of a parsed relation, or of a chain of them, in one real variable."""
    import sympy

    relations = getattr(parsed, "_unsorted_args", None) or [parsed]
    if not all(isinstance(relation, sympy.core.relational.Relational) for relation in relations):
        return None
    variables = set().union(*(relation.free_symbols for relation in relations))
    if len(variables) != 1:
        return None
    sets = [_exact(relation).as_set() for relation in relations]
    return Region(sympy.Intersection(*sets), str(next(iter(variables))))


def _exact(parsed: Any) -> Any:
    """Replaces the decimals in a sympy object by fractions."""
    import sympy

    return parsed.xreplace({x: sympy.Rational(str(x)) for x in parsed.atoms(sympy.Float)})
