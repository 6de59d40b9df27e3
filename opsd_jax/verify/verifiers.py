r"""Verifiers by name: what a config's `verifier` section says.

`kind` is "maths", "exact", "numeric", "choice", "package.module:function" for one's own, or several
of these with " and " (all have to say yes) or " or " (one does) between them.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence

from opsd_jax.options import option
from opsd_jax.problem import Problem
from opsd_jax.verify import extract
from opsd_jax.verify.maths import gold_of, maths
from opsd_jax.verify.normalise import bare, normalise, plain_number, quantity
from opsd_jax.verify.verdict import (
    MATCH,
    NO_ANSWER,
    Extract,
    Judge,
    Question,
    Verdict,
    Verifier,
    verdict_on,
)

_NUMBER = re.compile(
    r"(?<![\w^{.])[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)
_POWER_OF_TEN = re.compile(r"\s*(?:\\times|\\cdot|\*|\u00d7)\s*10\^\{?(-?[0-9]+)\}?")
_BEGINS = re.compile(r"\(?([A-Z])(?:[).:,\s]|$)")
_NAMED = re.compile(
    r"(?i:(?:answer|choice|option)(?: is)?)\W{0,4}\(?([A-Z])(?:[).:,*]|\s*$)",
)
# "A" and "I" are words, too, unless something stops behind them.
_ALONE = re.compile(r"(?<![\w'\u2019])(?:([B-HJ-Z])(?![\w'\u2019])|([AI])(?=[).:,*]|\s*$))")


def at_once(judge: Judge, extract: Extract | None = None) -> Verifier:
    """A quick and trusted judge's verifier: no worker sees it."""
    return Verifier(judge, _never, extract=extract)


def as_verifier(judge: Verifier | Judge) -> Verifier:
    """A verifier as it is; of another judge one that leaves everything to a worker."""
    if isinstance(judge, Verifier):
        return judge
    return Verifier(_whole, functools.partial(_call, judge))


def _never(question: Question) -> Verdict:
    raise AssertionError(f"{question!r} was to be settled at once.")


def _whole(problem: Problem, response: str) -> Question:
    return problem, response


def _call(judge: Judge, question: Question) -> Verdict:
    verdict = judge(*question)
    if isinstance(verdict, bool):
        return verdict_on(verdict)
    if not isinstance(verdict, Verdict):
        raise TypeError(f"a verifier returned {verdict!r}; expected a Verdict or a bool.")
    return verdict


def function(name: str) -> Verifier:
    """The verifier that a name stands for, or that asks a worker for what the function returns.

    Args:
      name: "package.module:function", of a `Verifier` or a pure function `(problem, response) ->
        Verdict or bool`.

    Raises:
      ValueError: it cannot be imported, or called.
    """
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the verifier {name!r} cannot be imported ({error}).") from error
    if not callable(found):
        raise ValueError(f"the verifier {name!r} is {found!r}; expected a function.")
    return as_verifier(found)


def _extracting(
    conventions: Sequence[str], same: Callable[[str, str], bool | None], problem: Problem, text: str
) -> Verdict:
    """`same(gold, answer)` of the extracted answer; None where that is no answer of the kind."""
    answer = extract.extract(text, conventions)
    right = None if answer is None else same(problem.answer, answer)
    return NO_ANSWER if right is None else verdict_on(right)


def _with_gold(
    conventions: Sequence[str],
    same: Callable[[str, str], bool | None],
    read: Callable[[str], str | float | None],
) -> Verifier:
    """The verifier of an answer that is compared at once, and of a gold with itself.

    `read`: what of an answer counts; None where it is none of the kind.
    """

    def extracted(problem: Problem, response: str) -> str | None:
        answer = extract.extract(response, conventions)
        value = None if answer is None else read(answer)
        return None if value is None else str(value)

    check = lambda problem: (
        MATCH if same(problem.answer, problem.answer) else Verdict(False, "not of this kind")
    )
    ask = functools.partial(_extracting, tuple(conventions), same)
    return Verifier(ask, _never, check, extracted)


