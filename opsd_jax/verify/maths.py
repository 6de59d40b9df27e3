r"""The maths verifier: checks whether a response's answer mathematically equals the gold answer.

1. Extract the answer (extract.py). Without one, the verdict is "no answer".
2. Compare what needs no parser (settle.py): equal texts, plain numbers, choices, units.
3. Send the rest to a worker (`judge`), which calls math-verify (sympy) with both answers inside
   `\boxed{}`, because it misreads bare LaTeX (one answer in five of MATH-500). Guards reject
   answers that math-verify wrongly accepts: `4 \approx 5`, `5 = 4`, or 1/2004! for 1/2006!, because
   math-verify rounds.

A grammar parses the model's text; it is never passed to eval or sympify. (With the convention
"text", math-verify evaluates texts that consist only of digits, operators and brackets.)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from opsd_jax.problem import Problem
from opsd_jax.verify import extract
from opsd_jax.verify.normalise import delimited, normalise, quantity
from opsd_jax.verify.settle import Pair, close, settle, understood
from opsd_jax.verify.verdict import MATCH, MISMATCH, NO_ANSWER, Verdict, Verifier, verdict_on

_RELATION = re.compile(r"\\approx(?![a-zA-Z])|≈|(?<![<>!\\])=")
_APPLIED = re.compile(r"[a-zA-Z]'*(?:_\{?\w+\}?)?\([^()]*\)")  # f(x) in "f(x) = 3" is a name
# Between a number and a letter of a script that is written without spaces.
_NO_SPACES = re.compile(r"(?<=[\u0e00-\u0eff\u3040-\u30ff\u4e00-\u9fff])(?=[-0-9])")


def gold_of(answer: str) -> str:
    r"""Returns a problem's answer without the `\boxed{}` that some datasets put around it."""
    return extract.boxed(answer) or answer


def judge(pair: Pair) -> Verdict:
    """Compares two answers with math-verify, and corrects known errors of math-verify.

    It has no limit on time or memory, so it should run in a worker.
    """
    import math_verify  # half a second that only workers need to spend

    # The pool limits the time. The library's own timeout works only in the main thread.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # math-verify must not strip units: it reads 3t as three tonnes, equal to 3.
    normalization = dataclasses.replace(
        math_verify.LatexExtractionConfig().normalization_config, units=False
    )
    config = [
        math_verify.LatexExtractionConfig(
            normalization_config=normalization, boxed_match_priority=0
        )
    ]

    def parse(text: str) -> list[Any]:
        return math_verify.parse(
            rf"\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=None
        )

    gold_text = _first_of_chain(pair.gold, parse) or pair.gold
    gold = parse(gold_text)
    if pair.free:
        answer_text: str | None = pair.answer
        answer = math_verify.parse(pair.answer, parsing_timeout=None)
    else:
        answer_text = _first_of_chain(pair.answer, parse, alone=not _RELATION.search(pair.gold))
        answer = parse(answer_text) if answer_text else []
    if not gold or not answer:
        return MISMATCH
    if not math_verify.verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None):
        return verdict_on(_same_where_real(gold[0], answer[0]))
    return verdict_on(_near(gold[0], answer[0], percent="%" in f"{gold_text}{answer_text}"))


def _first_of_chain(
    text: str, parse: Callable[[str], list[Any]], *, alone: bool = False
) -> str | None:
    r"""Returns the first number in a chain of equations such as `x = 14/3 \approx 4.67`.

    Args:
      text: an answer.
      parse: returns the sympy objects of a text.
      alone: whether the gold is not an equation. Then expressions in the same variables must be
        equal, or the chain is false.

    Returns:
      The text of the first number. An answer that is not a chain is returned unchanged. None if
      the chain is false because its numbers differ.
    """
    terms = _chain(text)
    if len(terms) == 1 or re.search(r"[,;]|\\begin|\\text|\\cup|\\in(?![a-zA-Z])", text):
        return text
    numbers, expressions = [], []
    for relation, term in zip(["=", *terms[1::2]], terms[::2], strict=True):
        parsed = next(iter(parse(term)), None)
        value = _value(parsed)
        if value is not None:
            numbers.append((relation, term, value))
        elif parsed is not None and relation == "=" and not _APPLIED.fullmatch(term):
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
    return text if len(numbers) == 1 and terms[1::2] == ["="] else first_term


