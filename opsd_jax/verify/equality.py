r"""Decides in a worker whether two answers are mathematically equal, with math-verify and sympy.

math-verify's grammar parses an answer as a whole. What the grammar does not understand equals
nothing: no number inside it counts. Lists, intervals and inequalities are compared here, because
math-verify reads every list as a set. Nothing here has a limit on time or memory.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from fractions import Fraction
from typing import Any

from opsd_jax.verify.lists import CONNECTIVE, Listing, listing, sorted_by_name
from opsd_jax.verify.regions import REGION, region
from opsd_jax.verify.settle import close, compare_numbers
from opsd_jax.verify.units import TRIGONOMETRY

_RELATION = re.compile(r"\\approx(?![a-zA-Z])|≈|(?<![<>!\\])=")
_APPLIED = re.compile(r"[a-zA-Z]'*(?:_\{?\w+\}?)?\([^()]*\)")  # f(x) in "f(x) = 3" is a name

# Left sides of equations that the grammar refuses, such as \mathbb{P}(A).
_LABEL = re.compile(
    r"\s*(?:\\(?:mathbb|mathcal|Pr|#|max|min|sup|inf|operatorname|det|deg|dim|arg|Re|Im|frac)"
    r"(?![a-z])|[a-zA-Z|])(?:(?!\\[a-zA-Z]*arrow|\\(?:implies|iff|neg|lnot)\b)[^?&@<>])*",
    re.DOTALL,
)
_DERIVATIVE = re.compile(r"\s*\\frac\{(?:d|\\partial)")
_MEMBER = re.compile(r"[a-zA-Z] ?\\in(?![a-zA-Z]) ?")
_DENIAL = re.compile(r"\b(?:not|neither|never|isn't)\b")
# The base of 204_5, which the grammar ignores.
_BASE = re.compile(r"(?<![\^0-9])[0-9]+ ?_(?:\{([^{}]*)\}|(.))")


def equal(gold: str, answer: str) -> bool:
    """Returns whether two normalised answers are equal. Both have to be understood."""
    numbers = compare_numbers(gold, answer)
    if numbers is not None:
        return numbers
    if _DENIAL.search(answer) and not _DENIAL.search(gold):
        return False
    if REGION.search(gold) or REGION.search(answer):
        one, other = region(gold, parse), region(answer, parse)
        if one and other:
            return one.equals(other)
    connectives = [set(CONNECTIVE.findall(text)) for text in (gold, answer)]
    if all(connectives) and connectives[0] != connectives[1]:
        return False  # "and" in place of "or"
    lists = _listing(gold), _listing(answer)
    if any(len(side.parts) > 1 or side.brackets for side in lists):
        return _equal_lists(*lists)
    return _equal_expressions(gold, answer)


def _listing(text: str) -> Listing:
    r"""Splits an answer into its parts. `x\in` and `S=` before a list are removed."""
    text = _MEMBER.sub("", text, count=1)
    found = listing(text)
    if len(found.parts) == 1 and found.names[0]:
        inner = listing(found.parts[0])
        return inner if len(inner.parts) > 1 or inner.brackets else found._replace(parts=(text,))
    return found


def _equal_lists(gold: Listing, answer: Listing) -> bool:
    """Compares two lists: points in their order, named values by name, other lists as multisets."""
    names = [{name for name in side.names if name} for side in (gold, answer)]
    if all(names) and names[0] != names[1]:
        return False
    parts = answer.parts
    if gold.named and answer.named:
        by_name = dict(zip(answer.names, parts, strict=True))
        parts = tuple(by_name[name] for name in gold.names)
    elif gold.named and (answer.brackets == "{}" or len(names[1]) > 0):
        return False
    elif answer.named and gold.ordered:
        parts = sorted_by_name(answer)
    elif not gold.named:
        if len(gold.parts) == 1 or len(parts) == 1:
            one, other = _vector(gold), _vector(answer)
            if one and other:
                return len(one) == len(other) and all(map(_same, one, other))
        if gold.ordered != answer.ordered:
            return False  # a point is not a list of values
        if not gold.ordered:
            return _equal_collections(gold, answer)
        if len(parts) == 2 and gold.brackets != answer.brackets:
            return False  # intervals
    return len(gold.parts) == len(parts) and all(map(equal, gold.parts, parts))


def _equal_collections(gold: Listing, answer: Listing) -> bool:
    """Compares two lists without order.

    Repetitions count if `gold` repeats a value. They do not count if it has the braces of a set.
    """
    left = list(answer.parts)
    for part in gold.parts:
        found = next((i for i, other in enumerate(left) if equal(part, other)), None)
        if found is None:
            break
        del left[found]
    else:
        if not left:
            return True
    if not all(any(equal(a, b) for b in answer.parts) for a in gold.parts):
        return False
    if not all(any(equal(a, b) for a in gold.parts) for b in left):
        return False
    pairs = itertools.combinations(gold.parts, 2)
    return bool(gold.brackets) or not any(equal(a, b) for a, b in pairs)


def _vector(side: Listing) -> list[Any] | None:
    """Returns the parsed components of a point, or of a matrix with one row or column."""
    import sympy

    if side.ordered:
        components = [parse(part) for part in side.parts]
        return None if any(part is None for part in components) else components
    matrix = parse(side.parts[0]) if len(side.parts) == 1 else None
    return list(matrix) if isinstance(matrix, sympy.MatrixBase) and 1 in matrix.shape else None


def _equal_expressions(gold: str, answer: str) -> bool:
    """Compares two answers that are not lists, and corrects known errors of math-verify."""
    import math_verify

    bases = [sorted(map("".join, _BASE.findall(text))) for text in (gold, answer)]
    if bases[0] != bases[1]:
        return False
    chain = _first_of_chain(answer, alone=not _RELATION.search(gold))
    a, b = parse(_first_of_chain(gold) or gold), None if chain is None else parse(chain)
    if a is None or b is None:
        return False
    if not math_verify.verify(a, b, allow_set_relation_comp=True, timeout_seconds=None):
        return _same_where_real(a, b)
    return near(a, b, percent="%" in f"{gold}{answer}")


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Any:
    """Parses a normalised answer, in which the letter i is the imaginary unit.

    Returns:
      A sympy object. None if the grammar does not accept all of the answer.
    """
    import math_verify  # half a second that only workers need to spend
    import sympy
    from latex2sympy2_extended.latex2sympy2 import latex2sympy, normalize_latex

    # math-verify must not strip units: it reads 3t as three tonnes, equal to 3.
    config = dataclasses.replace(
        math_verify.LatexExtractionConfig().normalization_config, units=False, boxed="none"
    )
    try:
        parsed = latex2sympy(
            normalize_latex(text, config),
            is_real=True,
            convert_degrees=TRIGONOMETRY.search(text) is not None,
            normalization_config=None,
        )
        i = sympy.Symbol("i", real=True)
        if i not in parsed.free_symbols:
            return parsed
        if isinstance(parsed, sympy.Eq):  # without a decision whether its sides are equal
            return sympy.Eq(*(side.subs(i, sympy.I) for side in parsed.args), evaluate=False)
        return parsed.subs(i, sympy.I)
    except Exception:  # the grammar and sympy raise exceptions of many types
        return None


def _first_of_chain(text: str, *, alone: bool = False) -> str | None:
    r"""Returns the first number in a chain of equations such as `x = 14/3 \approx 4.67`.

    Args:
      text: an answer.
      alone: whether the gold is not an equation. Then expressions in the same variables must be
        equal, or the chain is false.

    Returns:
      The text of the first number. An answer that is not a chain is returned unchanged. None if
      the chain is false because its numbers differ.
    """
    terms = _chain(text)
    if len(terms) == 1 or re.search(r"[,;]|\\begin|\\text|\\cup|\\in(?![a-zA-Z])", text):
        return text
    numbers, expressions, labelled = [], [], False
    for relation, term in zip(["=", *terms[1::2]], terms[::2], strict=True):
        parsed = None if _DERIVATIVE.match(term) else parse(term)
        value = _value(parsed)
        if value is not None:
            numbers.append((relation, term, value))
        elif parsed is None:
            if numbers or not _is_label(term):
                return None
            labelled = True
        elif relation == "=" and not _APPLIED.fullmatch(term):
            expressions.append(parsed)
    for one, other in itertools.pairwise(expressions) if alone else ():
        if one.free_symbols & other.free_symbols and not _same(one, other):
            return None  # y = 3x = 2x, and x = 2x
    if not numbers:
        return text
    _, first_term, first = numbers[0]
    for relation, _, value in numbers[1:]:
        within = relation != "=" and abs(first - value) * 100 <= abs(first)
        if not (within or close(first, value)):
            return None
    return text if len(numbers) == 1 and terms[1::2] == ["="] and not labelled else first_term


def _is_label(term: str) -> bool:
    """Returns whether the left side of an equation names what the right side is, as P(A) does."""
    balanced = all(term.count(a) == term.count(b) for a, b in ("()", "[]", "{}"))
    return balanced and _LABEL.fullmatch(term) is not None


def _same(a: Any, b: Any) -> bool:
    """Returns whether two parsed expressions are equal."""
    import math_verify

    return math_verify.verify(a, b, timeout_seconds=None) or _same_where_real(a, b)


def _chain(text: str) -> list[str]:
    r"""Splits a chain such as `x = 2 + 2 = 4` at each `=` or `\approx` outside brackets.

    Returns:
      Terms and relations in turn: `[term, relation, term, ...]`.
    """
    terms, end = [], 0
    for relation in _RELATION.finditer(text):
        before = text[: relation.start()]
        if sum(map(before.count, "([{")) == sum(map(before.count, ")]}")):
            terms += [text[end : relation.start()], relation.group()]
            end = relation.end()
    return [*terms, text[end:]]


def _value(parsed: Any) -> Any:
    """Evaluates an expression to 30 digits. Returns None if its value is not a finite number."""
    try:
        value = parsed.doit().evalf(30)
        return value if value.is_number and value.is_finite else None
    except Exception:  # sympy raises exceptions of many types
        return None


def near(a: Any, b: Any, percent: bool) -> bool:
    """Returns whether two answers that math-verify accepts as equal also pass a stricter test.

    math-verify rounds to six decimals. Here decimals must agree to a relative 1e-4, and all other
    numbers and expressions must be exactly equal.

    Args:
      a, b: parsed answers that math-verify accepts as equal.
      percent: whether one of the answers has a percent sign.
    """
    import sympy

    if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq) and a.lhs == b.lhs:
        a, b = a.rhs, b.rhs
    scales = (1, 100, Fraction(1, 100)) if percent else (1,)
    pairs = zip(_numbers(a), _numbers(b), strict=False)
    decimal = any(side.has(sympy.Float) for side in (a, b))
    tolerance = 1e-4 if decimal else 1e-25
    if not all(any(abs(x - s * y) <= tolerance * abs(x) for s in scales) for x, y in pairs):
        return False
    if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq):
        return True  # two forms of one equation
    both = [side.rhs if isinstance(side, sympy.Eq) else side for side in (a, b)]
    if not all(isinstance(side, sympy.Expr) and side.free_symbols for side in both):
        return True
    return decimal or both[0] == both[1] or sympy.simplify(both[0] - both[1]) == 0


def _numbers(parsed: Any) -> list[Any]:
    """Returns the values in a parsed number, interval, tuple or set, or [] if any is not real.

    An assignment such as `x = 3` counts as its right-hand side.
    """
    import sympy

    if isinstance(parsed, sympy.Tuple | sympy.FiniteSet):
        parts = list(parsed.args)
    elif isinstance(parsed, sympy.Interval):
        parts = [end for end in (parsed.start, parsed.end) if end.is_finite]
    else:
        parts = [parsed]
    assigned = lambda e: e.rhs if isinstance(e, sympy.Eq) and e.lhs.is_Symbol else e
    values = [_value(assigned(part)) for part in parts]
    if any(value is None or not value.is_real for value in values):
        return []
    return sorted(values) if isinstance(parsed, sympy.FiniteSet) else values


def _same_where_real(a: Any, b: Any) -> bool:
    r"""Returns whether two expressions are real at the same test points, with equal values there.

    The test points are fixed. By this test \sqrt{1/n} equals 1/\sqrt{n}, which sympy cannot decide
    for n < 0.
    """
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    variables = sorted(a.free_symbols, key=str)
    if not 1 <= len(variables) <= 3 or a.free_symbols != b.free_symbols:
        return False
    agreed = 0
    for i in range(24):  # every combination of signs, at arbitrary rational points
        point = {
            v: (1 - 2 * (i >> j & 1)) * sympy.Rational(37 * (i + 2) + 11 * j, 101 + 13 * j)
            for j, v in enumerate(variables)
        }
        x, y = (_value(side.subs(point)) for side in (a, b))
        real = [value is not None and bool(value.is_real) for value in (x, y)]
        if real[0] != real[1] or (real[0] and abs(x - y) > 1e-20 * (abs(x) + abs(y))):
            return False
        agreed += real[0]
    return agreed >= 8
