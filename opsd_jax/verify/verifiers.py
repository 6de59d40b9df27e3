"""All kinds of verifiers, and the options that select one for a source of problems.

The kinds are the keys of VERIFIERS, and "package.module:function" for a function of your own.
Several kinds joined by " and " must all accept a response; joined by " or ", one is enough.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

from opsd_jax.options import option, resolve
from opsd_jax.problem import Problem
from opsd_jax.verify import extract
from opsd_jax.verify.maths import gold_of, maths
from opsd_jax.verify.normalise import bare, normalise
from opsd_jax.verify.units import quantity
from opsd_jax.verify.value import evaluate
from opsd_jax.verify.verdict import (
    MATCH,
    NO_ANSWER,
    Extract,
    Job,
    Judge,
    Verdict,
    Verifier,
    verdict_on,
)

_EQUALS = re.compile(r"=|\\approx(?![a-zA-Z])|\\sim(?![a-zA-Z])")
# The left side of an equation that names a quantity: v, v_0, \Delta x, F_{\text{net}}.
_QUANTITY = re.compile(r"[^0-9<>]*(?:_(?:[0-9a-zA-Z]|\{.*\})|\([a-z0-9]\))?")
_ABOUT = re.compile(
    r"(?:(?:about|approximately|approx|roughly|around)\b\.?|\\approx|\\sim) *", re.IGNORECASE
)
_SCALE = re.compile(
    r"(.*[0-9}]) ?(hundred|thousand|million|billion|trillion|dozen|lakh|crore)s?(.*)", re.DOTALL
)
_SCALES = {
    "hundred": 2,
    "thousand": 3,
    "million": 6,
    "billion": 9,
    "trillion": 12,
    "lakh": 5,
    "crore": 7,
}
_BEGINS = re.compile(r"\(?([A-Z])(?:[).:,\s]|$)")
_NAMED = re.compile(
    r"(?i:(?:answer|choice|option)(?: is)?)\W{0,4}\(?([A-Z])(?:[).:,*]|\s*$)",
)
# "A" and "I" are also words, so they count as letters only before punctuation or the end.
_ALONE = re.compile(r"(?<![\w'\u2019])(?:([B-HJ-Z])(?![\w'\u2019])|([AI])(?=[).:,*]|\s*$))")
# "not A", and "B or maybe C". The letters of a hedge are distinct alternatives.
_DENIED = re.compile(
    r"(?:(?<!\w)(?i:not|non|nor|isn't|neither)\s+|不是\s*)\(?[A-Z](?![\w'\u2019])\)?"
)
_HEDGE = r"(?i:or|and|maybe|possibly|perhaps|probably|also)\b"
_BETWEEN = rf"(?:[\s,/}}*)]|\\(?:text|textbf|mathrm)\s*\{{|\b(?:{_HEDGE}|either\b))"
_HEDGED = re.compile(
    rf"(?<!\w)[A-Z]\)?{_BETWEEN}{{0,20}}(?:/|{_HEDGE}){_BETWEEN}{{0,20}}\(?[A-Z](?!\w)"
)
_CALCULATION = re.compile(r"\(?[A-Z]\)? ?[+*/^=]")


def at_once(judge: Judge, extract: Extract | None = None) -> Verifier:
    """Returns a verifier that runs a fast and trusted function in the calling process.

    Args:
      judge: `(problem, response) -> Verdict`.
      extract: `(problem, response) -> answer or None`, for majority votes.
    """
    return Verifier(judge, _never_called, extract=extract)


def as_verifier(judge: Verifier | Judge) -> Verifier:
    """Wraps a function as a verifier that runs in a worker. Returns a `Verifier` unchanged.

    Args:
      judge: a `Verifier`, or a module-level function `(problem, response) -> Verdict or bool`.
    """
    if isinstance(judge, Verifier):
        return judge
    return Verifier(_whole_response, functools.partial(_call, judge))


def _never_called(job: Job) -> Verdict:
    """Raises AssertionError. It is the `judge` of verifiers whose `prepare` never returns a job."""
    raise AssertionError(
        f"the verifier's `prepare` returned the job {job!r}; expected a Verdict, because this "
        "verifier runs no jobs in workers."
    )


def _whole_response(problem: Problem, response: str) -> Job:
    """Returns the problem and the response as a job, so that a worker verifies the response."""
    return problem, response


def _call(judge: Judge, job: Job) -> Verdict:
    """Calls a user's function with the problem and response of a job, and returns a `Verdict`."""
    verdict = judge(*job)
    if verdict in (True, False):  # also of NumPy
        return verdict_on(bool(verdict))
    if not isinstance(verdict, Verdict):
        raise TypeError(f"a verifier returned {verdict!r}; expected a Verdict or a bool.")
    return verdict