def _same(a: Any, b: Any) -> bool:
    """Returns whether two parsed expressions are equal."""
    import math_verify

    return math_verify.verify(a, b, timeout_seconds=None) or _same_where_real(a, b)


def _chain(text: str) -> list[str]:
    r"""Splits a chain of equations such as `x = 2 + 2 = 4` at each `=` or `\approx` outside braces.

    Returns:
      Terms and relations in turn: `[term, relation, term, ...]`.
    """
    terms, end = [], 0
    for relation in _RELATION.finditer(text):
        if text.count("{", 0, relation.start()) == text.count("}", 0, relation.start()):
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


def _near(a: Any, b: Any, percent: bool) -> bool:
    """Returns whether two answers that math-verify accepts as equal also pass a stricter test.

    math-verify rounds to six decimals. Here numbers must agree to a relative 1e-4, and expressions
    without decimals must be exactly equal.

    Args:
      a, b: parsed answers that math-verify accepts as equal.
      percent: whether one of the answers has a percent sign.
    """
    import sympy

    if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq) and a.lhs == b.lhs:
        a, b = a.rhs, b.rhs
    scales = (1, 100, Fraction(1, 100)) if percent else (1,)
    pairs = zip(_numbers(a), _numbers(b), strict=False)
    if not all(any(abs(x - s * y) * 10_000 <= abs(x) for s in scales) for x, y in pairs):
        return False
    if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq):
        return True  # two forms of one equation
    both = [side.rhs if isinstance(side, sympy.Eq) else side for side in (a, b)]
    if not all(isinstance(side, sympy.Expr) and side.free_symbols for side in both):
        return True
    decimal = any(side.has(sympy.Float) for side in both)
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


def _prepare(conventions: Sequence[str], problem: Problem, response: str) -> Verdict | Pair:
    """Returns the verdict on a response if no parser is needed, otherwise a `Pair` for a worker."""
    gold = gold_of(problem.answer)
    answer = extract.extract(response, [name for name in conventions if name != extract.TEXT])
    if answer is not None:
        return settle(gold, answer)
    text = extract.extract(response, (extract.TEXT,)) if extract.TEXT in conventions else None
    if text is None:
        return NO_ANSWER
    if settle(gold, text) == MATCH:
        return MATCH
    if delimited(text) is not None:
        text = f"${normalise(text)}$"
    return Pair(quantity(normalise(gold))[0], _NO_SPACES.sub(" ", text), free=True)


def _prepare_gold(problem: Problem) -> Verdict | Pair:
    """Checks a gold answer. Returns a verdict on it, or a `Pair` for a worker to parse."""
    answer = gold_of(problem.answer).strip()
    if not answer or extract.boxed(rf"\boxed{{{answer}}}") != answer:
        return Verdict(False, "empty, or its braces do not match")
    gold, _ = quantity(normalise(answer))
    return MATCH if understood(gold) else Pair(gold, gold)


def maths(conventions: Sequence[str] = ("boxed",)) -> Verifier:
    """Returns a verifier that compares answers as mathematical expressions.

    Args:
      conventions: where a response has its answer: keys of `extract.CONVENTIONS`, tried in this
        order. "text" is always tried last.
    """
    conventions = tuple(conventions)

    def extracted(problem: Problem, response: str) -> str | None:
        return extract.extract(response, conventions)

    return Verifier(
        functools.partial(_prepare, conventions),
        judge,
        _prepare_gold,
        # With "text", the verifier only tests whether the gold is in the text: it reads no answer.
        None if extract.TEXT in conventions else extracted,
    )
