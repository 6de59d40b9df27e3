r"""The maths verifier: is the answer in a response the problem's?

1. Extract the answer (extract.py); there is none: "no answer".
2. Settle what needs no parser (settle.py): the same text, plain numbers, choices, units.
3. What is left goes to a worker (`judge`) and there to math-verify (sympy) with both sides in
   `\boxed{}`: bare LaTeX is misread, in MATH-500 one answer in five. Around it stand guards against
   what it takes for equal and is not: `4 \approx 5`, `5 = 4`, 1/2004! and 1/2006! (it rounds).

No text of a model's is given to eval or sympify: a grammar reads it. (With the convention "text"
math-verify evaluates what consists of digits, operators and brackets alone.)
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
_APPLIED = re.compile(r"[a-zA-Z]'*(?:_\{?\w+\}?)?\([^()]*\)")  # f(x) on the left is a name
# Between a letter of a script that is written without spaces and a number.
_NO_SPACES = re.compile(r"(?<=[\u0e00-\u0eff\u3040-\u30ff\u4e00-\u9fff])(?=[-0-9])")


def gold_of(answer: str) -> str:
    """A problem's answer without a box that its data set put around it."""
    return extract.boxed(answer) or answer


def judge(pair: Pair) -> Verdict:
    """Whether the two are equal, by math-verify and its guards. Without any bound: for a worker."""
    import math_verify  # half a second that the caller need not spend

    # Time is bounded from outside; the library's own alarm would want the main thread.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Without its own stripping of units: to it 3t is three tonnes, and equal to 3.
    rules = dataclasses.replace(
        math_verify.LatexExtractionConfig().normalization_config, units=False
    )
    config = [math_verify.LatexExtractionConfig(normalization_config=rules, boxed_match_priority=0)]

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
    r"""An answer that is a chain, `x = 14/3 \approx 4.67`, as its first number; None where the
    numbers of a chain differ; any other answer as it is.

    `alone`: what is asked for is no equation, so that expressions in the same variables differ only
    if the chain is false.
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
    import math_verify

    return math_verify.verify(a, b, timeout_seconds=None) or _same_where_real(a, b)


def _chain(text: str) -> list[str]:
    """The terms of a chain and, between them, its relations; those within braces are not its."""
    terms, end = [], 0
    for relation in _RELATION.finditer(text):
        if text.count("{", 0, relation.start()) == text.count("}", 0, relation.start()):
            terms += [text[end : relation.start()], relation.group()]
            end = relation.end()
    return [*terms, text[end:]]


def _value(parsed: Any) -> Any:
    """The number that an expression without symbols is, to 30 digits; None for anything else."""
    try:
        value = parsed.doit().evalf(30)
        return value if value.is_number and value.is_finite else None
    except Exception:  # sympy raises of every kind
        return None


def _near(a: Any, b: Any, percent: bool) -> bool:
    """That two things called equal are so not only by rounding to six places: their numbers agree
    to a relative 1e-4, and expressions without decimals exactly.
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
    """The values of a number, of an interval's ends or of all in a tuple or set, assigned or not;
    [] if any is none.
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
    r"""Whether two expressions in the same variables agree where they are real, and are real in the
    same places: \sqrt{1/n} and 1/\sqrt{n} do, which sympy leaves open for n < 0.
    """
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    variables = sorted(a.free_symbols, key=str)
    if not 1 <= len(variables) <= 3 or a.free_symbols != b.free_symbols:
        return False
    agreed = 0
    for i in range(24):  # each combination of signs, at points of no special kind
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


def _ask(conventions: Sequence[str], problem: Problem, response: str) -> Verdict | Pair:
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


def _ask_gold(problem: Problem) -> Verdict | Pair:
    answer = gold_of(problem.answer).strip()
    if not answer or extract.boxed(rf"\boxed{{{answer}}}") != answer:
        return Verdict(False, "empty, or its braces do not match")
    gold, _ = quantity(normalise(answer))
    return MATCH if understood(gold) else Pair(gold, gold)


def maths(conventions: Sequence[str] = ("boxed",)) -> Verifier:
    r"""The verifier of answers in mathematical notation.

    Args:
      conventions: where a response has its answer, in the order in which they are tried: names in
        `extract.CONVENTIONS`; "text" comes last wherever it stands.
    """
    conventions = tuple(conventions)
    # An answer that stands anywhere in the text is accepted or not, but not read.
    read = None if extract.TEXT in conventions else _read
    return Verifier(
        functools.partial(_ask, conventions),
        judge,
        _ask_gold,
        read and functools.partial(read, conventions),
    )


def _read(conventions: Sequence[str], problem: Problem, response: str) -> str | None:
    return extract.extract(response, conventions)