def function(name: str) -> Verifier:
    """Imports a verifier by a name such as "package.module:function".

    Args:
      name: "package.module:name" of a `Verifier`, or of a pure function `(problem, response) ->
        Verdict or bool`, which then runs in a worker.

    Raises:
      ValueError: the object cannot be imported or is not callable.
    """
    try:
        found = resolve(name)
    except ValueError as error:
        raise ValueError(f"the verifier {error}") from error
    if not callable(found):
        raise ValueError(f"the verifier {name!r} refers to {found!r}; expected a function.")
    return as_verifier(found)


def _comparing(
    conventions: Sequence[str],
    same: Callable[[str, str], bool | None],
    read: Callable[[str], str | float | None],
) -> Verifier:
    """Returns a verifier that extracts an answer and uses `same` to compare it with the gold one.

    Args:
      conventions: where a response has its answer: keys of `extract.CONVENTIONS`.
      same: `(gold, answer) -> whether they are equal`; None if the answer is not of this kind, for
        example not a number.
      read: `answer -> the part that is compared`, or None if the answer is not of this kind.
    """

    def verdict(problem: Problem, response: str) -> Verdict:
        answer = extract.extract(response, conventions)
        right = None if answer is None else same(problem.answer, answer)
        return NO_ANSWER if right is None else verdict_on(right)

    def gold_verdict(problem: Problem) -> Verdict:
        right = same(problem.answer, problem.answer)
        return MATCH if right else Verdict(False, "not of this kind")

    def extracted(problem: Problem, response: str) -> str | None:
        answer = extract.extract(response, conventions)
        value = None if answer is None else read(answer)
        return None if value is None else str(value)

    return Verifier(verdict, _never_called, gold_verdict, extracted)


def exact(conventions: Sequence[str] = ("boxed",), *, ignore_case: bool = False) -> Verifier:
    """Returns a verifier that accepts answers with the same text as the gold answer.

    Differences in whitespace are ignored.

    Args:
      conventions: where a response has its answer: keys of `extract.CONVENTIONS`.
      ignore_case: whether upper and lower case are equal.
    """

    def same(gold: str, answer: str) -> bool | None:
        a, b = (" ".join(text.split()) for text in (gold, answer))
        return (a.lower() == b.lower() if ignore_case else a == b) if b else None

    def read(answer: str) -> str | None:
        text = " ".join(answer.split())
        return (text.lower() if ignore_case else text) or None

    return _comparing(conventions, same, read)


def number_in(text: str) -> float | None:
    r"""Returns the number in a text such as "12.5 kg", "v = 1.2 \times 10^{3}" or "3/4".

    A unit or a currency may stand beside the number, and the name of the quantity before it.

    Returns:
      The number; None if the text has other words or operators, or several different numbers.
    """
    if len(text) > extract.LONGEST:
        return None
    *before, last = _EQUALS.split(normalise(text))
    number = _number_and_unit(last)
    if number is None:
        return None
    for part in before:
        other = _number_and_unit(part)
        if other is None and not _QUANTITY.fullmatch(part):
            return None
        if other is not None and abs(other - number) > 0.01 * abs(number):
            return None
    return number


