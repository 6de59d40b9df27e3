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

import functools
import logging
import re
from collections.abc import Sequence

from opsd_jax.problem import Problem
from opsd_jax.verify import equality, extract
from opsd_jax.verify.normalise import delimited, normalise
from opsd_jax.verify.settle import Pair, settle, understood, without_units
from opsd_jax.verify.verdict import MATCH, NO_ANSWER, Verdict, Verifier, verdict_on

# What datasets have in place of an answer, and what some have around it.
_PLACEHOLDER = re.compile(
    r"(?:none|null|nil|nan|n/?a|unknown|todo|tbd|proof|prove(?: it)?|[?.\-]+|"
    r"not (?:found|available|provided|given|applicable|known)|no (?:final )?answer|"
    r"(?:see|refer to) (?:the )?(?:solution|proof|explanation|above|below|attached|figure))\.?",
    re.IGNORECASE,
)
_AROUND = re.compile(
    r"(?:(?:the )?(?:final |correct )?(?:answer|ans|solution|result)\b\.?(?: is\b)?\s*[:=]?\s|"
    r"(?:the )?(?:final |correct )?(?:answer|ans|solution|result)\s*[:=]|#{2,}|"
    r"\{\s*[\"']).*|.*\(\s*(?:approx|about|rounded|exact)[^()]*\)",
    re.IGNORECASE | re.DOTALL,
)
# Between a number and a letter of a script that is written without spaces.
_NO_SPACES = re.compile(r"(?<=[\u0e00-\u0eff\u3040-\u30ff\u4e00-\u9fff])(?=[-0-9])")


def gold_of(answer: str) -> str:
    r"""Returns a problem's answer without the `\boxed{}` that some datasets put around it."""
    return extract.boxed(answer) or answer


def judge(pair: Pair) -> Verdict:
    """Compares two answers with math-verify.

    It has no limit on time or memory, so it should run in a worker.
    """
    import math_verify  # half a second that only workers need to spend

    # The pool limits the time. The library's own timeout works only in the main thread.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if not pair.free:
        return verdict_on(equality.equal(pair.gold, pair.answer))
    gold, found = equality.parse(pair.gold), math_verify.parse(pair.answer, parsing_timeout=None)
    if (
        gold is not None
        and math_verify.verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None)
        and equality.near(gold, found[0], percent="%" in pair.gold + pair.answer)
    ):
        return MATCH
    formula = delimited(pair.answer)
    return verdict_on(formula is not None and equality.equal(pair.gold, formula))


def _prepare(conventions: Sequence[str], problem: Problem, response: str) -> Verdict | Pair:
    """Returns the verdict on a response if no parser is needed, otherwise a `Pair` for a worker."""
    gold = gold_of(problem.answer)
    answer = extract.extract(response, [name for name in conventions if name != extract.TEXT])
    if answer is not None:
        return settle(gold, answer)
    text = extract.extract(response, (extract.TEXT,)) if extract.TEXT in conventions else None
    if text is None:
        return NO_ANSWER
    settled = settle(gold, text)
    if settled == MATCH or len(gold) > extract.LONGEST:
        return settled
    if delimited(text) is not None:
        text = f"${normalise(text)}$"
    return Pair(without_units(normalise(gold), gold=True)[0], _NO_SPACES.sub(" ", text), free=True)


def _prepare_gold(problem: Problem) -> Verdict | Pair:
    """Checks a gold answer. Returns a verdict on it, or a `Pair` for a worker to parse."""
    answer = gold_of(problem.answer).strip()
    if not answer or extract.boxed(rf"\boxed{{{answer}}}") != answer:
        return Verdict(False, "empty, or its braces do not match")
    if _PLACEHOLDER.fullmatch(answer):
        return Verdict(False, "it says that there is no answer; expected an answer, or no such row")
    if _AROUND.fullmatch(answer):
        return Verdict(False, "there is text around the answer; expected the answer alone")
    if len(answer) > extract.LONGEST:
        return MATCH  # only compared as text
    gold, _ = without_units(normalise(answer), gold=True)
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