def exact(conventions: Sequence[str] = ("boxed",), *, ignore_case: bool = False) -> Verifier:
    """The same text, white space aside."""

    def same(gold: str, answer: str) -> bool | None:
        a, b = (" ".join(text.split()) for text in (gold, answer))
        return (a.lower() == b.lower() if ignore_case else a == b) if b else None

    def read(answer: str) -> str | None:
        text = " ".join(answer.split())
        return (text.lower() if ignore_case else text) or None

    return _with_gold(conventions, same, read)


def number_in(text: str) -> float | None:
    """The one number of a text, such as "12.5 kg", "v = 1.2 \\times 10^{3}" or "3/4"; None if there
    is not just one.
    """
    text, _ = quantity(normalise(text[: extract.LONGEST].rpartition("=")[2]))
    if spelled := plain_number(text):
        return float(spelled[0]) if abs(spelled[0]) < 1e300 else None
    found = _NUMBER.findall(_POWER_OF_TEN.sub(r"e\1", text))
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def numeric(
    conventions: Sequence[str] = ("boxed",),
    *,
    relative_tolerance: float = 1e-6,
    absolute_tolerance: float = 0.0,
) -> Verifier:
    """A number within a tolerance of the gold, |a - gold| <= max(absolute, relative |gold|)."""

    def same(gold: str, answer: str) -> bool | None:
        a, b = number_in(gold), number_in(answer)
        if b is None:
            return None
        if a is None:
            return False
        return abs(a - b) <= max(absolute_tolerance, relative_tolerance * abs(a))

    return _with_gold(conventions, same, number_in)


def letter_in(text: str) -> str | None:
    """The choice that a text names: "(C)", "C. because", "the answer is C", or a last lone C; None
    where there is none, or an answer is a list of several.
    """
    named = _NAMED.findall(text)
    if named:
        return named[-1]
    short = bare(normalise(text[: extract.LONGEST]))
    alone = [first or second for first, second in _ALONE.findall(text)]
    if begins := _BEGINS.match(short):
        listed = re.fullmatch(r"\(?[A-Z]\)?(?:,\(?[A-Z]\)?)+", short)
        lone = begins[1] not in "AI" or begins[1] in alone[:1] or len(short) < 4
        if listed:
            return None
        if lone and len(set(alone)) < 2:
            return begins[1]
    return alone[-1] if alone else None


def choice(conventions: Sequence[str] = ("boxed",)) -> Verifier:
    """Multiple choice: the letter that the answer names. The gold begins with its letter."""

    def same(gold: str, answer: str) -> bool | None:
        letter = letter_in(answer)
        return None if letter is None else letter == letter_in(gold_of(gold))

    return _with_gold(conventions, same, letter_in)


def combine(verifiers: Sequence[Verifier], *, every: bool) -> Verifier:
    """All of several verifiers have to say yes, or one does; workers are asked in their order."""
    parts = tuple(verifiers)
    reading = [v.extract for v in parts if v.extract]
    if len(reading) < len(parts):
        reading = []  # one accepts what nobody can read
    return Verifier(
        lambda problem, response: _first_open([v.ask(problem, response) for v in parts], every),
        functools.partial(_judge_open, tuple(v.judge for v in parts), every),
        lambda problem: _first_open([v.ask_gold(problem) for v in parts], every),
        functools.partial(_first_extracted, reading) if reading else None,
    )


def _first_extracted(reading: Sequence[Extract], problem: Problem, response: str) -> str | None:
    found = (extract(problem, response) for extract in reading)
    return next((answer for answer in found if answer is not None), None)