def _number_and_unit(text: str) -> float | None:
    """Returns the number in a normalised text, without its unit, or None if there is none."""
    text = _ABOUT.sub("", text.strip(), count=1) if _ABOUT.match(text.strip()) else text.strip()
    scale = 1.0
    if found := _SCALE.fullmatch(bare(text)):
        text, scale = (
            found[1] + found[3],
            12.0 if found[2] == "dozen" else 10.0 ** _SCALES[found[2]],
        )
    value = evaluate(quantity(text, lone=True)[0].rstrip("%\\ "))
    return None if value is None else value * scale


def numeric(
    conventions: Sequence[str] = ("boxed",),
    *,
    relative_tolerance: float = 1e-6,
    absolute_tolerance: float = 0.0,
) -> Verifier:
    """Returns a verifier that accepts numbers close to the gold answer.

    The condition is |answer - gold| <= max(absolute_tolerance, relative_tolerance * |gold|).

    Args:
      conventions: where a response has its answer: keys of `extract.CONVENTIONS`.
      relative_tolerance: as a fraction of the gold answer.
      absolute_tolerance: as a difference.
    """

    def same(gold: str, answer: str) -> bool | None:
        a, b = number_in(gold), number_in(answer)
        if b is None:
            return None
        if a is None:
            return False
        return abs(a - b) <= max(absolute_tolerance, relative_tolerance * abs(a))

    return _comparing(conventions, same, number_in)


def letter_in(text: str) -> str | None:
    """Returns the choice letter in a text, such as "C" in "the answer is (C)".

    It accepts "(C)", "C. because", "the answer is C", and otherwise the last single letter.

    Returns:
      The letter; None if the text names no letter, or hesitates between several, as "B or maybe C".
    """
    text = _DENIED.sub(" ", text)
    short = bare(normalise(text[: extract.LONGEST]))
    named, alone = list(_NAMED.finditer(text)), list(_ALONE.finditer(text))
    letters = [found[1] or found[2] for found in alone]
    if not named and (begins := _BEGINS.match(short)):
        if re.fullmatch(r"\(?[A-Z]\)?(?:,\(?[A-Z]\)?)+", short) or _CALCULATION.match(short):
            return None
        lone = begins[1] not in "AI" or begins[1] in letters[:1] or len(short) < 4
        if lone and len(set(letters)) < 2:
            return begins[1]
    if not (named or alone):
        return None
    chosen = (named or alone)[-1]
    group = chosen.lastindex or 0
    position = chosen.start(group)
    hedged = any(hedge.start() <= position < hedge.end() for hedge in _HEDGED.finditer(text))
    return None if hedged else chosen[group]


def choice(conventions: Sequence[str] = ("boxed",)) -> Verifier:
    """Returns a verifier for multiple-choice problems, which compares only the choice letters.

    Args:
      conventions: where a response has its answer: keys of `extract.CONVENTIONS`.
    """

    def same(gold: str, answer: str) -> bool | None:
        letter = letter_in(answer)
        return None if letter is None else letter == letter_in(gold_of(gold))

    return _comparing(conventions, same, letter_in)


def combine(verifiers: Sequence[Verifier], *, every: bool) -> Verifier:
    """Returns a verifier that accepts a response if all, or any, of several verifiers accept it.

    Args:
      verifiers: at least one.
      every: whether all of them must accept a response. If not, one is enough.
    """
    parts = tuple(verifiers)
    extractors = [v.extract for v in parts if v.extract]

    def extracted(problem: Problem, response: str) -> str | None:
        found = (extract(problem, response) for extract in extractors)
        return next((answer for answer in found if answer is not None), None)

    return Verifier(
        lambda problem, response: _combined([v.prepare(problem, response) for v in parts], every),
        functools.partial(_judge_combined, tuple(v.judge for v in parts), every),
        lambda problem: _combined([v.prepare_gold(problem) for v in parts], every),
        # A part without `extract` may accept responses whose answer no other part can read.
        extracted if len(extractors) == len(parts) else None,
    )


def _combined(prepared: list[Verdict | Job], every: bool) -> Verdict | Job:
    """Combines the verdicts and jobs of several verifiers into one verdict or one joint job.

    A joint job has the index and the job of each verifier that has no verdict yet.
    """
    verdicts = [part for part in prepared if isinstance(part, Verdict)]
    for verdict in verdicts:
        if verdict.correct != every:
            return verdict
    if len(verdicts) == len(prepared):
        return verdicts[-1]
    return tuple((i, part) for i, part in enumerate(prepared) if not isinstance(part, Verdict))


def _judge_combined(judges: Sequence[Callable[[Job], Verdict]], every: bool, job: Job) -> Verdict:
    """Judges the parts of a joint job in order, until one of them decides the verdict."""
    for i, part in job:
        verdict = judges[i](part)
        if verdict.correct != every:
            break
    return verdict


def by_source(verifiers: Mapping[str, Verifier]) -> Verifier:
    """Returns a verifier that verifies each problem with the verifier of the problem's source.

    Args:
      verifiers: source -> verifier. The result has `extract` if all of them have it.
    """
    extractors = {name: v.extract for name, v in verifiers.items() if v.extract}

    def tagged(problem: Problem, prepared: Verdict | Job) -> Verdict | Job:
        return prepared if isinstance(prepared, Verdict) else (problem.source, prepared)

    def prepare(problem: Problem, response: str) -> Verdict | Job:
        return tagged(problem, verifiers[problem.source].prepare(problem, response))

    def prepare_gold(problem: Problem) -> Verdict | Job:
        return tagged(problem, verifiers[problem.source].prepare_gold(problem))

    def extracted(problem: Problem, response: str) -> str | None:
        return extractors[problem.source](problem, response)

    return Verifier(
        prepare,
        functools.partial(_judge_tagged, {name: v.judge for name, v in verifiers.items()}),
        prepare_gold,
        extracted if len(extractors) == len(verifiers) else None,
    )


def _judge_tagged(judges: Mapping[str, Callable[[Job], Verdict]], job: Job) -> Verdict:
    """Judges a `(source, job)` pair with the `judge` function of that source."""
    source, inner = job
    return judges[source](inner)


def _kinds() -> str:
    """Returns a phrase that lists the valid values of `VerifierOptions.kind`."""
    return (
        f"{', '.join(VERIFIERS)}, 'package.module:function', or several of these joined by ' and ' "
        "or by ' or '"
    )


def _conventions() -> str:
    """Returns a phrase that lists the valid values of `VerifierOptions.answer`."""
    return f"one or more of {', '.join(extract.CONVENTIONS)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifierOptions:
    """The options that select the verifier of a source's problems (docs/verifiers.md)."""

    kind: str = option("maths", "Verifier of the responses, or several verifiers.", expects=_kinds)
    answer: tuple[str, ...] = option(
        ("boxed",),
        "Where a response has its answer: names of conventions, tried in this order.",
        expects=_conventions,
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
    """Builds the verifier that the given options describe.

    Raises:
      ValueError: the kind or a convention does not exist.
    """
    for convention in options.answer:
        if convention not in extract.CONVENTIONS:
            raise ValueError(
                f"answer contains the unknown convention {convention!r}; expected {_conventions()}."
            )
    every = " and " in options.kind
    if every and " or " in options.kind:
        raise ValueError(
            f"kind is {options.kind!r}; expected verifiers joined only by ' and ' "
            "or only by ' or '."
        )
    names = [name.strip() for name in options.kind.split(" and " if every else " or ")]
    parts = [_one_kind(name, options) for name in names]
    return combine(parts, every=every) if len(parts) > 1 else parts[0]


def _one_kind(name: str, options: VerifierOptions) -> Verifier:
    """Returns the verifier for one kind: a key of VERIFIERS, or "package.module:function"."""
    if name in VERIFIERS:
        return VERIFIERS[name](options)
    if ":" in name:
        return function(name)
    raise ValueError(f"kind is {name!r}; expected {_kinds()}.")