def _first_open(replies: list[Verdict | Question], every: bool) -> Verdict | Question:
    """The verdict if the settled replies give it; else the open questions with their places."""
    settled = [reply for reply in replies if isinstance(reply, Verdict)]
    for reply in settled:
        if reply.correct != every:
            return reply
    if len(settled) == len(replies):
        return settled[-1]
    return tuple((i, r) for i, r in enumerate(replies) if not isinstance(r, Verdict))


def by_source(verifiers: Mapping[str, Verifier]) -> Verifier:
    """For a mixture of data: the verifier of the problem's source. It extracts if all do."""
    reading = {name: v.extract for name, v in verifiers.items() if v.extract}
    return Verifier(
        lambda problem, response: _tagged(
            problem.source, verifiers[problem.source].ask(problem, response)
        ),
        functools.partial(_judge_tagged, {name: v.judge for name, v in verifiers.items()}),
        lambda problem: _tagged(problem.source, verifiers[problem.source].ask_gold(problem)),
        (lambda problem, response: reading[problem.source](problem, response))
        if len(reading) == len(verifiers)
        else None,
    )


def _tagged(source: str, reply: Verdict | Question) -> Verdict | Question:
    return reply if isinstance(reply, Verdict) else (source, reply)


def _judge_tagged(judges: Mapping[str, Callable], question: Question) -> Verdict:
    source, question = question
    return judges[source](question)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifierOptions:
    """How the responses to a source's problems are verified (docs/verifiers.md)."""

    kind: str = option(
        "maths",
        "A key of VERIFIERS, 'package.module:function', or several of these joined by ' and ' or "
        "by ' or '.",
    )
    answer: tuple[str, ...] = option(
        ("boxed",), "Where a response has its answer: names of conventions, tried in this order."
    )
    ignore_case: bool = option(False, "Whether kind 'exact' ignores upper and lower case.")
    relative_tolerance: float = option(
        1e-6, "Tolerance of kind 'numeric', as a fraction of the right answer.", at_least=0
    )
    absolute_tolerance: float = option(
        0.0, "Tolerance of kind 'numeric', as an absolute difference.", at_least=0
    )


# To add a kind of verifier, add its function to this table.
VERIFIERS: dict[str, Callable[[VerifierOptions], Verifier]] = {
    "maths": lambda options: maths(options.answer),
    "exact": lambda options: exact(options.answer, ignore_case=options.ignore_case),
    "numeric": lambda options: numeric(
        options.answer,
        relative_tolerance=options.relative_tolerance,
        absolute_tolerance=options.absolute_tolerance,
    ),
    "choice": lambda options: choice(options.answer),
}


def from_options(options: VerifierOptions) -> Verifier:
    """Returns the verifier that options describe.

    Raises:
      ValueError: the kind or a convention does not exist.
    """
    for convention in options.answer:
        if convention not in extract.CONVENTIONS:
            known = ", ".join(extract.CONVENTIONS)
            raise ValueError(f"answer has {convention!r}; expected some of {known}.")
    every = " and " in options.kind
    if every and " or " in options.kind:
        raise ValueError(f"kind is {options.kind!r}; expected only ' and ' or only ' or ' in it.")
    names = [name.strip() for name in options.kind.split(" and " if every else " or ")]
    parts = [_one_kind(name, options) for name in names]
    return combine(parts, every=every) if len(parts) > 1 else parts[0]


def _one_kind(name: str, options: VerifierOptions) -> Verifier:
    """Returns the verifier of one kind: a key of VERIFIERS, or "package.module:function"."""
    if name in VERIFIERS:
        return VERIFIERS[name](options)
    if ":" in name:
        return function(name)
    raise ValueError(
        f"kind is {name!r}; expected {', '.join(VERIFIERS)}, 'package.module:function', or several "
        "of these joined by ' and ' or by ' or '."
    )


def _judge_open(judges: Sequence[Callable], every: bool, questions: Question) -> Verdict:
    for i, question in questions:
        verdict = judges[i](question)
        if verdict.correct != every:
            break
    return verdict
